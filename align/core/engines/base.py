"""What every engine promises: one call that samples, whatever runs the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from align.core.errors import EngineError
from align.core.records import Messages

Prompt = Messages | str | Sequence[int]
"""Messages are rendered with the model's own chat template (generation prompt added); a string is raw text, tokenised
as it is, no template and no special tokens added; a sequence of integers is token ids, used as they are."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; part of the key under which a completion is cached.

    Attributes:
        max_tokens: most new tokens of a completion.
        temperature: 0 is greedy.
        top_p: nucleus; 1 is off.
        top_k: 0 is off.
        min_p: tokens less likely than this share of the likeliest one's probability are left out; 0 is off
            (arXiv:2407.01082).
        repetition_penalty: the logits of tokens that the prompt or the completion has already are divided by it where
            positive and multiplied where negative; 1 is off (arXiv:1909.05858).
        stop: texts that end a completion (not part of it); the model's own end-of-turn token always does.
        stop_token_ids: further tokens that end a completion, like the model's own.
        seed: with the prompt and the sample's index it decides a sample's randomness, whatever else is in the batch.
        logprobs: also give the log-probability of each sampled token under the sampling model at temperature 1,
            before penalties and before any token is left out.
        json_schema: a JSON schema, as JSON text; the completion is a JSON document that fits it, unless max_tokens cuts
            it off. "{}" is any JSON.
        choices: the completion is one of these texts, none of them empty; not together with `json_schema`.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: bool = False
    json_schema: str | None = None
    choices: tuple[str, ...] = ()

    def check(self, n: int = 1) -> None:
        """Refuses what no engine can do; every engine calls it before it samples `n` completions a prompt.

        Raises:
            EngineError: a value is out of its range; all such values are named.
        """
        ranges = {
            "n": (n, n >= 1, "1 or more"),
            "max_tokens": (self.max_tokens, self.max_tokens >= 1, "1 or more"),
            "temperature": (self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "top_k": (self.top_k, self.top_k >= 0, "0 (off) or more"),
            "min_p": (self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
            "repetition_penalty": (self.repetition_penalty, self.repetition_penalty > 0, "above 0; 1 is off"),
            "stop_token_ids": (self.stop_token_ids, min(self.stop_token_ids, default=0) >= 0, "token ids of 0 or more"),
            "choices": (self.choices, all(self.choices), "texts that are not empty"),
        }
        wrong = [f"{name}: found {value}, expected {want}" for name, (value, good, want) in ranges.items() if not good]
        if self.json_schema is not None:
            try:
                schema = json.loads(self.json_schema)
            except ValueError as problem:
                wrong.append(f"json_schema: it is no JSON ({problem})")
            else:
                if not isinstance(schema, dict):
                    wrong.append(f"json_schema: found {type(schema).__name__}, expected a JSON object")
            if self.choices:
                wrong.append("json_schema and choices: only one of them can be met; leave one out")
        if wrong:
            raise EngineError("sampling parameters: " + "; ".join(wrong))


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: decoded without special tokens.
        token_ids: the sampled ids, the end token included where it was sampled; empty where the engine can't know them
            (a server that doesn't tell: `gives_token_ids` of that engine is False).
        finish_reason: stop (end token or stop text), length (max_tokens reached), error (nothing came back).
        logprobs: one per sampled token, nats, when asked for.
        error: why, when finish_reason is error.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"]
    logprobs: tuple[float, ...] | None = None
    error: str = ""


class Engine(Protocol):
    """Samples completions from one model."""

    @property
    def generator(self) -> str:
        """A short name for people, written with every row: the model's name or the step that made it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same call might give other completions (weights, tokenizer, template)."""
        ...

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields `(prompt number, sample index, completion)` as completions finish, in any order.

        Sample indices run from `first_index` to `first_index + n - 1`; each (prompt, index) comes exactly once.
        `prompts` is read lazily, a bounded number ahead, and only by the thread that asks for completions. A failed
        sample is a completion with finish_reason error.

        Raises:
            EngineError: the engine can't go on at all.
        """
        ...

    def close(self) -> None:
        """Frees the model's memory; the engine can't be used after it."""
        ...
