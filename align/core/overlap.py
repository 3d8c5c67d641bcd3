"""How texts overlap: the hashes of their words and of runs of words, an index of test items, common subsequences.

For decontamination (the Qwen2 report, arXiv:2407.10671, 5.2.6) and near-duplicates. Texts are cut into words as
`align.core.text.words` does it: normalised, without symbols and punctuation, Chinese and kana one token a character.
All hashes are the same in every process and on every machine.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from align.core.text import WORDS_BY_THEMSELVES, plain_ascii, words

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

PIECE = 1 << 17
"""Characters hashed together: the powers for so many lie in the processor's cache."""

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_RUN = 0xD6E8FEB86659FD93
_FEWEST_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 25
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


@dataclass(frozen=True, slots=True)
class Hits:
    """Runs of words that texts share with items of an index; four arrays of one length.

    Attributes:
        texts: number of the text.
        places: where the run begins in it, in words.
        items: number of the item.
        item_places: where the run begins there.
    """

    texts: I64
    places: I64
    items: I64
    item_places: I64

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class Overlap:
    """A text that has much of an item in it.

    Attributes:
        text: its number.
        item: the item's number.
        common: words of their longest common subsequence.
        text_words: the text's length in words.
        item_words: the item's.
        place: where the run that they share begins in the text, in words.
        item_place: where it begins in the item.
    """

    text: int
    item: int
    common: int
    text_words: int
    item_words: int
    place: int
    item_place: int

    @property
    def share(self) -> float:
        """The subsequence's share of the shorter one's words."""
        return self.common / min(self.text_words, self.item_words)


class Index:
    """The runs of `n` words of some items (test sets), to be looked for in any amount of text.

    Args:
        items: the items' texts.
        n: words of a run.

    Attributes:
        lengths: words of each item, (items,).
        codes: every item as a text of one character a word, the most frequent words first in Unicode's order; so
            rapidfuzz compares them quickly.
    """

    def __init__(self, items: Sequence[str], n: int) -> None:
        self.n = n
        split = [words(item) for item in items]
        self.lengths = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
        ranks = Counter(word for found in split for word in found).most_common()
        self._code = {word: chr(min(rank, _LAST_CODE)) for rank, (word, _) in enumerate(ranks, start=1)}
        self.codes = [self.coded(found) for found in split]
        hashes, bounds = word_hashes(items)
        places, owners = run_places(bounds, n)
        runs = run_hashes(hashes, n)[places] if len(places) else np.zeros(0, dtype=np.uint64)
        order = np.argsort(runs, kind="stable")
        self._runs, self._owners = runs[order], owners[order]
        self._places = (places - bounds[:-1][owners])[order]
        slots = _FEWEST_SLOTS
        while slots < min(16 * len(runs), _MOST_SLOTS):
            slots *= 2
        self._mask = np.uint64(slots - 1)
        self._seen = np.zeros(slots, dtype=np.bool_)
        self._seen[(runs & self._mask).astype(np.int64)] = True

    def coded(self, found: Iterable[str]) -> str:
        """Words as one character each; words that no item has are all the same one, which no item has."""
        return "".join([self._code.get(word, "\0") for word in found])

    def hits(self, texts: Sequence[str]) -> Hits:
        """The runs that texts share with items, in the texts' order."""
        blocks: list[Hits] = []
        first = size = 0
        for number, text in enumerate(texts, start=1):
            size += len(text)
            if size >= PIECE or number == len(texts):  # so much at a time stays in the processor's cache
                blocks.append(self._hits(texts[first:number], first))
                first, size = number, 0
        columns = zip(*((b.texts, b.places, b.items, b.item_places) for b in blocks), strict=True)
        return Hits(*map(np.concatenate, columns)) if blocks else Hits(*([np.zeros(0, dtype=np.int64)] * 4))

    def _hits(self, texts: Sequence[str], first: int) -> Hits:
        """The same of some texts, the first of which has the number `first`."""
        hashes, bounds = word_hashes(texts)
        runs = run_hashes(hashes, self.n)
        maybe = np.flatnonzero(self._seen[(runs & self._mask).view(np.int64)])
        left = np.searchsorted(self._runs, runs[maybe], side="left")
        right = np.searchsorted(self._runs, runs[maybe], side="right")
        owner = np.searchsorted(bounds, maybe, side="right") - 1
        is_hit = (right > left) & (maybe + self.n <= bounds[owner + 1])
        maybe, left, right, owner = maybe[is_hit], left[is_hit], right[is_hit], owner[is_hit]
        counts = right - left
        which = np.repeat(np.arange(len(maybe)), counts)
        at = left[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Hits(owner[which] + first, (maybe - bounds[owner])[which], self._owners[at], self._places[at])

    def overlaps(self, texts: Sequence[str], least: int, share: float) -> list[Overlap]:
        """The pairs of a text and an item whose longest common subsequence is long enough, by text, then by item.

        The longest common subsequence of a long text and a short item says little: among 8,000 words nearly any 22
        have 13 in order. So only pairs that share a run of `n` words are compared, and of a text longer than twice the
        item only the stretch around the run: where the item would lie, and half its length before and behind.

        Args:
            texts: training texts.
            least: words of the subsequence, at least.
            share: of the shorter one's words, at least.
        """
        hits = self.hits(texts)
        if not len(hits):
            return []
        coded = {number: self.coded(words(texts[number])) for number in np.unique(hits.texts).tolist()}
        size = np.zeros(len(texts), dtype=np.int64)
        for number, code in coded.items():
            size[number] = len(code)
        lengths = self.lengths[hits.items]
        room = lengths // 2
        start = hits.places - hits.item_places  # where the item would begin in the text
        is_short = size[hits.texts] <= 2 * lengths
        stretch = np.where(is_short, 0, start // np.maximum(room // 2, 1))
        _, each = np.unique(np.stack([hits.texts, hits.items, stretch]), axis=1, return_index=True)
        each = each[np.minimum(size[hits.texts], lengths)[each] >= least]
        begin = np.where(is_short, 0, np.maximum(start - room, 0))[each].tolist()
        end = np.where(is_short, size[hits.texts], start + lengths + room)[each].tolist()
        numbers = list(zip(hits.texts[each].tolist(), hits.items[each].tolist(), strict=True))
        parts = [coded[text][a:b] for (text, _), a, b in zip(numbers, begin, end, strict=True)]
        common = common_lengths(parts, [self.codes[item] for _, item in numbers]).tolist()
        found: dict[tuple[int, int], Overlap] = {}
        for at, (text, item), length in zip(each.tolist(), numbers, common, strict=True):
            shorter = min(int(size[text]), int(self.lengths[item]))
            known = found.get((text, item))
            if length < least or length < share * shorter - 1e-9 or (known and known.common >= length):
                continue
            place, there = int(hits.places[at]), int(hits.item_places[at])
            found[text, item] = Overlap(text, item, length, int(size[text]), int(self.lengths[item]), place, there)
        return [found[key] for key in sorted(found)]


def common_lengths(ones: Sequence[str], others: Sequence[str]) -> npt.NDArray[np.uint32]:
    """The length of the longest common subsequence of each pair, in characters; see `Index.codes`."""
    from rapidfuzz.distance import LCSseq
    from rapidfuzz.process import cpdist

    if not ones:
        return np.zeros(0, dtype=np.uint32)
    found: npt.NDArray[np.uint32] = cpdist(ones, others, scorer=LCSseq.similarity, dtype=np.uint32)
    return found
