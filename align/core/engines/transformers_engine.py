"""The embedded engine: samples from any causal language model of transformers, on CPU or GPU, nothing to install.

A slot loop over the model: each distinct prompt is computed once for all its samples, and a row that finishes gives
its slot to the next prompt. Qwen2-like models (Qwen2, Qwen3, Llama, Mistral without a sliding window) run through a
forward of our own; all others through the model's forward and cache. On a GPU with a large model, vLLM is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.decoder import Decoder
from align.core.engines.generic_decoder import GenericDecoder
from align.core.engines.load import content_hash, end_ids, find_device, load_model, load_tokenizer, misfit
from align.core.engines.quick_decoder import QuickDecoder
from align.core.engines.quick_weights import QuickWeights, is_quick
from align.core.engines.slots import Endings, Job, SlotLoop
from align.core.engines.structured import Form
from align.core.errors import DataError, EngineError, ModelError


class TransformersEngine:
    """Samples from one causal language model; see `align.core.engines.base.Engine`.

    A completion depends on the model, the prompt's ids, the sampling parameters and the sample's index alone: not on
    the batch, the number of slots or the order of prompts. In float32 that holds to the token (see `draws`); in
    bfloat16 and float16 the batch's rounding may decide between two tokens that are about as likely. The
    log-probabilities that are reported may differ in their last digits.

    Args:
        model: a model folder, a LoRA adapter's folder (merged into its base), a Hub id, or a model in memory. A model
            in memory is used where it is and as it is at each call of `sample`: train it on, and sample again.
        tokenizer: the model's own by default.
        device: auto (a CUDA device if there is one), cpu, cuda, cuda:1, ... Of a model in memory: its own.
        dtype: auto (float32 on CPU, the checkpoint's own on a GPU), float32, bfloat16, float16. Of a model in memory:
            auto is its own; another makes its products in that precision, as torch.autocast does, and leaves it alone.
        slots: most samples in flight.
        generator: see `Engine`; the model's name by default.
        fingerprint: see `Engine`; a hash of weights, tokenizer and template by default.
        max_context: most tokens of prompt and completion together; the model's own limit by default.

    Raises:
        ModelError: there is no such model, or it is no causal language model.
        EngineError: the device isn't there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 256,
        generator: str | None = None,
        fingerprint: str | None = None,
        max_context: int | None = None,
    ) -> None:
        if slots < 1:
            raise EngineError(f"slots: found {slots}, expected 1 or more")
        self._live = isinstance(model, torch.nn.Module)
        name = str(getattr(model, "name_or_path", "") or type(model).__name__) if self._live else str(model)
        self.model: Any = model if self._live else load_model(str(model), find_device(device), dtype)
        if tokenizer is None:
            tokenizer = load_tokenizer(name)
        self.tokenizer: Any = tokenizer
        self.slots = slots
        self._generator = generator or Path(name).name
        self._fingerprint, self._given_fingerprint = fingerprint, fingerprint
        config = self.model.config.get_text_config()
        limits = [n for n in (max_context, getattr(config, "max_position_embeddings", None)) if n]
        self.max_context: int | None = min(limits) if limits else None
        self._end_ids = end_ids(tokenizer, self.model)
        self._endings: dict[tuple[tuple[str, ...], tuple[int, ...]], Endings] = {}  # costs a pass over the vocabulary
        kept = next(iter(self.model.parameters())).dtype
        self._products = getattr(torch, dtype) if self._live and dtype != "auto" else kept
        self._autocast = self._products if self._products != kept else None
        self._quick = QuickWeights(self.model, self._products) if is_quick(self.model) else None

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self._generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`; computed from the model in memory where none was given."""
        if self._fingerprint is None:
            self._fingerprint = content_hash(self.model, self.tokenizer)
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. Reads prompts in blocks of twice as many samples as there are slots."""
        params.check(n)
        loop = self._loop(self._jobs(prompts, n, params, first_index), params)
        try:
            yield from loop.run()
        except torch.OutOfMemoryError as problem:
            raise self._out_of_memory() from problem

    def stream(self, prompt: Prompt, params: SamplingParams, index: int = 0) -> Iterator[str | Completion]:
        """The completion that `sample` gives for the prompt and the index: its text piece by piece, and at last itself.

        What the pieces make together may be longer than the completion's text where a stop text cut that.
        """
        params.check()
        loop = self._loop(self._jobs([prompt], 1, params, index), params)
        told = ""
        try:
            for finished in loop.steps():
                if finished:
                    completion = finished[0][2]
                    if completion.text.startswith(told):
                        yield completion.text[len(told) :]
                    yield completion
                    return
                (text,) = loop.endings.texts([loop.sampled_of_first()])
                if not text.endswith("\ufffd"):  # half a character
                    yield text[len(told) :]
                    told = text
        except torch.OutOfMemoryError as problem:
            raise self._out_of_memory() from problem

    def score(self, prompt: Sequence[Sequence[int]], completion: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities (temperature 1, nats) of given completions' tokens, by the model's own forward.

        The check on what `sample` reports: nothing is shared with the quick path but the weights.

        Args:
            prompt: token ids of each prompt.
            completion: token ids of each completion, as many as prompts.
        """
        out: list[list[float]] = []
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for before, after in zip(prompt, completion, strict=True):
                    ids = torch.tensor([[*before, *after]], device=self.device)
                    logits = self.model(input_ids=ids).logits[0, len(before) - 1 : -1].float()
                    chosen = ids[0, len(before) :, None]
                    out.append((logits.gather(-1, chosen)[:, 0] - logits.logsumexp(-1)).tolist())
        finally:
            self.model.train(training)
        return out

    def refresh(self) -> None:
        """Takes the model's current weights; `sample` does it by itself for a model that was given in memory."""
        if self._quick is not None:
            self._quick.refresh()
        self._fingerprint = self._given_fingerprint

    def release(self) -> None:
        """Frees what was laid out for sampling, while a live model trains; the next `sample` lays it out again."""
        if self._quick is not None:
            self._quick.release()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies a state dict into the model, in place.

        Raises:
            ModelError: its names or shapes aren't the model's.
        """
        try:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as problem:
            raise ModelError(f"{self.generator}: the weights don't fit this model: {problem}") from problem
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ModelError(
                f"{self.generator}: the weights don't fit this model: missing {sorted(missing)[:3]}, "
                f"unexpected {sorted(unexpected)[:3]}; give the state dict of a model with the same config"
            )
        self.refresh()

    def close(self) -> None:
        """See `Engine`."""
        self.model = self._quick = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _loop(self, jobs: Iterator[Job], params: SamplingParams) -> SlotLoop:
        if self._live:
            self.refresh()
        decoder: Decoder
        if self._quick is not None:
            decoder = QuickDecoder(self._quick)
        else:
            decoder = GenericDecoder(self.model, self.device)
        vocabulary = max(len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0])
        ends = self._end_ids | set(params.stop_token_ids)
        how = (params.stop, params.stop_token_ids)
        if how not in self._endings:
            self._endings[how] = Endings(self.tokenizer, ends, params.stop, vocabulary)
        form = None
        if params.json_schema is not None or params.choices:
            form = Form(self.tokenizer, ends, self.model.get_output_embeddings().weight.shape[0], params)
        return SlotLoop(decoder, jobs, self.slots, self._endings[how], params, self.device, form, self._autocast)

    def _out_of_memory(self) -> EngineError:
        return EngineError(
            f"{self.generator}: out of GPU memory with {self.slots} slots; give the engine fewer slots, "
            "a shorter max_context, or dtype bfloat16"
        )

    def _jobs(self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int) -> Iterator[Job]:
        """Prompts as token ids, read a block ahead; within a block sorted by length, so that neighbours are alike."""
        numbered = enumerate(prompts)
        indices = range(first_index, first_index + n)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        while block := list(islice(numbered, max(8, 2 * self.slots // n))):
            jobs: list[Job] = []
            for number, prompt in block:
                try:
                    ids = prompt_ids(self.tokenizer, prompt)
                    problem = misfit(ids, params.max_tokens, self.max_context, vocabulary)
                except DataError as refused:
                    ids, problem = [], str(refused)
                if problem:
                    jobs.append(Job(number, [], indices, problem))
                else:
                    jobs += [Job(number, ids, indices[i : i + self.slots]) for i in range(0, n, self.slots)]
            jobs.sort(key=lambda job: len(job.ids))
            yield from jobs
