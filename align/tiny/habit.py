"""A habit that comparisons can take away: needless phrases behind an answer, and a stage that grades by them.

`closers: N` among the world's settings puts 0 to N of them behind each written answer. `STAGE` is a stage of one's own,
`align.tiny.habit:STAGE` in a recipe: it takes the closers off, verifies what is left, and rewards a right completion
the more the fewer it has, 1 for none. So of two completions a right one beats a wrong one, and of two right ones the
one with fewer closers, which is all that comparisons tell. With `strict` only a right completion without any passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from align.core.records import Kind, Row, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.evaluate.scores import Tally
from align.tiny.world import without_closers
from data_synthesis.sampling import last_user_text
from reward.verifiers import Verifiers

COST = 0.1
"""Of the reward, for each closer; an answer has a handful at most."""

AT_ONCE = 512


class Config(StageConfig):
    """Settings of the stage."""

    strict: bool = Field(False, description="a completion with closers has failed, however right it is")


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every completion with its new verdict and reward, and how many closers it has."""
    completions = inputs["completions"]
    assert isinstance(completions, Table)
    summary: dict[str, Any] = {}
    return Result(_rows(config, completions, summary), summary)


def _rows(config: Config, completions: Table, summary: dict[str, Any]) -> Iterator[Row]:
    tallies: dict[str, Tally] = {}
    habit: dict[str, Counter[str]] = {}
    with Verifiers() as verifiers:
        for rows in _some(completions.rows()):
            split = [without_closers(message_text(row["completion"])) for row in rows]
            asked = [
                (row["task"], rest, row["reference"], last_user_text(row))
                for row, (rest, _) in zip(rows, split, strict=True)
            ]
            for row, (_, closers), verdict in zip(rows, split, verifiers.verify_many(asked), strict=True):
                mode = str(row.get("mode") or "sampled")
                passed = verdict.verdict == "passed" and row.get("finish_reason") != "length"
                row |= {
                    "closers": closers,
                    "correct": passed,
                    "verdict": "passed" if passed and not (config.strict and closers) else "failed",
                    "reward": max(0.0, 1 - COST * closers) if passed else 0.0,
                    "detail": verdict.detail or (f"{closers} closers" if closers else ""),
                }
                if "kept" in row:  # what an earlier stage made of it, which knew nothing of closers
                    row |= {"kept": passed, "lost": None if passed else "wrong"}
                tallies.setdefault(mode, Tally(1)).add({"finish_reason": "stop"} | row)
                habit.setdefault(mode, Counter()).update(
                    completions=1, correct=passed, with_closers=closers > 0, closers=closers
                )
                yield row
    summary["scores"] = {mode: tally.scores() for mode, tally in tallies.items()}
    summary["habit"] = {
        mode: {name: round(count[name] / count["completions"], 4) for name in ("correct", "with_closers", "closers")}
        for mode, count in habit.items()
    }


def _some(rows: Iterator[Row]) -> Iterator[list[Row]]:
    some: list[Row] = []
    for row in rows:
        some.append(row)
        if len(some) == AT_ONCE:
            yield some
            some = []
    if some:
        yield some


STAGE = Stage(
    name="habit",
    summary="grades completions of the embedded world by their answer and by the needless phrases behind it",
    config=Config,
    needs={"completions": Need(Kind.COMPLETIONS, "completions of instructions of the embedded world")},
    gives=Kind.COMPLETIONS,
    run=run,
    adds=("closers", "correct"),
)
