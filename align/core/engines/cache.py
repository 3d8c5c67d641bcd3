"""The completion cache: what was sampled once is never sampled again, whenever the process dies.

One append-only file. A record is its length, a CRC-32, a 16-byte key (hash of the engine's fingerprint, the prompt's
content, the sampling parameters and the sample's index) and the completion. Each is handed to the operating system
in one unbuffered write before it is given on, so a killed process loses nothing that was finished; fsync comes only
at the end, so a power cut may lose the last seconds. A record cut short by a kill is cut off when the file is opened.
In memory: the keys and where their records lie, about 200 bytes a completion, never the texts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.order import in_order
from align.core.errors import RunError

__all__ = ["CachedEngine", "CompletionFile", "in_order"]

_MAGIC = b"align completions 1\n"
_FRAME = struct.Struct("<II16s")  # bytes of the body, CRC-32 of key and body, key
_BODY = struct.Struct("<BIIB")  # finish reason, bytes of the text, number of ids, whether log-probabilities follow
_REASONS: tuple[Literal["stop"], Literal["length"]] = ("stop", "length")
_AHEAD = 4096


class CachedEngine:
    """Another engine, behind a file of the completions that it gave before. Failed samples are never kept.

    Args:
        engine: what samples where the file has nothing.
        path: the file; made with its folder where it is missing.

    Attributes:
        hits: completions taken from the file.
        misses: completions asked of the engine.

    Raises:
        RunError: another process uses the file, or it is no completion cache.
    """

    def __init__(self, engine: Engine, path: str | Path) -> None:
        self.engine = engine
        self.file = CompletionFile(Path(path))
        self.hits = 0
        self.misses = 0

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
        """See `Engine`."""
        numbered = enumerate(prompts)
        scope = hashlib.blake2b(digest_size=16)
        scope.update(json.dumps([self.engine.fingerprint, asdict(params)], sort_keys=True).encode())
        found: deque[tuple[int, int, Completion]] = deque()
        # Prompts that lack only some samples, by the run of indices that they lack: (first index, how many).
        partly: dict[tuple[int, int], list[tuple[int, bytes, Prompt]]] = {}
        asked: dict[int, tuple[int, bytes, int]] = {}  # by its number in the call: number, digest, samples to come
        exhausted = False

        def feed() -> Iterator[Prompt]:
            """Prompts that lack all n samples. Ends early when much else has gathered, so that memory is bounded."""
            nonlocal exhausted
            count = 0
            while len(found) < _AHEAD and sum(map(len, partly.values())) < _AHEAD:
                try:
                    number, prompt = next(numbered)
                except StopIteration:
                    exhausted = True
                    return
                digest = _digest(scope, prompt)
                lacking: list[int] = []
                for index in range(first_index, first_index + n):
                    known = self.file.get(_key(digest, index))
                    if known is None:
                        lacking.append(index)
                    else:
                        self.hits += 1
                        found.append((number, index, known))
                if len(lacking) == n:
                    asked[count] = (number, digest, n)
                    count += 1
                    yield prompt
                else:
                    for run in _runs(lacking):
                        partly.setdefault(run, []).append((number, digest, prompt))

        while not exhausted:
            for result in self._ask(feed(), asked, n, params, first_index):
                yield result
                while found:
                    yield found.popleft()
            while found:
                yield found.popleft()
            for (first, length), group in partly.items():
                asked = {i: (number, digest, length) for i, (number, digest, _) in enumerate(group)}
                yield from self._ask((prompt for _, _, prompt in group), asked, length, params, first)
            partly.clear()
            asked = {}

    def drop(self) -> None:
        """Removes the file: the step is done and its result is elsewhere. The engine stays open."""
        self.file.close()
        self.file.path.unlink(missing_ok=True)

    def close(self) -> None:
        """See `Engine`. The file is flushed to the disk, and stays."""
        self.file.close()
        self.engine.close()

    def _ask(
        self,
        prompts: Iterable[Prompt],
        asked: dict[int, tuple[int, bytes, int]],
        n: int,
        params: SamplingParams,
        first_index: int,
    ) -> Iterator[tuple[int, int, Completion]]:
        """Samples from the engine; keeps each completion before giving it on."""
        for place, index, completion in self.engine.sample(prompts, n, params, first_index):
            number, digest, to_come = asked[place]
            if to_come == 1:
                del asked[place]
            else:
                asked[place] = (number, digest, to_come - 1)
            self.misses += 1
            if completion.finish_reason != "error":
                self.file.put(_key(digest, index), completion)
            yield number, index, completion


class CompletionFile:
    """Completions by key on disk; see the head of this file for its form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{path}: another process is sampling into it; wait for it, or use another run"
                ) from None
            self._offsets: dict[bytes, int] = {}
            self._end = self._open()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: bytes) -> Completion | None:
        """The completion kept under a key."""
        offset = self._offsets.get(key)
        if offset is None:
            return None
        frame = os.pread(self._descriptor, _FRAME.size, offset)
        size, check, _ = _FRAME.unpack(frame)
        body = os.pread(self._descriptor, size, offset + _FRAME.size)
        if zlib.crc32(key + body) != check:
            raise RunError(f"{self.path}: a record at byte {offset} has changed on disk; remove the file and run again")
        return _unpacked(body)

    def put(self, key: bytes, completion: Completion) -> None:
        """Keeps a completion; it survives this process from here on."""
        body = _packed(completion)
        record = memoryview(_FRAME.pack(len(body), zlib.crc32(key + body), key) + body)
        try:
            written = os.write(self._descriptor, record)
            while written < len(record):
                written += os.write(self._descriptor, record[written:])
        except OSError as problem:
            os.ftruncate(self._descriptor, self._end)
            raise RunError(f"{self.path}: can't be written: {problem}; make room and run again") from problem
        self._offsets[key] = self._end
        self._end += len(record)

    def close(self) -> None:
        """Flushes to the disk and lets go of the file."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        """Reads the keys; cuts off what a kill left of a last record. Returns where the next record goes."""
        size = os.fstat(self._descriptor).st_size
        with open(self._descriptor, "rb", buffering=1 << 20, closefd=False) as file:
            head = file.read(len(_MAGIC))
            if head != _MAGIC:
                if not _MAGIC.startswith(head):
                    raise RunError(f"{self.path}: it is no completion cache; move it away, or give another path")
                os.ftruncate(self._descriptor, 0)
                os.write(self._descriptor, _MAGIC)
                return len(_MAGIC)
            end = len(_MAGIC)
            while len(frame := file.read(_FRAME.size)) == _FRAME.size:
                length, check, key = _FRAME.unpack(frame)
                if end + _FRAME.size + length > size:
                    break
                if zlib.crc32(file.read(length), zlib.crc32(key)) != check:
                    break
                self._offsets[key] = end
                end += _FRAME.size + length
        if end < size:
            os.ftruncate(self._descriptor, end)
        return end


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


def _packed(completion: Completion) -> bytes:
    text = completion.text.encode(errors="surrogatepass")
    ids = array("I", completion.token_ids)
    logprobs = array("d", completion.logprobs or ())
    reason = 0 if completion.finish_reason == "stop" else 1
    head = _BODY.pack(reason, len(text), len(ids), completion.logprobs is not None)
    return head + text + ids.tobytes() + logprobs.tobytes()


def _unpacked(body: bytes) -> Completion:
    reason, text_size, count, has_logprobs = _BODY.unpack_from(body)
    ids_at = _BODY.size + text_size
    ids, logprobs = array("I"), array("d")
    ids.frombytes(body[ids_at : ids_at + 4 * count])
    logprobs.frombytes(body[ids_at + 4 * count :])
    text = body[_BODY.size : ids_at].decode(errors="surrogatepass")
    return Completion(text, tuple(ids), _REASONS[reason], tuple(logprobs) if has_logprobs else None)
