"""Whether an instruction quotes the text that is to answer it: then the answer is copied and nothing is learned."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from align.core.stage import StageConfig
from align.core.text import words

SHORTEST_RUN = 3
"""Shared runs shorter than this (in words, or characters of a script without spaces) are chance [our choice]."""

_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_WITHOUT_SPACES}]|[^{_WITHOUT_SPACES}]+")


class LeakConfig(StageConfig):
    """Settings of the leak check; all three limits are our choice, the report names none."""

    leak_words: int = Field(
        8, ge=2, description="an instruction that shares a run of so many words with the passage is refused"
    )
    leak_characters: int = Field(
        12, ge=2, description="the same in characters of scripts without spaces (Chinese, kana, Thai, Lao, Khmer, "
        "Burmese); in a mixed run each counts in its own measure",
    )  # fmt: skip
    leak_share: float = Field(
        0.5, ge=0, le=1, description="an instruction is refused if the runs that it shares with the passage (of 3 "
        "words or characters or more) make up a larger share of the passage than this; 1 is off",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shared:
    """What two texts share.

    Attributes:
        run: the weightiest run of units, as text.
        weight: of it; 1 is as much as the limit.
        share: of the passage's units that stand in shared runs.
    """

    run: str
    weight: float
    share: float


def leak(instruction: str, passage: str, config: LeakConfig) -> str | None:
    """Why an instruction gives the passage away; None where it doesn't."""
    found = shared(units(instruction), units(passage), config.leak_words, config.leak_characters)
    if found.weight >= 1:
        return f"quotes the passage: {found.run!r:.80}"
    if found.share > config.leak_share:
        return f"holds {100 * found.share:.0f}% of the passage"
    return None


def units(text: str) -> list[str]:
    """The words of a text; a script written without spaces gives one unit a character."""
    return [unit for word in words(text) for unit in ([word] if word.isascii() else _UNIT.findall(word))]


def shared(instruction: Sequence[str], passage: Sequence[str], most_words: int, most_characters: int) -> Shared:
    """The weightiest run that the instruction shares with the passage, and how much of the passage is shared.

    A word weighs 1/`most_words`, a character of a script without spaces 1/`most_characters`.
    """
    best, run = 0.0, ""
    covered = [False] * len(passage)
    for end, length in _runs(instruction, passage):
        units_of_run = passage[end - length : end]
        weight = sum(1 / (most_characters if _is_character(unit) else most_words) for unit in units_of_run)
        if weight > best + 1e-9:
            best, run = weight, " ".join(units_of_run)
        if length >= min(SHORTEST_RUN, len(passage)):
            covered[end - length : end] = [True] * length
    return Shared(run, best + 1e-9, sum(covered) / len(covered) if covered else 0.0)


def _runs(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[int, int]]:
    """All runs that both have and that can't be made longer: where each ends in `right`, and its length."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, unit in enumerate(right):
        places[unit].append(place)
    lengths: dict[int, int] = {}  # by place in `right`: of the run that ends there and at the unit of `left` before
    for unit in left:
        now = {place: lengths.get(place - 1, 0) + 1 for place in places.get(unit, ())}
        yield from ((place + 1, length) for place, length in lengths.items() if place + 1 not in now)
        lengths = now
    yield from ((place + 1, length) for place, length in lengths.items())


def _is_character(unit: str) -> bool:
    return len(unit) == 1 and not unit.isascii() and _UNIT.fullmatch(unit) is not None and unit >= "\u0e00"
