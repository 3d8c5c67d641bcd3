"""How texts overlap: an index of test items, the runs of words that texts share with them, common subsequences.

For decontamination (the Qwen2 report, arXiv:2407.10671, 5.2.6). Texts are cut into words as `align.core.text.words`
does it: normalised, without symbols and punctuation, Chinese and kana one token a character.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from align.core.text import words
from align.core.word_hashes import I64, PIECE, run_hashes, run_places, word_hashes

_OTHERS = np.uint64(32)
_FEWEST_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 25
_LAST_CODE = 0x10FFFF


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
        bytes_: the same with one byte a word, which several words share; compared four times as quickly, and never
            with less in common than there is.
    """

    def __init__(self, items: Sequence[str], n: int) -> None:
        self.n = n
        split = [words(item) for item in items]
        self.lengths = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
        ranks = Counter(word for found in split for word in found).most_common()
        self._code = {word: chr(min(rank, _LAST_CODE)) for rank, (word, _) in enumerate(ranks, start=1)}
        self._byte = {ord(code): 1 + (ord(code) - 1) % 255 for code in self._code.values()}
        self.codes = [self.coded(found) for found in split]
        self.bytes_ = [code.translate(self._byte) for code in self.codes]
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
        self._seen[(runs & self._mask).view(np.int64)] = True
        self._seen_too = np.zeros(slots, dtype=np.bool_)  # by other bits of the hash
        self._seen_too[(runs >> _OTHERS & self._mask).view(np.int64)] = True

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
        maybe = maybe[self._seen_too[(runs[maybe] >> _OTHERS & self._mask).view(np.int64)]]
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
        begin = np.where(is_short, 0, np.maximum(start - room, 0))
        end = np.where(is_short, size[hits.texts], start + lengths + room)
        needed = np.maximum(least, share * np.minimum(size[hits.texts], lengths) - 1e-9)
        brief = {number: code.translate(self._byte) for number, code in coded.items()}
        for codes, items in ((brief, self.bytes_), (coded, self.codes)):  # a bound first, then the number itself
            places = zip(*(column[each].tolist() for column in (hits.texts, begin, end)), strict=True)
            parts = [codes[text][a:b] for text, a, b in places]
            common = common_lengths(parts, [items[item] for item in hits.items[each].tolist()])
            each, common = each[common >= needed[each]], common[common >= needed[each]]
        found: dict[tuple[int, int], Overlap] = {}
        for at, length in zip(each.tolist(), common.tolist(), strict=True):
            text, item, place, there = (
                int(column[at]) for column in (hits.texts, hits.items, hits.places, hits.item_places)
            )
            known = found.get((text, item))
            if known is None or length > known.common:
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
