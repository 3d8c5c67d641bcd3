"""The hashes of words and of runs of words, for many texts at once.

The words are those of `align.core.text.words`: normalised, without symbols and punctuation, Chinese and kana one a
character. All hashes are the same in every process and on every machine.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from align.core.text import WORDS_BY_THEMSELVES, plain_ascii

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

PIECE = 1 << 17
"""Characters hashed together: the powers for so many lie in the processor's cache."""

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_RUN = 0xD6E8FEB86659FD93
_LAST_CODE = 0x10FFFF

_LETTERS = bytes(code if chr(code).isalnum() and code < 128 else 32 for code in range(256)).lower()
"""What `words` makes of each ASCII byte: letters in lower case and digits, blanks for all others."""


def _powers(base: int, count: int) -> U64:
    """1, base, base^2, … modulo 2^64."""
    found = np.empty(count, dtype=np.uint64)
    found[:1] = 1
    done = 1
    while done < count:
        step = min(done, count - done)
        found[done : done + step] = found[:step] * np.uint64(pow(base, done, 2**64))
        done += step
    return found


_UP = _powers(_BASE, PIECE)
_DOWN = _powers(_INVERSE, PIECE)


def word_hashes(texts: Sequence[str]) -> tuple[U64, I64]:
    """The hash of every word of some texts.

    A word's hash is the polynomial of its characters modulo 2^64, mixed. It is taken for all words of a piece at once:
    the sums of character times power from the piece's beginning, their differences between the words' ends and
    beginnings, and these moved back to power 0.

    Returns:
        the hashes, (words of all texts,), and where each text's begin, (texts + 1,); the last is the number of words.
    """
    parts: list[U64] = []
    counts: list[I64] = [np.zeros(1, dtype=np.int64)]
    first = size = 0
    for number, text in enumerate(texts, start=1):
        size += len(text)
        if size >= PIECE or number == len(texts):
            hashes, numbers = _hash_piece(texts[first:number])
            parts.append(hashes)
            counts.append(numbers)
            first, size = number, 0
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64), np.cumsum(np.concatenate(counts))


def _hash_piece(texts: Sequence[str]) -> tuple[U64, I64]:
    """The hashes of the words of some texts, and each text's number of words."""
    plain = [plain_ascii(text) for text in texts]
    if None not in plain:
        characters: Any = np.frombuffer(b" ".join([*filter(None, plain), b""]).translate(_LETTERS), dtype=np.uint8)
        lengths = [len(raw) + 1 if raw else 0 for raw in plain]
        inside = characters != 32
        starts = np.flatnonzero(inside & ~np.append(False, inside[:-1]))
        ends = np.flatnonzero(inside & ~np.append(inside[1:], False)) + 1
    else:
        folded = [
            unicodedata.normalize("NFKC", text).casefold() if raw is None else raw.decode().lower()
            for text, raw in zip(texts, plain, strict=True)
        ]
        characters = np.frombuffer(" ".join([*folded, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        lengths = [len(text) + 1 for text in folded]
        sorts = _sorts()[characters]
        runs, alone = sorts == 1, sorts == 2
        starts = np.flatnonzero(alone | (runs & ~np.append(False, runs[:-1])))
        ends = np.flatnonzero(alone | (runs & ~np.append(runs[1:], False))) + 1
    bounds = np.searchsorted(starts, np.append(0, np.cumsum(lengths)))
    return mixed(_polynomials(characters, starts, ends)), np.diff(bounds)


@cache
def _sorts() -> npt.NDArray[np.uint8]:
    """For every character of Unicode: 0 between words, 1 in a word, 2 a word by itself; as `words` has it."""
    sorts = np.fromiter((chr(code).isalnum() for code in range(_LAST_CODE + 1)), dtype=np.uint8, count=_LAST_CODE + 1)
    for low, high in WORDS_BY_THEMSELVES:
        sorts[low : high + 1] = 2
    return sorts


def _polynomials(characters: Any, starts: I64, ends: I64) -> U64:
    """The polynomial of each word's characters, every word's from power 0."""
    found = np.empty(len(starts), dtype=np.uint64)
    done = 0
    while done < len(starts):  # once, unless one long text makes the piece longer than PIECE
        begin = int(starts[done])
        until = max(done + 1, int(np.searchsorted(ends, begin + PIECE, side="right")))
        stretch = characters[begin : int(ends[until - 1])]
        is_long = len(stretch) > PIECE  # a single word
        up, down = (_powers(_BASE, len(stretch)), _powers(_INVERSE, len(stretch))) if is_long else (_UP, _DOWN)
        sums = np.empty(len(stretch) + 1, dtype=np.uint64)
        sums[0] = 0
        np.cumsum(up[: len(stretch)] * stretch, out=sums[1:])
        low, high = starts[done:until] - begin, ends[done:until] - begin
        found[done:until] = (sums[high] - sums[low]) * down[low]
        done = until
    return found


def mixed(hashes: U64) -> U64:
    """The hashes with every bit made to depend on all others."""
    spread = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    return spread ^ (spread >> np.uint64(29))


def run_hashes(hashes: U64, n: int) -> U64:
    """The hash of every run of `n` neighbours, (words - n + 1,); runs from one text into the next are among them.

    A polynomial of the words' hashes, which keeps their order. Runs are put together of runs of 1, 2, 4, … words.
    """
    count = max(0, len(hashes) - n + 1)
    total = np.zeros(count, dtype=np.uint64)
    power, width, place = hashes, 1, 0  # the hashes of all runs of `width` words
    while count and place < n:
        if n & width:
            total *= np.uint64(pow(_RUN, width, 2**64))
            total += power[place : place + count]
            place += width
        if place < n:
            power = power[:-width] * np.uint64(pow(_RUN, width, 2**64)) + power[width:]
            width *= 2
    return mixed(total)


def run_places(bounds: I64, n: int) -> tuple[I64, I64]:
    """Which of `run_hashes`' runs lie inside one text: their places, and the text of each.

    Args:
        bounds: where each text's words begin, (texts + 1,).
        n: words of a run.
    """
    counts = np.maximum(np.diff(bounds) - n + 1, 0)
    texts = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(texts)) - np.repeat(np.cumsum(counts) - counts, counts)
    return bounds[:-1][texts] + within, texts
