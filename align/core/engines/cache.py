"""The completion cache: what was sampled once is never sampled again, whenever the process dies.

The key of a completion is a hash of the engine's fingerprint, the prompt's content, the sampling parameters and the
sample's index. Each is kept (see `completion_file`) before it is given on. Failed samples are never kept.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.completion_file import CompletionFile
from align.core.engines.order import in_order

__all__ = ["CachedEngine", "in_order"]

_AHEAD = 4096


class CachedEngine:
    """Another engine, behind a file of the completions that it gave before.

    Args:
        engine: what samples where the file has nothing.
        path: the file; made with its folder where it is missing.

    Attributes:
        hits: completions given from the file.
        misses: completions asked of the engine and given, failed ones among them.
        failures: completions that the engine failed to sample.
        tokens: of all completions given.
        sampled_tokens: of those asked of the engine.

    Raises:
        RunError: another process uses the file, or it is no completion cache.
    """

    def __init__(self, engine: Engine, path: str | Path) -> None:
        self.engine = engine
        self.file = CompletionFile(Path(path))
        self.hits = self.misses = self.failures = self.tokens = self.sampled_tokens = 0

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
        """See `Engine`. What is known of the first prompts comes before the engine is asked for anything."""
        numbered = enumerate(prompts)
        scope = hashlib.blake2b(digest_size=16)
        scope.update(json.dumps([self.engine.fingerprint, asdict(params)], sort_keys=True).encode())
        found: deque[tuple[int, int, Completion]] = deque()
        # Prompts that lack only some samples, by the run of indices that they lack: (first index, how many).
        partly: dict[tuple[int, int], list[tuple[int, list[bytes], Prompt]]] = {}
        # By its number in the call: a prompt's own number, the keys of its samples, and how many are to come.
        asked: dict[int, tuple[int, list[bytes], int]] = {}
        held = 0  # prompts in `partly`
        exhausted = False

        def next_unknown() -> tuple[int, list[bytes], Prompt] | None:
            """Looks the next prompt up. Gives it back where it lacks all n samples, else keeps what is known of it."""
            nonlocal exhausted, held
            if (read := next(numbered, None)) is None:
                exhausted = True
                return None
            number, prompt = read
            digest = _digest(scope, prompt)
            keys = [_key(digest, index) for index in range(first_index, first_index + n)]
            lacking: list[int] = []
            for index, key in enumerate(keys, start=first_index):
                known = self.file.get(key)
                if known is None:
                    lacking.append(index)
                else:
                    found.append((number, index, known))
            if len(lacking) == n:
                return number, keys, prompt
            held += bool(lacking)
            for first, length in _runs(lacking):
                own = keys[first - first_index :][:length]
                partly.setdefault((first, length), []).append((number, own, prompt))
            return None

        def feed(unknown: tuple[int, list[bytes], Prompt] | None) -> Iterator[Prompt]:
            """Prompts that lack all n samples. Ends early when much else has gathered, so that memory is bounded."""
            count = 0
            while True:
                if unknown is not None:
                    number, keys, prompt = unknown
                    asked[count] = (number, keys, n)
                    count += 1
                    yield prompt
                if exhausted or len(found) >= _AHEAD or held >= _AHEAD:
                    return
                unknown = next_unknown()

        while not exhausted:
            unknown = None
            while unknown is None and not exhausted and held < _AHEAD:
                unknown = next_unknown()
                yield from self._given(found)
            if unknown is not None:
                yield from self._ask(feed(unknown), asked, found, n, params, first_index)
                yield from self._given(found)
            for (first, length), group in partly.items():
                asked = {i: (number, keys, length) for i, (number, keys, _) in enumerate(group)}
                yield from self._ask((prompt for _, _, prompt in group), asked, found, length, params, first)
            partly.clear()
            asked, held = {}, 0

    def sample_anew(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. Past the file, which knows no weights that change; counted as what goes through it."""
        for number, index, completion in self.engine.sample(prompts, n, params, first_index):
            self._count(completion)
            yield number, index, completion

    def close(self) -> None:
        """See `Engine`. The file stays."""
        self.file.close()
        self.engine.close()

    def _given(self, found: deque[tuple[int, int, Completion]]) -> Iterator[tuple[int, int, Completion]]:
        """Gives on what was found in the file. It is counted only now, so that counts go with what a stage has seen."""
        while found:
            result = found.popleft()
            self.hits += 1
            self.tokens += len(result[2].token_ids)
            yield result

    def _ask(
        self,
        prompts: Iterable[Prompt],
        asked: dict[int, tuple[int, list[bytes], int]],
        found: deque[tuple[int, int, Completion]],
        n: int,
        params: SamplingParams,
        first_index: int,
    ) -> Iterator[tuple[int, int, Completion]]:
        """Samples from the engine; keeps each completion before giving it on, after all that was found meanwhile."""
        for place, index, completion in self.engine.sample(prompts, n, params, first_index):
            number, keys, to_come = asked[place]
            if to_come == 1:
                del asked[place]
            else:
                asked[place] = (number, keys, to_come - 1)
            if completion.finish_reason != "error":
                self.file.put(keys[index - first_index], completion)
            if found:
                yield from self._given(found)
            self._count(completion)
            yield number, index, completion

    def _count(self, completion: Completion) -> None:
        """Of one that the engine was asked for."""
        self.failures += completion.finish_reason == "error"
        self.misses += 1
        self.tokens += len(completion.token_ids)
        self.sampled_tokens += len(completion.token_ids)


def _digest(scope: hashlib.blake2b, prompt: Prompt) -> bytes:
    """Hash of a prompt's content within a call's scope (engine and parameters)."""
    hasher = scope.copy()
    if isinstance(prompt, str):
        hasher.update(b"text" + prompt.encode(errors="surrogatepass"))
    elif len(prompt) and isinstance(prompt[0], dict):
        hasher.update(b"chat" + json.dumps(prompt, sort_keys=True, ensure_ascii=True).encode())
    else:
        hasher.update(b"ids " + array("q", cast("Sequence[int]", prompt)).tobytes())
    return hasher.digest()


def _key(digest: bytes, index: int) -> bytes:
    return hashlib.blake2b(digest + index.to_bytes(8, "little"), digest_size=16).digest()


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring indices as (first, how many): [1, 2, 5] is [(1, 2), (5, 1)]."""
    out: list[tuple[int, int]] = []
    for index in indices:
        if out and index == sum(out[-1]):
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((index, 1))
    return out
