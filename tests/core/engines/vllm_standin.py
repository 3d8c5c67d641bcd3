"""A small stand-in for the part of vLLM that the adapter uses: the real one needs a GPU and a torch of its own.

It samples letters from each request's seed, one token a step for every request that runs, and keeps a record of what
was asked of it. Its names and signatures are those of vLLM as far as the adapter uses them;
`test_what_the_adapter_uses_is_in_the_source_of_vllm` compares the adapter with the real source.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

VOCABULARY = 320
MAX_MODEL_LEN = 256


class VLLMValidationError(Exception):
    pass


class EngineDeadError(Exception):
    pass


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    json: str | None = None
    choice: list[str] | None = None


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False

    def __post_init__(self) -> None:
        assert self.seed is not None and 0 <= self.seed < 2**63
        assert self.output_kind is RequestOutputKind.FINAL_ONLY, "only what is finished was to come"
        assert self.detokenize or not self.stop
        if self.structured_outputs and self.structured_outputs.json == '{"type":"nonsense"}':
            raise VLLMValidationError("no grammar for this schema")


@dataclass
class Request:
    name: str
    prompt: list[int]
    params: SamplingParams
    ids: list[int] = field(default_factory=list)


class LLMEngine:
    """Runs `running` requests at a time; the others wait, as in vLLM's scheduler."""

    def __init__(self, model: str, running: int = 4) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.letters = self.tokenizer("abcdefgh ,.", add_special_tokens=False)["input_ids"]
        self.running = running
        self.requests: dict[str, Request] = {}
        self.seen: list[Request] = []
        self.most = 0
        self.aborted: list[str] = []
        self.finishes_with: str | None = None
        self.dies = False
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: VOCABULARY)
        self.engine_core = SimpleNamespace(shutdown=lambda: self.requests.clear())

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        if self.dies:
            raise EngineDeadError("EngineCore encountered an issue")
        assert request_id not in self.requests
        assert prompt["type"] == "token" and prompt["prompt_token_ids"]
        self.requests[request_id] = Request(request_id, prompt["prompt_token_ids"], params)
        self.seen.append(self.requests[request_id])
        self.most = max(self.most, len(self.requests))
        return request_id + "-internal"

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request in request_ids:
            self.requests.pop(request, None)

    def step(self) -> list[Any]:
        if self.dies:
            raise EngineDeadError("EngineCore encountered an issue")
        out = []
        for request in list(self.requests.values())[: self.running]:
            params = request.params
            draw = hashlib.blake2b(f"{params.seed}/{len(request.ids)}".encode(), digest_size=2).digest()
            token = params.stop_token_ids[0] if draw[0] < 16 else self.letters[draw[1] % len(self.letters)]
            request.ids.append(token)
            reason, stopped = self._ended(request)
            if reason:
                del self.requests[request.name]
                text = self._text(request) if params.detokenize else ""
                if isinstance(stopped, str):
                    text = text[: text.index(stopped)]
                logprobs = [{token: SimpleNamespace(logprob=-float(token))} for token in request.ids]
                completion = SimpleNamespace(
                    index=0, text=text, token_ids=list(request.ids), stop_reason=stopped, finish_reason=reason,
                    logprobs=logprobs if params.logprobs == 0 else None,
                )  # fmt: skip
                out.append(SimpleNamespace(request_id=request.name, outputs=[completion], finished=True))
        return out[::-1]

    def _ended(self, request: Request) -> tuple[str | None, int | str | None]:
        if self.finishes_with:
            return self.finishes_with, None
        if request.ids[-1] in request.params.stop_token_ids:
            return "stop", request.ids[-1]
        if request.params.stop:
            text = self._text(request)
            for stop in request.params.stop:
                if stop in text:
                    return "stop", stop
        return ("length", None) if len(request.ids) >= request.params.max_tokens else (None, None)

    def _text(self, request: Request) -> str:
        text: str = self.tokenizer.decode(request.ids, skip_special_tokens=True)
        return text


class LLM:
    """Keeps what it was made with, and what was asked of it beside sampling."""

    def __init__(self, model: str, **arguments: Any) -> None:
        if model.endswith("too-large"):
            raise ValueError("No available memory for the cache blocks.\nTry increasing gpu_memory_utilization")
        self.arguments = arguments
        self.model = model
        self.llm_engine = LLMEngine(model)
        self.calls: list[Any] = []
        self.reloaded: dict[str, Any] = {}

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        assert method == "reload_weights"
        self.reloaded = load_file(f"{kwargs['weights_path']}/model.safetensors")
        self.calls.append(method)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import vllm` find the stand-in."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind, "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.exceptions": {"VLLMValidationError": VLLMValidationError},
        "vllm.inputs": {"tokens_input": lambda ids: {"type": "token", "prompt_token_ids": ids}},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
