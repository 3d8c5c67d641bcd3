"""What every engine promises: one call that samples, whatever runs the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
        stop: texts that end a completion (not part of it); the model's own end-of-turn token always does.
        seed: with the prompt and the sample's index it decides a sample's randomness, whatever else is in the batch.
        logprobs: also give the log-probability of each sampled token under the sampling model at temperature 1.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: decoded without special tokens.
        token_ids: the sampled ids, the end token included where it was sampled.
        finish_reason: stop (end token or stop text), length (max_tokens reached), error (nothing came back).
        logprobs: one per token id, nats, when asked for.
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
        `prompts` is read lazily, a bounded number ahead. A failed sample is a completion with finish_reason error.

        Raises:
            EngineError: the engine can't go on at all.
        """
        ...

    def close(self) -> None:
        """Frees the model's memory; the engine can't be used after it."""
        ...
