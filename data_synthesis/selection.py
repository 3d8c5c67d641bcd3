"""How instructions are selected: complexity-first diverse sampling, and a target mixture; see `select`.

A pool holds numbers only, no texts: a million instructions with six tags each take about 60 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from align.core.records import Row
from align.core.store import Table
from data_synthesis.sampling import last_user_text
from data_synthesis.tag_levels import root_of

I64 = NDArray[np.int64]

OTHERS = "(others)"
"""The part of a mixture that no tag names."""


class Pool:
    """The instructions that may be selected: what selection needs of each, without its text.

    Attributes:
        flat: tag numbers of all instructions, one after the other, int32; an instruction's are distinct.
        ends: where each instruction's begin, (instructions + 1,).
        names: of the tags.
        complexity: number of tags, (instructions,).
        richness: see `select.richness`, (instructions,).
        roots: for every tag the number of its top-level tag in `tops`, (tags,).
        tops: names of the top-level tags.
        skipped: rows left out, by reason.
    """

    def __init__(
        self, table: Table, splits: Sequence[str], atomic: Mapping[str, str] | None,
        parents: Mapping[str, str | None], richness: Callable[[str], float],
    ) -> None:  # fmt: skip
        self.splits = splits
        self.atomic = atomic
        self.parents = parents
        self.skipped: Counter[str] = Counter()
        numbers: dict[str, int] = {}
        flat, ends, rich = array("i"), array("q", [0]), array("d")
        for row in table.rows([name for name in ("split", "prompt", "tags") if name in table.columns]):
            if row["split"] not in splits:
                self.skipped[f"split {row['split']}"] += 1
                continue
            flat.extend([numbers.setdefault(tag, len(numbers)) for tag in self.tags_of(row)])
            ends.append(len(flat))
            rich.append(richness(last_user_text(row)))
        self.names = list(numbers)
        self.flat, self.ends = np.asarray(flat, dtype=np.int32), np.asarray(ends, dtype=np.int64)
        self.complexity = np.diff(self.ends)
        self.richness = np.asarray(rich)
        tops: dict[str, int] = {}
        roots = [tops.setdefault(root_of(name, parents), len(tops)) for name in self.names]
        self.roots, self.tops = np.asarray(roots, dtype=np.int32), list(tops)

    def __len__(self) -> int:
        return len(self.richness)

    def tags_of(self, row: Row) -> list[str]:
        """A row's distinct tags, those of the ontology where there is one; raw tags that it dropped are left out."""
        tags = row.get("tags") or []
        known = tags if self.atomic is None else [self.atomic[tag] for tag in tags if tag in self.atomic]
        return list(dict.fromkeys(known))

    def numbers(self, place: int) -> NDArray[np.int32]:
        """The tag numbers of an instruction."""
        return self.flat[self.ends[place] : self.ends[place + 1]]

    def counts(self, places: Sequence[int] | I64 | None = None) -> I64:
        """How many instructions have each tag; of all, or of some."""
        if places is None:
            return np.bincount(self.flat, minlength=len(self.names))
        _, tags = occurrences(self.flat, self.ends, np.asarray(places, dtype=np.int64))
        return np.bincount(tags, minlength=len(self.names))


def occurrences(flat: NDArray[np.int32], ends: I64, places: I64) -> tuple[I64, NDArray[np.int32]]:
    """The tags of some instructions, one after the other: for each its instruction's number in `places`, and itself."""
    sizes = ends[places + 1] - ends[places]
    which = np.repeat(np.arange(len(places)), sizes)
    within = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return which, flat[ends[places][which] + within]


def complexity_first(flat: NDArray[np.int32], ends: I64, order: I64, count: int) -> list[int]:
    """InsTag's complexity-first diverse sampling (arXiv:2308.07074, 4.1); untagged instructions never qualify.

    The paper's pass over the instructions, those with most tags first, takes each that has a tag which no instruction
    taken in this pass has. The first instruction left that has a tag t is always taken: those before it haven't t. One
    that is the first for none of its tags never is: whatever comes before it and has t was taken, or found t covered.
    So a pass takes the heads of the tags' queues, and that is how it is done: a queue for each tag, of the instructions
    that have it, by number of tags. All passes together walk each queue once, where the plain loop reads every
    instruction in every pass.

    Args:
        flat: tag numbers of all instructions; an instruction's are distinct.
        ends: where each instruction's begin, (instructions + 1,).
        order: the instructions that may be selected; those with as many tags stay in this order.
        count: how many to select.

    Returns:
        Instructions, in the order of selection.
    """
    order = order[np.argsort(-(ends[order + 1] - ends[order]), kind="stable")]
    which, tags = occurrences(flat, ends, order)  # numbers in `order`: smaller ones come first
    by_tag = np.argsort(tags, kind="stable")
    queue = which[by_tag]
    last = np.cumsum(np.bincount(tags)) if len(tags) else np.zeros(0, dtype=np.int64)
    head = np.concatenate([[0], last[:-1]]) if len(last) else last
    taken = np.zeros(len(order), dtype=np.bool_)
    selected: list[I64] = []
    wanted = count
    head, last = head[head < last], last[head < last]
    while wanted and len(head):
        chosen = np.unique(queue[head])[:wanted]
        taken[chosen] = True
        selected.append(chosen)
        wanted -= len(chosen)
        moving = np.arange(len(head))
        while len(moving):  # every queue on to its first instruction that isn't taken
            moving = moving[taken[queue[head[moving]]]]
            head[moving] += 1
            moving = moving[head[moving] < last[moving]]
        head, last = head[head < last], last[head < last]
    return [int(place) for place in order[np.concatenate(selected)]] if selected else []


@dataclass(slots=True)
class Part:
    """One part of a target mixture.

    Attributes:
        share: of the selection that is wanted, 0 to 1.
        wanted: instructions that the share comes to.
        places: the pool's instructions that count for it and may be selected.
        chosen: those that were, in the order of selection.
    """

    share: float
    wanted: int = 0
    places: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    chosen: list[int] = field(default_factory=list)


def parts_of(pool: Pool, allowed: I64, mixture: Mapping[str, float], count: int) -> tuple[dict[str, Part], int]:
    """The parts of a mixture with the instructions that count for each, and how many have several top-level tags.

    An instruction counts for one part: that of the top-level tag which most of its tags lie under, of several such the
    one that fewest instructions of the pool count for [our choice]. What lies under no tag of the mixture counts for
    the others, as do untagged instructions.
    """
    parts = {name: Part(share) for name, share in mixture.items()}
    rest = max(0.0, 1 - sum(mixture.values()))
    parts[OTHERS] = Part(0.0 if rest < 1e-9 else rest)
    which, tags = occurrences(pool.flat, pool.ends, allowed)
    tops = pool.roots[tags] if len(tags) else np.zeros(0, dtype=np.int32)
    width = len(pool.tops) + 1
    pairs, votes = np.unique(which * width + tops, return_counts=True)
    rows, tops = pairs // width, pairs % width
    has = np.bincount(tops, minlength=width)  # instructions that have any tag under it
    best = np.lexsort((tops, has[tops], -votes, rows))
    first = best[np.append(True, rows[best][1:] != rows[best][:-1])] if len(best) else best
    owner = np.full(len(allowed), -1)
    owner[rows[first]] = tops[first]
    names = {top: number for number, top in enumerate(pool.tops)}
    for name, part in parts.items():
        if name != OTHERS:
            part.places = allowed[owner == names.get(name, -2)]
    inside = np.isin(owner, [names.get(name, -2) for name in mixture])
    parts[OTHERS].places = allowed[~inside]
    for part, wanted in zip(parts.values(), quotas([part.share for part in parts.values()], count), strict=True):
        part.wanted = wanted
    return parts, int((np.bincount(rows, minlength=1) > 1).sum())


def quotas(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers in the shares' proportion that add up to `count` (largest remainders; of equals the first)."""
    total = sum(Fraction(str(share)) for share in shares)
    exact = [Fraction(str(share)) * count / total if total else Fraction(0) for share in shares]
    whole = [int(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole) if total else 0]:
        whole[i] += 1
    return whole


def mixed(parts: Mapping[str, Part], count: int, fill: bool, choose: Callable[[I64, int], list[int]]) -> list[int]:
    """The selection: each part's own, in an order in which every beginning has about the mixture's shares.

    Args:
        parts: see `parts_of`; their `chosen` are set.
        count: how many to select.
        fill: whether what a part lacks goes to those that have more, in proportion to their shares.
        choose: `choose(places, count)` gives a part's selection, in order.
    """
    sizes = {name: part.wanted for name, part in parts.items()}
    while True:
        for name, part in parts.items():
            if len(part.chosen) < sizes[name]:
                part.chosen = choose(part.places, sizes[name])
        lacking = count - sum(len(part.chosen) for part in parts.values())
        open_parts = [
            name for name, part in parts.items() if part.share > 0 and 0 < sizes[name] == len(part.chosen)
            and len(part.places) > len(part.chosen)
        ]  # fmt: skip
        if not fill or not lacking or not open_parts:
            break
        for name, more in zip(open_parts, quotas([parts[n].share for n in open_parts], lacking), strict=True):
            sizes[name] += more
    ranked = sorted(
        ((rank + 1) / len(part.chosen), number, place)
        for number, part in enumerate(parts.values()) for rank, place in enumerate(part.chosen)
    )  # fmt: skip
    return [place for _, _, place in ranked]


def top_counts(pool: Pool, places: Sequence[int] | None = None) -> I64:
    """How many instructions have a tag under each top-level tag; of all, or of some."""
    some = np.arange(len(pool)) if places is None else np.asarray(places, dtype=np.int64)
    which, tags = occurrences(pool.flat, pool.ends, some)
    width = max(1, len(pool.tops))
    tops = pool.roots[tags] if len(tags) else np.zeros(0, dtype=np.int32)
    return np.bincount(np.unique(which * width + tops) % width, minlength=len(pool.tops))
