"""Which programs are right when nobody gave tests: agreement between programs and tests that models wrote.

CodeT (arXiv:2207.10397, 3.2 and its code): the programs that pass exactly the same tests form a group; a group counts
the more the more programs it has and the more tests they pass, for many programs rarely agree on many tests by a common
mistake. Its code scores sqrt(|programs|) * |tests|, the paper |programs| * |tests|; repeated ones count again in both.

CodeT only ranks. What may be learned from asks for more [our choice]: programs that do not run are left out, and tests
that all of them or none of them pass; the best group must hold several distinct programs and pass several tests, and be
clearly ahead of the next; a program is worse only if it passes a part of the group's tests and no other one, and misses
a good share of them. Where that is not so, nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from pydantic import Field

from align.core.stage import StageConfig

SCORES: dict[str, Callable[[int, int], float]] = {
    "sqrt": lambda programs, tests: sqrt(programs) * tests,
    "product": lambda programs, tests: float(programs * tests),
}
Standing = Literal["agreed", "worse", "undecided", "does not run"]


class AgreementConfig(StageConfig):
    """When programs and tests that models wrote are believed."""

    score: Literal["sqrt", "product"] = Field(
        "sqrt", description="how groups are ranked: sqrt(programs) * tests (CodeT's code) or programs * tests (CodeT's "
        "paper)",
    )  # fmt: skip
    min_programs: int = Field(2, ge=1, description="distinct programs that the best group must have [our choice]")
    min_tests: int = Field(3, ge=1, description="distinct tests that it must pass, of those that tell programs apart "
        "[our choice]")  # fmt: skip
    lead: float = Field(1.5, ge=1, description="how many times the next group's score its own must be [our choice]")
    worse_by: float = Field(
        0.4, gt=0, le=1, description="share of the best group's tests that a program must fail, and pass no other "
        "test, to be rejected [our choice]",
    )  # fmt: skip
    unanimous: bool = Field(
        False, description="where all programs that run pass the same tests, believe them too; such a prompt gives "
        "demonstrations and no pairs",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the programs of one prompt come to.

    Attributes:
        undecided: why nothing is known; empty where there is a best group.
        standings: of each program.
        groups: of each program the rank of its group, from 0; None for one that does not run.
        scores: of each program its group's score; None for one that does not run.
        useful: places of the tests that tell programs apart.
        agreed: places of the tests that the best group passes and that count; empty where there is none.
        shares: of each program the share of `agreed` that it passes.
    """

    undecided: str
    standings: tuple[Standing, ...]
    groups: tuple[int | None, ...]
    scores: tuple[float | None, ...]
    useful: tuple[int, ...]
    agreed: frozenset[int]
    shares: tuple[float, ...]


def agree(
    keys: Sequence[str], passed: Sequence[frozenset[int] | None], repeats: Sequence[int], config: AgreementConfig
) -> Agreement:
    """Ranks the groups of programs that pass the same tests, and says what is known of each program.

    Args:
        keys: of each program, equal for two that are the same.
        passed: places of the tests that it passes; None for one that does not run.
        repeats: how often each test was written.
        config: the thresholds.
    """
    running = [place for place, its in enumerate(passed) if its is not None]
    everywhere = frozenset.intersection(*(_of(passed, place) for place in running)) if running else frozenset()
    anywhere = frozenset().union(*(_of(passed, place) for place in running))
    useful = anywhere - everywhere
    agree_all = config.unanimous and bool(running) and not useful
    counted = everywhere if agree_all else useful

    members: dict[frozenset[int], list[int]] = {}
    for place in running:
        members.setdefault(_of(passed, place) & counted, []).append(place)
    score = {
        tests: SCORES[config.score](len(programs), sum(repeats[test] for test in tests))
        for tests, programs in members.items()
    }
    ranked = sorted(members, key=lambda tests: -score[tests])  # of equal groups the one that came first
    best = ranked[0] if ranked else frozenset()
    undecided = _undecided(config, useful or counted, ranked, members, score, keys)

    rank = {place: number for number, tests in enumerate(ranked) for place in members[tests]}
    of_group = {place: round(score[tests], 4) for tests in ranked for place in members[tests]}
    shares = [len(best & (its or frozenset())) / len(best) if best else 0.0 for its in passed]

    def standing(place: int) -> Standing:
        its = passed[place]
        if its is None:
            return "does not run"
        if undecided:
            return "undecided"
        if rank[place] == 0:
            return "agreed"
        is_part = its & counted < best
        return "worse" if is_part and 1 - shares[place] >= config.worse_by - 1e-9 else "undecided"

    return Agreement(
        undecided=undecided,
        standings=tuple(standing(place) for place in range(len(passed))),
        groups=tuple(rank.get(place) for place in range(len(passed))),
        scores=tuple(of_group.get(place) for place in range(len(passed))),
        useful=tuple(sorted(useful)),
        agreed=frozenset() if undecided else best,
        shares=tuple(shares),
    )


def _of(passed: Sequence[frozenset[int] | None], place: int) -> frozenset[int]:
    return passed[place] or frozenset()


SAME_TESTS = "all programs pass the same tests"
FEW_TESTS = "the best group passes too few tests that tell programs apart"
FEW_PROGRAMS = "the best group has too few distinct programs"
NOT_AHEAD = "no group is clearly ahead"
NONE_RUNS = "no program runs"
UNDECIDED = (NONE_RUNS, SAME_TESTS, FEW_TESTS, FEW_PROGRAMS, NOT_AHEAD)
"""Why nothing is known of a prompt's programs."""


def _undecided(
    config: AgreementConfig,
    counted: frozenset[int],
    ranked: Sequence[frozenset[int]],
    members: dict[frozenset[int], list[int]],
    score: dict[frozenset[int], float],
    keys: Sequence[str],
) -> str:
    if not ranked:
        return NONE_RUNS
    if not counted:
        return SAME_TESTS
    best = ranked[0]
    if len(best) < config.min_tests:
        return FEW_TESTS
    if len({keys[place] for place in members[best]}) < config.min_programs:
        return FEW_PROGRAMS
    if len(ranked) > 1 and score[best] < config.lead * score[ranked[1]]:
        return NOT_AHEAD
    return ""
