"""What online DPO samples with: the live model, an engine that takes its weights, or a vLLM server that reads them.

An episode's samples must be of the policy as it is. The embedded engine reads the live model's own tensors. Any other
engine of the recipe (role `sampler`) starts from the policy's own model and is handed the weights before each sampling:
in process by `load_weights`, a server through a saved checkpoint and the word to read it. Adapters are merged into the
base's names on the way; the live model itself is never merged and unmerged, which would change its last digits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.decoder import bare_model
from align.core.engines.load import end_ids
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.transformers_engine import TransformersEngine
from align.core.engines.vllm_server import read_weights
from align.core.errors import EngineError, ModelError, RecipeError
from align.core.records import Messages
from align.core.stage import Tools
from align.core.store import ModelRef
from align.train.models import source_dtype
from align.train.online_settings import Config

_KEPT = 0.5
"""What is left of each weight in a server's trial: a model so changed answers otherwise, whatever it is."""


Sample = Callable[[Iterable[Prompt], int, SamplingParams, int], Iterator[tuple[int, int, Completion]]]
"""`Engine.sample`."""


class Sampler(Engine, Protocol):
    """An engine that samples from the policy that is being trained."""

    def take(self, model: Any, step: int) -> None:
        """Brings the policy's weights, as they are after so many steps, to the engine, and makes it ready to sample."""
        ...

    def rest(self) -> None:
        """Gives back, until the next `take`, what memory the engine can do without while the policy trains."""
        ...


def given(config: Config, tools: Tools, policy: ModelRef, tokenizer: Any, processes: int) -> Sampler | None:
    """The sampler on the step's own engine; None where the live model is sampled from.

    Called before the policy is loaded, since vLLM counts its memory when it starts.

    Args:
        config: the stage's.
        tools: engines and a folder for checkpoints.
        policy: the model that the training starts from.
        tokenizer: the policy's.
        processes: how many train.

    Raises:
        RecipeError: no weights can be brought to such an engine, or not from several processes; or another role has it.
        ModelError: its model isn't the policy.
    """
    if "sampler" not in tools.engines:
        return None
    if processes > 1:
        raise RecipeError(
            f"sampler: an engine of the recipe takes the weights of one training process, and {processes} train; set "
            "processes=1, or leave the engine out: then every process samples its share from its own model"
        )
    if config.quantization != "none":
        raise RecipeError(
            f"sampler: the policy's weights are in 4 bits (quantization: {config.quantization}) and can't be brought "
            "to another engine; leave the engine out, or train adapters on unquantized weights"
        )
    engine = tools.engines["sampler"]
    sample = engine.sample
    if isinstance(engine, CachedEngine):  # the episode keeps the samples; in the step's cache weights would mix
        sample, engine = engine.sample_anew, engine.engine
    for role, other in tools.engines.items():
        if role != "sampler" and getattr(other, "engine", other) is engine:
            raise RecipeError(
                f"{role}: it has one engine with sampler, which takes the weights of the policy as it is trained; give "
                f"{role} another model, or the same one with a setting of its own (max_context, say)"
            )
    if isinstance(engine, OpenAIEngine):
        folder, dtype = tools.work / "sampler", source_dtype(policy)
        return Served(engine, tokenizer, folder, config.max_sampler_gap, dtype, sample)
    if not hasattr(engine, "load_weights"):
        raise RecipeError(
            f"sampler: {engine.generator} runs on a {type(engine).__name__}, which takes no weights; use an engine of "
            "kind transformers or vllm (without ray), or kind openai with server: vllm"
        )
    if engine.fingerprint != policy.fingerprint:
        raise ModelError(
            f"sampler: its model is {engine.generator}, and the policy is {policy.name}; give the engine the policy's "
            "own model, which then takes the weights as they are trained"
        )
    return Loaded(engine, sample)


class Live:
    """The embedded engine on the model that is trained: nothing to bring.

    Args:
        model: the policy.
        tokenizer: its own.
        precision: of the training: bf16 samples with weights rounded to it once, as the training's products are.
    """

    def __init__(self, model: Any, tokenizer: Any, precision: str = "fp32") -> None:
        dtype = "bfloat16" if precision == "bf16" else "auto"
        self.engine = TransformersEngine(model, tokenizer, dtype=dtype, fingerprint="live")

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self.engine.generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`; the same for all weights."""
        return self.engine.fingerprint

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`."""
        return self.engine.sample(prompts, n, params, first_index)

    def take(self, model: Any, step: int) -> None:
        """See `Sampler`."""

    def rest(self) -> None:
        """See `Sampler`: the matrices that the engine laid side by side go."""
        self.engine.release()

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()


class Loaded:
    """An engine in this process with weights of its own, which are written over: vLLM, or a second embedded model.

    Args:
        engine: has `load_weights`; one with `sleep_mode` gives its memory back while the policy trains.
        sample: the engine's own, or one that also counts.
    """

    def __init__(self, engine: Any, sample: Sample | None = None) -> None:
        self.engine, self._sample = engine, sample or engine.sample
        self.sleeps = bool(getattr(engine, "sleep_mode", False))
        self._asleep = False
        self._has: Any = None  # see `state_of`

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return str(self.engine.generator)

    @property
    def fingerprint(self) -> str:
        """See `Engine`; the same for all weights, so that a run that goes on after a kill knows its samples again."""
        return "taken"

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`."""
        return self._sample(prompts, n, params, first_index)

    def take(self, model: Any, step: int) -> None:
        """See `Sampler`.

        Raises:
            ModelError: the policy's names or shapes aren't those of the engine's model.
        """
        if self._asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the training has freed is kept by torch, and wanted here
            self.engine.wake()
            self._asleep = False
        if self._has != (now := state_of(model, step)):
            self.engine.load_weights(weights_of(model))
            self._has = now

    def rest(self) -> None:
        """See `Sampler`. The weights needn't be kept: `take` brings them."""
        if self.sleeps:
            self.engine.sleep(keep_weights=False)
            self._asleep, self._has = True, None

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()


class Served:
    """A vLLM server: weights go to it as a checkpoint in a folder that it sees under the same path.

    At the first `take` it is tried whether the server heeds what it is told: all weights at half must change its
    answers. At every `take` it is asked for a few samples, whose log-probabilities must be those of the live model.

    Args:
        engine: asks the server.
        tokenizer: the policy's.
        folder: for checkpoints; the last one stays.
        most_gap: nats a token between the server's log-probabilities and the live model's.
        dtype: of the checkpoints: that of the policy's own.
        sample: the engine's own, or one that also counts.

    Raises:
        RecipeError: the server is of a kind that tells no token ids, or can't be told to read weights.
    """

    def __init__(
        self,
        engine: OpenAIEngine,
        tokenizer: Any,
        folder: Path,
        most_gap: float,
        dtype: torch.dtype = torch.float32,
        sample: Sample | None = None,
    ) -> None:
        settings = engine.settings
        if settings.server != "vllm":
            lacks = "can't be told to read other weights" if engine.gives_token_ids else "gives no token ids back"
            raise RecipeError(
                f"sampler: {settings.model}: a server of kind '{settings.server}' {lacks}, and online DPO trains on "
                "the ids of the policy's own samples; serve it with vLLM and say server: vllm, or leave the engine out"
            )
        if settings.api == "chat":
            raise RecipeError(
                f"sampler: {settings.model}: api: chat, but prompts are sent as token ids, to /completions; set "
                "api: both"
            )
        self.engine, self.tokenizer, self.folder, self.most_gap = engine, tokenizer, folder, most_gap
        self.dtype, self._sample = dtype, sample or engine.sample
        self._has: Any = None
        self._sent = 0
        self._ends: tuple[int, ...] = ()

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self.engine.generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`."""
        return self.engine.fingerprint

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. The policy's end tokens go along: what the server was started with may know fewer."""
        return self._sample(prompts, n, replace(params, stop_token_ids=self._ends), first_index)

    def take(self, model: Any, step: int) -> None:
        """See `Sampler`.

        Raises:
            EngineError: the server can't be told, can't read the checkpoint, or samples from other weights than these.
        """
        if self._has == (now := state_of(model, step)):
            return
        self._ends = tuple(sorted(end_ids(self.tokenizer, bare_model(model))))
        tried = None
        if self._has is None:
            self._send(model, step, _KEPT)
            tried = self._gap(model)
        self._send(model, step)
        gap = self._gap(model)
        if not gap <= self.most_gap or (tried is not None and not tried > 2 * gap):
            heeds = "" if tried is None else f"; with all weights at {_KEPT:g} it was {tried:.2g}"
            raise EngineError(
                f"{self.generator}: the server samples from other weights than those it was told to read: its "
                f"log-probabilities lie {gap:.2g} nats a token from the policy's (max_sampler_gap {self.most_gap:g})"
                f"{heeds}; see that it serves the policy's model, that nothing stands between with several servers "
                "behind one address, and that its precision is the training's"
            )
        self._has = now

    def rest(self) -> None:
        """See `Sampler`: the server's memory is its own."""

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()

    def _send(self, model: Any, step: int, kept: float = 1.0) -> None:
        """Writes a checkpoint under a name of its own, since a server may keep what it read under one; has it read."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._sent += 1
        folder = self.folder / f"step-{step}-{self._sent}"
        weights = {
            name: (kept * tensor).to("cpu", self.dtype) if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in weights_of(model).items()
        }
        bare_model(model).save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        read_weights(self.engine.settings, self.engine.key, folder.resolve())

    def _gap(self, model: Any) -> float:
        """Mean distance of the server's log-probability of a token from the live model's, nats.

        Raises:
            EngineError: the server gave no samples with ids and log-probabilities.
        """
        question: Messages = [{"role": "user", "content": "Count from one to ten."}]
        prompt = prompt_ids(self.tokenizer, question)
        params = SamplingParams(max_tokens=16, logprobs=True)
        each = len(self.engine.settings.addresses) * 4  # so that each of several servers answers some
        done = [completion for *_, completion in self.sample([prompt], each, params)]
        for completion in done:
            if not completion.token_ids or completion.logprobs is None:
                told = completion.error or "it tells no token ids, or no log-probabilities; vLLM 0.11 or newer does"
                raise EngineError(f"{self.generator}: no samples come from the server: {told}")
        ids = [list(completion.token_ids) for completion in done]
        known = TransformersEngine(model, self.tokenizer, fingerprint="live").score([prompt] * each, ids)
        told_by = np.concatenate([completion.logprobs or () for completion in done])
        return float(np.mean(np.abs(told_by - np.concatenate(known))))


def state_of(model: Any, step: int) -> tuple[int, int]:
    """Differs whenever the weights do: after a step, and after an episode was undone, which is no step."""
    return step, sum(parameter._version for parameter in model.parameters())


def weights_of(model: Any) -> dict[str, Tensor]:
    """A policy's weights under the names of its base model, adapters added to what they lie on; no copy where none do.

    Args:
        model: as it is trained: a causal language model, or a peft model with plain LoRA.
    """
    base = bare_model(model)
    adapted = {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}
    found: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        below = owner.removesuffix(".base_layer")
        if below != owner:
            found[f"{below}.{leaf}"] = _with_adapters(adapted[below], tensor) if leaf == "weight" else tensor
        elif not any(owner == part or owner.startswith(f"{part}.") for part in adapted):
            found[name] = tensor.detach()
    return found


@torch.no_grad()
def _with_adapters(module: Any, weight: Tensor) -> Tensor:
    """A layer's weight and the product of its active adapters."""
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight.detach()
