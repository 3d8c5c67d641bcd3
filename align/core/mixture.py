"""Which records of which source a mixture takes: random subsets, and shares by weight, without holding any rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from align.core.errors import DataError
from align.core.locate import Part
from align.core.readers import Record
from align.core.source_spec import Source


def pick(
    sources: Sequence[Source], located: Sequence[list[Part]], seed: int
) -> Iterator[tuple[Source, Part, int, str, Record]]:
    """Yields the records that a mixture takes, one source after the other, each in its own order.

    Where a source gives only a part of its rows, its records are counted first and then read again.

    Args:
        sources: with their subsets and weights; see `Source`.
        located: the parts of each source.
        seed: decides the random subsets of sources that have no seed of their own.

    Yields:
        the source, the part, the record's number in the part, its place for messages, and the record.

    Raises:
        DataError: more rows are asked for than there are.
    """
    for source, parts, places in zip(sources, located, _choose(sources, located, seed), strict=True):
        for part, number, where, record in _at(places, _records(source, parts)):
            yield source, part, number, where, record


def _choose(sources: Sequence[Source], located: Sequence[list[Part]], seed: int) -> list[Any]:
    """For each source the positions of the rows that it gives, in order; None for all."""
    if all(s.fraction is None and s.count is None and s.weight is None for s in sources):
        return [None] * len(sources)
    there = [_count(source, parts) for source, parts in zip(sources, located, strict=True)]
    given = []
    for source, total in zip(sources, there, strict=True):
        wanted = total if source.fraction is None else max(1, round(Fraction(str(source.fraction)) * total))
        if source.count is not None:
            if source.count > wanted:
                raise DataError(f"{source.source}: count asks for {source.count} rows, {wanted} are there")
            wanted = source.count
        given.append(wanted)
    if sources[0].weight is not None:
        weights = [Fraction(str(source.weight)) for source in sources]
        scale = min(number / weight for number, weight in zip(given, weights, strict=True))
        given = [int(weight * scale) for weight in weights]
    return [
        _draw(total, wanted, [seed if source.seed is None else source.seed, index])
        for index, (source, total, wanted) in enumerate(zip(sources, there, given, strict=True))
    ]


def _draw(total: int, wanted: int, seed: list[int]) -> Any:
    import numpy as np

    if wanted == total:
        return None
    return np.sort(np.random.default_rng([part % 2**63 for part in seed]).permutation(total)[:wanted])


def _count(source: Source, parts: Sequence[Part]) -> int:
    if source.split is None or any(part.split for part in parts):
        return sum(part.count() for part in parts)
    return sum(1 for _ in _records(source, parts))


def _records(source: Source, parts: Sequence[Part]) -> Iterator[tuple[Part, int, str, Record]]:
    """The records of a source with their part, number in it and place; those of other splits are left out."""
    by_column = source.split is not None and not any(part.split for part in parts)
    for part in parts:
        for number, (where, record) in enumerate(part.records()):
            if by_column:
                if "split" not in record:
                    raise DataError(f"{where}: split {source.split!r} was asked for, and there is no column `split`")
                if record["split"] != source.split:
                    continue
            yield part, number, where, record


def _at(places: Any, records: Iterator[tuple[Part, int, str, Record]]) -> Iterator[tuple[Part, int, str, Record]]:
    """The records at the places given, in order; all of them where `places` is None."""
    if places is None:
        yield from records
        return
    wanted = iter(places)
    following = next(wanted, None)
    for position, found in enumerate(records):
        if following is None:
            return
        if position == following:
            yield found
            following = next(wanted, None)
