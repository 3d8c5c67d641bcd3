"""vLLM in this process: for large models on GPUs. Needs the extra `vllm`; vLLM pins its torch, so give it its own venv.

Kept thin: prompts are rendered by `align.core.chat` as for every engine, each sample is one request with a seed of its
own, requests are fed as others finish, and the prompt that a request shares with its siblings comes from vLLM's prefix
cache. Written against vLLM 0.20 to 0.33; `tests/core/engines/test_vllm_engine.py` compares what is used here with the
source of either.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.draws import sample_key
from align.core.engines.load import end_ids, load_model, load_tokenizer, misfit, pinned
from align.core.errors import DataError, EngineError, ModelError

_COLDEST, _HOTTEST = 0.01, 2.0
"""Temperatures that vLLM takes besides 0. A lower one it would raise by itself, which is not what was asked for."""


class VllmEngine:
    """Samples from one causal language model through vLLM; see `align.core.engines.base.Engine`.

    A sample's seed is a hash of (seed, prompt ids, index), so the same call asks vLLM for the same samples, in this run
    or in the next. vLLM's arithmetic depends a little on the size of the batch; where that must not show, start with
    VLLM_BATCH_INVARIANT=1 in the environment.

    Args:
        model: a model folder, a LoRA adapter's folder (merged into its base on the CPU), or a Hub id, `id@revision`.
        dtype: auto (vLLM's choice), float32, bfloat16, float16.
        quantization: see vLLM's argument of that name.
        max_context: most tokens of prompt and completion together; the model's own limit by default.
        tensor_parallel: GPUs of this machine that share the model.
        gpu_memory: share of each GPU's memory that vLLM may take.
        max_in_flight: most requests that vLLM has at once.
        enforce_eager: leave out CUDA graphs.
        sleep_mode: keep the memory so that `sleep` can give it back; for training on the same GPU.
        generator: see `Engine`; the model's name by default.
        fingerprint: see `Engine`; of the model's content by default.

    Raises:
        ModelError: there is no such model.
        EngineError: vLLM isn't installed, or can't start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        max_context: int | None = None,
        tensor_parallel: int = 1,
        gpu_memory: float = 0.9,
        max_in_flight: int = 2048,
        enforce_eager: bool = False,
        sleep_mode: bool = False,
        generator: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report what runs here to its makers
        try:
            from vllm import LLM
        except ImportError as problem:
            raise EngineError(
                f"the engine 'vllm' needs vLLM, which can't be imported ({problem}); pip install "
                "'align-toolkit[vllm]', in an environment of its own since vLLM brings its own torch"
            ) from problem
        self.max_in_flight = max_in_flight
        self.sleep_mode = sleep_mode
        self.tokenizer: Any = load_tokenizer(str(model))
        name, revision = pinned(str(model))
        self._generator = generator or Path(name).name
        self._model, self._fingerprint = str(model), fingerprint
        self._end_ids = end_ids(self.tokenizer, None)  # vLLM knows those of the generation config itself
        self._special: Mapping[str, int] = self.tokenizer.get_added_vocab()
        with _loadable(name, self.tokenizer) as folder:
            self._weights = _weight_names(folder)
            try:
                self.llm: Any = LLM(
                    model=folder,
                    revision=revision,
                    tokenizer_revision=revision,
                    dtype=dtype,
                    quantization=quantization,
                    max_model_len=max_context,
                    tensor_parallel_size=tensor_parallel,
                    # Several GPUs of one machine: processes of this one, also where this one is a worker of Ray.
                    distributed_executor_backend="mp" if tensor_parallel > 1 else None,
                    gpu_memory_utilization=gpu_memory,
                    enforce_eager=enforce_eager,
                    enable_prefix_caching=True,
                    enable_sleep_mode=sleep_mode,
                    logprobs_mode="raw_logprobs",
                    # One backend, and no endless white space, which a grammar of JSON otherwise allows.
                    structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
                )
            except (ValueError, RuntimeError, OSError, AssertionError, NotImplementedError) as problem:
                first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                raise EngineError(
                    f"{self._generator}: vLLM can't start with this model: {first}; what it printed above says more. "
                    "Too little GPU memory: lower max_context or gpu_memory, or raise tensor_parallel"
                ) from problem
        config = self.llm.llm_engine.model_config
        self.max_context: int = config.max_model_len
        self._vocabulary: int = config.get_vocab_size()
        self._calls = 0
        # By open call of `sample`: what vLLM has finished of it. A step for one call may finish samples of another.
        self._finished: dict[int, deque[Any]] = {}
        self._asleep = self._emptied = False

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self._generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`; after `load_weights` one that no other weights have."""
        if self._fingerprint is None:
            from align.core.records import Kind
            from align.core.store import ModelRef

            self._fingerprint = ModelRef.open(self._model, Kind.MODEL).fingerprint
        return self._fingerprint

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. No more prompts are read than give `max_in_flight` samples.

        Raises:
            EngineError: vLLM can't sample so (a temperature that it doesn't take, log-probabilities together with
                structured output), it stopped, or the engine is asleep.
        """
        params.check(n)
        options = self._options(params)
        self._check_awake()
        from vllm import SamplingParams as VllmParams
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self.llm.llm_engine
        call, self._calls = self._calls, self._calls + 1
        finished = self._finished[call] = deque()
        asked: dict[str, tuple[int, int]] = {}
        jobs = self._jobs(prompts, n, params, first_index)
        try:
            while True:
                while len(asked) < self.max_in_flight and (job := next(jobs, None)) is not None:
                    number, index, ids, problem = job
                    if not problem:
                        request = f"{call}/{number}/{index}"
                        seed = sample_key(params.seed, ids, index) >> 1  # below 2^63: vLLM keeps it as int64
                        try:
                            engine.add_request(request, tokens_input(ids), VllmParams(seed=seed, **options))
                            asked[request] = (number, index)
                        except (ValueError, VLLMValidationError) as refused:
                            problem = f"vLLM refuses the request: {refused}"
                        except EngineDeadError as dead:
                            raise self._stopped(dead) from dead
                    if problem:
                        yield number, index, Completion("", (), "error", error=problem)
                if not asked:
                    return
                if not finished:
                    self._step()
                while finished:
                    output = finished.popleft()
                    number, index = asked.pop(output.request_id)
                    yield number, index, self._completion(output.outputs[0], params)
        finally:
            del self._finished[call]
            if asked:  # whoever took the samples has stopped
                engine.abort_request(list(asked))

    def sleep(self, keep_weights: bool = True) -> None:
        """Gives the GPU's memory back until `wake`.

        Args:
            keep_weights: keep them in the CPU's memory. Otherwise they are gone, and `load_weights` must bring others
                after `wake`.

        Raises:
            EngineError: the engine wasn't made with `sleep_mode`, or a call of `sample` is still open.
        """
        if not self.sleep_mode:
            raise EngineError(f"{self._generator}: it can't sleep; make the engine with sleep_mode=True")
        if self._finished:
            raise EngineError(f"{self._generator}: it can't sleep while it samples; take all samples or close the call")
        self.llm.sleep(level=1 if keep_weights else 2)
        self._asleep, self._emptied = True, self._emptied or not keep_weights

    def wake(self) -> None:
        """Takes the memory again."""
        self.llm.wake_up()
        self._asleep = False

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Puts other weights into the model, in place: a state dict with the names of the model's checkpoint.

        They go through a file in memory (/dev/shm where there is one), which every process of vLLM reads and shards for
        itself; vLLM quantises them as it did the first ones.

        Raises:
            ModelError: the names or shapes aren't the model's.
            EngineError: the engine is asleep or sampling.
        """
        if self._asleep or self._finished:
            raise EngineError(f"{self._generator}: weights can't be loaded while it sleeps or samples; wake() it first")
        if missing := sorted(self._weights - set(weights)):
            raise ModelError(
                f"{self._generator}: the weights don't fit this model: missing {missing[:3]}; give the state dict of a "
                "model with the same config"
            )
        from safetensors.torch import save_file

        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="align-", dir=memory if memory.is_dir() else None) as folder:
            save_file(_unshared(weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
            try:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            except Exception as problem:  # whatever a worker process raised, it comes as some exception of vLLM's
                self._emptied = True
                raise ModelError(f"{self._generator}: the weights don't fit this model: {problem}") from problem
        self.llm.reset_prefix_cache()
        self._emptied = False
        self._fingerprint = uuid.uuid4().hex

    def close(self) -> None:
        """See `Engine`. Ends vLLM's processes."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None

    def _jobs(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int
    ) -> Iterator[tuple[int, int, list[int], str]]:
        """Each sample's prompt number, index, prompt ids, and why it can't be sampled (empty where it can)."""
        for number, prompt in enumerate(prompts):
            try:
                ids = prompt_ids(self.tokenizer, prompt)
                problem = misfit(ids, params.max_tokens, self.max_context, self._vocabulary)
            except DataError as refused:
                ids, problem = [], str(refused)
            for index in range(first_index, first_index + n):
                yield number, index, ids, problem

    def _options(self, params: SamplingParams) -> dict[str, Any]:
        """The arguments of vLLM's own parameters, but for the seed."""
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if params.temperature and not _COLDEST <= params.temperature <= _HOTTEST:
            raise EngineError(
                f"{self._generator}: temperature: found {params.temperature}, vLLM takes 0 (greedy) and {_COLDEST} to "
                f"{_HOTTEST}; choose one of these, or the engine kind transformers"
            )
        structured = None
        if params.json_schema is not None:
            structured = StructuredOutputsParams(json=params.json_schema)
        elif params.choices:
            structured = StructuredOutputsParams(choice=list(params.choices))
        if structured is not None and params.logprobs:
            raise EngineError(
                f"{self._generator}: logprobs: with json_schema or choices vLLM reports those after tokens were left "
                "out; ask for one of the two, or use the engine kind transformers"
            )
        # A special token is no part of the text that vLLM looks for stop texts in.
        texts = [text for text in params.stop if text and text not in self._special]
        ends = {*self._end_ids, *params.stop_token_ids, *(self._special[t] for t in params.stop if t in self._special)}
        return {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "stop": texts,
            "stop_token_ids": sorted(ends),
            "logprobs": 0 if params.logprobs else None,  # of the sampled token alone
            "detokenize": bool(texts),  # only stop texts need it while sampling
            "structured_outputs": structured,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            "skip_clone": True,
        }

    def _step(self) -> None:
        """Waits for vLLM's next outputs and puts what is finished where its call looks."""
        try:
            outputs = self.llm.llm_engine.step()
        except Exception as problem:  # its processes are gone: nothing can be asked of it any more
            raise self._stopped(problem) from problem
        for output in outputs:
            call = int(output.request_id.partition("/")[0])
            if output.finished and call in self._finished:
                self._finished[call].append(output)

    def _stopped(self, problem: Exception) -> EngineError:
        return EngineError(
            f"{self._generator}: vLLM stopped: {problem}; what it printed above says why. What was sampled is kept: "
            "run the same command again"
        )

    def _completion(self, done: Any, params: SamplingParams) -> Completion:
        """What a request gave, as ours."""
        if done.finish_reason not in ("stop", "length"):
            return Completion("", (), "error", error=f"vLLM ended the request with reason '{done.finish_reason}'")
        ids = tuple(done.token_ids)
        logprobs = None
        if params.logprobs:
            logprobs = tuple(at[token].logprob for at, token in zip(done.logprobs, ids, strict=True))
        if isinstance(done.stop_reason, str):
            text = done.text  # up to the stop text
        else:
            # Decoded here as by the embedded engine; vLLM's own text lacks a letter that is cut in the middle.
            kept = ids[:-1] if done.finish_reason == "stop" else ids
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(text, ids, done.finish_reason, logprobs)

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineError(f"{self._generator}: it sleeps; call wake() before it samples")
        if self._emptied:
            raise EngineError(f"{self._generator}: its weights are gone since it slept; call load_weights() first")


@contextmanager
def _loadable(model: str, tokenizer: Any) -> Iterator[str]:
    """A folder or Hub id that vLLM can load: an adapter is merged into its base, in a folder that then goes."""
    if not (Path(model) / "adapter_config.json").is_file():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="align-merged-") as folder:
        load_model(model, torch.device("cpu"), "auto").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def _weight_names(folder: str) -> set[str]:
    """The names in a local checkpoint; none where it isn't a folder with safetensors."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def _unshared(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights on the CPU, none in another's memory (tied embeddings), as a safetensors file wants them."""
    out: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        copy = tensor.detach().cpu().contiguous()
        out[name] = copy.clone() if copy.data_ptr() in seen else copy
        seen.add(copy.data_ptr())
    return out
