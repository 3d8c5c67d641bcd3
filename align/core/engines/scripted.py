"""An engine without a model: answers come from a function or a table. For tests, and for trying out a recipe."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import cast

from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.errors import EngineError
from align.core.records import Messages

Answer = str | Completion


class ScriptedEngine:
    """Answers as it was told to; the same call always gives the same completions.

    Args:
        answer: a function of (prompt, sample index); or a table from a prompt's text (the string itself, or the last
            message's content) to one answer or to answers by sample index; or answers by sample index, whatever the
            prompt. Answers by index start over where they run out. A `Completion` is passed on as it is: one with
            finish_reason error is a failed sample. What the function raises ends the call, as a dying engine would.
        ahead: prompts read ahead; those of one block come back last first, as from an engine that runs them together.
        generator: see `Engine`.
        fingerprint: see `Engine`; made from the answers, or from the function's name, by default.

    Attributes:
        calls: completions given so far.
    """

    def __init__(
        self,
        answer: Callable[[Prompt, int], Answer] | Mapping[str, Answer | Sequence[Answer]] | Sequence[Answer],
        *,
        ahead: int = 1,
        generator: str = "scripted",
        fingerprint: str | None = None,
    ) -> None:
        self._answer = answer
        self._ahead = ahead
        self._generator = generator
        if fingerprint is None:
            content = f"{answer.__module__}.{answer.__qualname__}" if hasattr(answer, "__qualname__") else repr(answer)
            fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._fingerprint = fingerprint
        self.calls = 0

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self._generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`."""
        return self._fingerprint

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. A token is a word with the space before it; its id is the word's CRC-32."""
        params.check(n)
        numbered = enumerate(prompts)
        while block := list(islice(numbered, self._ahead)):
            for number, prompt in reversed(block):
                for index in range(first_index, first_index + n):
                    self.calls += 1
                    yield number, index, self._complete(prompt, index, params)

    def close(self) -> None:
        """See `Engine`."""

    def _complete(self, prompt: Prompt, index: int, params: SamplingParams) -> Completion:
        if len(prompt) == 0:
            return Completion("", (), "error", error="the prompt is empty: it has no tokens")
        answer = self._look_up(prompt, index)
        if isinstance(answer, Completion):
            return answer
        stops = [at for at in (answer.find(stop) for stop in params.stop) if at >= 0]
        if stops:
            answer = answer[: min(stops)]
        words = re.findall(r"\s*\S+|\s+$", answer)
        kept = words[: params.max_tokens]
        return Completion(
            text="".join(kept),
            token_ids=tuple(zlib.crc32(word.encode()) for word in kept),
            finish_reason="stop" if len(kept) == len(words) else "length",
            logprobs=(0.0,) * len(kept) if params.logprobs else None,
        )

    def _look_up(self, prompt: Prompt, index: int) -> Answer:
        answers: Answer | Sequence[Answer]
        if callable(self._answer):
            return self._answer(prompt, index)
        if isinstance(self._answer, Mapping):
            text = _text(prompt)
            if text not in self._answer:
                raise EngineError(f"scripted engine: no answer for the prompt {text[:80]!r}; add it to the table")
            answers = self._answer[text]
        else:
            answers = self._answer
        if isinstance(answers, (str, Completion)):
            return answers
        return answers[index % len(answers)]


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt[0], dict):
        return cast(Messages, prompt)[-1]["content"]
    return " ".join(str(i) for i in prompt)
