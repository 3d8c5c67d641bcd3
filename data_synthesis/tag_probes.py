"""Which questions `probe-tags` asks: real ones, and beside each a counterfactual one, where no is the right answer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from align.core.store import Table
from data_synthesis.tag_levels import atomic_tags, lineage, parents_in

Sort = Literal["precision", "consistency"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to the judge.

    Attributes:
        sort: precision or consistency.
        tag: the tag asked about.
        places: numbers of the instructions shown.
        counterfactual: whether no is the right answer.
    """

    sort: Sort
    tag: str
    places: tuple[int, ...]
    counterfactual: bool


class Tagged:
    """The tags of the instructions, as numbers.

    Attributes:
        names: of the tags.
        flat: tag numbers of all instructions, one after the other.
        owners: the instruction of each.
    """

    def __init__(self, table: Table, splits: Sequence[str], ontology: Table | None) -> None:
        atomic = atomic_tags(ontology) if ontology else None
        self._parents = parents_in(ontology) if ontology else {}
        numbers: dict[str, int] = {}
        flat, owners = array("i"), array("q")
        place = -1
        for row in table.rows(["split", "tags"]):
            if row["split"] not in splits:
                continue
            place += 1
            tags = row["tags"] or []
            known = tags if atomic is None else [atomic[tag] for tag in tags if tag in atomic]
            for tag in dict.fromkeys(known):
                flat.append(numbers.setdefault(tag, len(numbers)))
                owners.append(place)
        self.names = list(numbers)
        self.flat = np.asarray(flat, dtype=np.int32)
        self.owners = np.asarray(owners, dtype=np.int64)

    def of(self, place: int) -> set[str]:
        """An instruction's tags."""
        first, last = np.searchsorted(self.owners, [place, place + 1])
        return {self.names[number] for number in self.flat[first:last]}

    def is_foreign(self, tag: str, place: int) -> bool:
        """Whether a tag is none of an instruction's, and lies neither above nor below one of them."""
        tags = self.of(place)
        above = {name for own in tags for name in lineage(own, self._parents)}
        return tag not in above and not tags & set(lineage(tag, self._parents))


def precision_probes(tagged: Tagged, count: int, rng: np.random.Generator) -> Iterator[Probe]:
    """Yields probes of an instruction with one of its tags, each followed by one with a tag that isn't its own."""
    for at in _draw(len(tagged.flat), count, rng):
        place, tag = int(tagged.owners[at]), tagged.names[tagged.flat[at]]
        yield Probe("precision", tag, (place,), False)
        other = _first(
            tagged.names[tagged.flat[i]] for i in _tries(len(tagged.flat), rng)
            if tagged.is_foreign(tagged.names[tagged.flat[i]], place)
        )  # fmt: skip
        if other is not None:
            yield Probe("precision", other, (place,), True)


def consistency_probes(tagged: Tagged, count: int, group: int, rng: np.random.Generator) -> Iterator[Probe]:
    """Yields probes of a tag with instructions that have it, each followed by one where an instruction hasn't."""
    order = np.argsort(tagged.flat, kind="stable")
    ends = np.cumsum(np.bincount(tagged.flat, minlength=len(tagged.names)))
    sizes = np.diff(ends, prepend=0)
    enough = np.flatnonzero(sizes >= group)
    for number in enough[_draw(len(enough), count, rng)].tolist():
        mine = tagged.owners[order[ends[number] - sizes[number] : ends[number]]]
        places = [int(place) for place in rng.choice(mine, group, replace=False)]
        tag = tagged.names[number]
        yield Probe("consistency", tag, tuple(places), False)
        other = _first(
            int(tagged.owners[i]) for i in _tries(len(tagged.owners), rng)
            if tagged.is_foreign(tag, int(tagged.owners[i]))
        )  # fmt: skip
        if other is not None:
            places[int(rng.integers(group))] = other
            yield Probe("consistency", tag, tuple(places), True)


def _draw(of: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """So many numbers below `of`, none twice; all in a random order where there are fewer."""
    return rng.choice(of, min(of, count), replace=False) if of else np.zeros(0, dtype=np.int64)


def _tries(of: int, rng: np.random.Generator) -> Iterator[int]:
    """Yields random numbers below `of`, a thousand at most: where nearly every instruction has a tag, none is found."""
    return (int(number) for number in rng.integers(of, size=1000))


def _first(found: Iterable[Any]) -> Any:
    return next(iter(found), None)
