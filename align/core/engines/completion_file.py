"""Completions by key in one append-only file that any kill leaves readable.

A record is a head of 32 bytes and a body. The head: a mark, the body's size, the key (16 bytes), the body's CRC-32, its
own CRC-32. The body: finish reason, text, token ids, log-probabilities. Each record goes to the operating system in one
unbuffered write before its completion is passed on, so a killed process loses nothing that was finished. When it goes
to the disk is left to the operating system, so a power cut may lose what Linux holds back, the last half minute.

Opening reads the heads and no bodies. What a kill left of a last record is cut off. Damage before the last sound record
costs the damaged records and no others: reading goes on at the next mark with a sound head. A damaged body is noticed
when it is asked for, and counts as not there.

In memory are 8 bytes a record: some bits of the key and where the record lies; the key itself is compared in the file.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
import zlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from align.core.engines.base import Completion
from align.core.errors import RunError

_MAGIC = b"align completions 2\n"
_ANY_FORMAT = b"align completions "
_MARK = b"\xffREC"  # no text has the byte ff: UTF-8 doesn't use it
_HEAD = struct.Struct("<4sI16sII")  # mark, bytes of the body, key, CRC-32 of the body, CRC-32 of all before it
_KEY = slice(8, 24)
_BODY = struct.Struct("<BIIB")  # finish reason, bytes of the text, number of ids, whether log-probabilities follow
_TOLD = struct.Struct("<4sII16xI5xIx")  # of a head and its body: mark, size, first of the key, own CRC-32, ids
_REASONS: tuple[Literal["stop"], Literal["length"]] = ("stop", "length")
_READ = 1 << 20
_FIRST_READ = 4096
"""Bytes read for one record at first: most are whole in it, a longer one takes a second read."""


class CompletionFile:
    """Completions by key on disk; see the head of this file for its form.

    Args:
        path: the file; made with its folder where it is missing.

    Attributes:
        damaged: records found damaged so far; they count as not there.

    Raises:
        RunError: another process writes the file, it is no such file, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _open_here.add(self)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{path}: another process is sampling into it; wait for it, or use another run"
                ) from None
            self._index = _Index()
            self._end = self._open()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: bytes) -> Completion | None:
        """The completion kept under a key; None where there is none, or what there was is damaged."""
        for offset in self._index.find(key):
            record = os.pread(self._descriptor, _FIRST_READ, offset)
            if record[_KEY] != key or len(record) < _HEAD.size:
                continue  # another key with the same first bits
            _, size, _, check, _ = _HEAD.unpack_from(record)
            missing = _HEAD.size + size - len(record)
            if missing > 0:
                record += os.pread(self._descriptor, missing, offset + len(record))
            body = record[_HEAD.size : _HEAD.size + size]
            if zlib.crc32(body) == check:
                return _unpacked(body)
            self.damaged += 1
            self._index.remove(key, offset)
        return None

    def put(self, key: bytes, completion: Completion) -> None:
        """Keeps a completion; it survives this process from here on.

        Raises:
            RunError: it can't be written, as on a full disk. What was kept before stays.
        """
        body = _packed(completion)
        head = _HEAD.pack(_MARK, len(body), key, zlib.crc32(body), 0)[:-4]
        record = head + zlib.crc32(head).to_bytes(4, "little") + body
        try:
            written = os.write(self._descriptor, record)
            while written < len(record):
                written += os.write(self._descriptor, record[written:])
        except OSError as problem:
            os.ftruncate(self._descriptor, self._end)
            raise RunError(
                f"{self.path}: can't be written: {problem}; what was sampled so far is kept: make room and run again"
            ) from problem
        self._index.add(key, self._end)
        self._end += len(record)

    def close(self) -> None:
        """Lets go of the file, which stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self) -> int:
        """Reads the heads; cuts off what a kill left of a last record. Returns where the next record goes."""
        begin = os.pread(self._descriptor, len(_MAGIC), 0)
        if begin != _MAGIC:
            if begin.startswith(_ANY_FORMAT) and len(begin) == len(_MAGIC):
                raise RunError(
                    f"{self.path}: holds completions in the form of another version of align; go on with that version, "
                    "or remove the file to have them sampled again"
                )
            if not _MAGIC.startswith(begin):
                raise RunError(f"{self.path}: it is no completion cache; move it away, or give another path")
            os.ftruncate(self._descriptor, 0)  # killed before its first line was whole
            os.write(self._descriptor, _MAGIC)
            return len(_MAGIC)
        end = len(_MAGIC)
        lists = self._index.lists
        for offset, after, key, _ in _records(self._descriptor):
            if offset > end:
                self.damaged += 1  # something that is no record lies before this one
            lists[key >> 20].append((key & 0xFFFFF) << 44 | offset)
            end = after
        self._index.sort()
        if end < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, end)
        return end


_open_here: weakref.WeakSet[CompletionFile] = weakref.WeakSet()


def _close_in_child() -> None:
    for file in _open_here:
        file.close()


# A forked process holds the same lock and could outlive this one: it lets go of it at once.
os.register_at_fork(after_in_child=_close_in_child)


def kept_in(path: Path) -> tuple[int, int]:
    """How many completions a file holds, and their tokens together. Also while another process writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        if os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
            return 0, 0
        completions = tokens = 0
        for _, _, _, more in _records(descriptor):
            completions += 1
            tokens += more
        return completions, tokens
    finally:
        os.close(descriptor)


def _records(descriptor: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the records with a sound head that lie whole in the file, passing over what is none; reads no body.

    Returns:
        Where it begins and ends, the first 4 bytes of the key as a number, and the number of tokens.
    """
    size = os.fstat(descriptor).st_size
    place = begin = len(_MAGIC)  # begin: where the bytes in memory lie in the file
    held = b""
    unpack, checksum, head, least = _TOLD.unpack_from, zlib.crc32, _HEAD.size, _TOLD.size
    while place + least <= size:
        at = place - begin
        if at + least > len(held):
            held, begin, at = os.pread(descriptor, _READ, place), place, 0
            if len(held) < least:
                return  # it was cut shorter meanwhile
        mark, length, key, check, tokens = unpack(held, at)
        end = place + head + length
        if mark == _MARK and end <= size and checksum(held[at : at + head - 4]) == check:
            yield place, end, key, tokens
            place = end
        else:
            place = _next_mark(descriptor, place + 1, size)


def _next_mark(descriptor: int, place: int, size: int) -> int:
    """Where the next mark lies; the file's size where there is none."""
    while place < size:
        held = os.pread(descriptor, _READ, place)
        if (at := held.find(_MARK)) >= 0:
            return place + at
        place += max(1, len(held) - len(_MARK) + 1)  # a mark may lie across the end of what was read
    return size


class _Index:
    """Where records lie, by key: sorted lists of 20 bits of the key and 44 bits of offset, by 12 other bits of the key.

    Of two records with one key the later one counts.

    Attributes:
        lists: who adds to them directly calls `sort` when done.
    """

    def __init__(self) -> None:
        self.lists = [array("Q") for _ in range(1 << 12)]

    def __len__(self) -> int:
        return sum(map(len, self.lists))

    def find(self, key: bytes) -> list[int]:
        """Offsets of the records that may have this key, the latest first."""
        entries, tag = self._place(key)
        found = []
        for place in range(bisect_left(entries, tag), len(entries)):
            if entries[place] >> 44 != tag >> 44:
                break
            found.append(entries[place] & _OFFSET)
        return found[::-1]

    def add(self, key: bytes, offset: int) -> None:
        """Takes a record in."""
        entries, tag = self._place(key)
        insort(entries, tag | offset)

    def sort(self) -> None:
        """Puts the lists in order."""
        for place, entries in enumerate(self.lists):
            self.lists[place] = array("Q", sorted(entries))

    def remove(self, key: bytes, offset: int) -> None:
        """Forgets a record."""
        entries, tag = self._place(key)
        del entries[bisect_left(entries, tag | offset)]

    def _place(self, key: bytes) -> tuple[array[int], int]:
        bits = int.from_bytes(key[:4], "little")
        return self.lists[bits >> 20], (bits & 0xFFFFF) << 44


_OFFSET = (1 << 44) - 1


@lru_cache(maxsize=4096)
def _numbers(form: str, count: int) -> struct.Struct:
    """So many numbers of one form; made once for each length, which makes it the quickest way."""
    return struct.Struct(f"<{count}{form}")


def _packed(completion: Completion) -> bytes:
    text, ids, logprobs = completion.text.encode(errors="surrogatepass"), completion.token_ids, completion.logprobs
    reason = 0 if completion.finish_reason == "stop" else 1
    head = _BODY.pack(reason, len(text), len(ids), logprobs is not None)
    tail = _numbers("d", len(logprobs)).pack(*logprobs) if logprobs else b""
    return head + text + _numbers("I", len(ids)).pack(*ids) + tail


def _unpacked(body: bytes) -> Completion:
    reason, text_size, count, has_logprobs = _BODY.unpack_from(body)
    ids_at = _BODY.size + text_size
    ids = _numbers("I", count).unpack_from(body, ids_at)
    logprobs_at = ids_at + 4 * count
    logprobs = _numbers("d", (len(body) - logprobs_at) // 8).unpack_from(body, logprobs_at) if has_logprobs else None
    return Completion(body[_BODY.size : ids_at].decode(errors="surrogatepass"), ids, _REASONS[reason], logprobs)
