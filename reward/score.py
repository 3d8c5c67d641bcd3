"""Stage `score`: rewards of any completions, by a reward model or an ensemble.

Completions get a `reward`; preferences get one for both sides and their `margin`. Every model renders messages with its
own chat template. What is longer than the model can read, and what is empty, has no reward: it is counted, and never
cut. A reward says which of two completions of one prompt is better; between prompts, and models, it says little.

Where completions have verdicts, the summary says what the rewards are worth: best-of-n, calibration, length (see
`reward.figures`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from align.core.errors import RunError
from align.core.records import COLUMNS, Kind, Row, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from reward.loading import device_of
from reward.scoring import scored

if TYPE_CHECKING:  # it imports torch
    from reward.members import Judge


class Config(StageConfig):
    """Settings of `score`."""

    column: str = Field(
        "reward",
        description="where the reward goes; preferences get chosen_COLUMN and rejected_COLUMN. Other than `reward`, "
        "rewards and margins that are there stay",
    )

    @field_validator("column")
    @classmethod
    def _column_is_free(cls, column: str) -> str:
        taken = {name for names in COLUMNS.values() for name in names} - {"reward"}
        if not re.fullmatch(r"[A-Za-z_]\w*", column) or column in taken:
            raise ValueError(f"expected a name that is none of ours ({', '.join(sorted(taken))}), found {column!r}")
        return column


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Loads the model and scores row by row."""
    from reward.members import load_judge

    model, table = inputs["reward_model"], inputs["completions"]
    assert isinstance(model, ModelRef) and isinstance(table, Table)
    judge = load_judge(model, device_of(tools.speed))
    tools.progress.start(len(table), "rows")
    summary: dict[str, Any] = {}
    rows = _preferences if "chosen" in table.columns else _completions
    return Result(rows(config, judge, table, tools, summary), summary)


def _completions(config: Config, judge: Judge, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    from reward.tallies import GroupTally, RewardTally

    counts: Counter[str] = Counter()
    rewards, labelled = RewardTally(), GroupTally()
    for row, (reward,) in scored(judge, table.rows(), ["completion"], tools, counts):
        family = str(row.get("family") or "all")
        rewards.add(family, reward)
        if reward is not None and row.get("verdict") in ("passed", "failed") and row.get("finish_reason") != "length":
            value = float(row["verdict"] == "passed")
            labelled.add(row["prompt_id"], family, value, reward, len(message_text(row["completion"])))
        yield {**row, config.column: reward}
    _tell(rewards, counts, judge, tools, summary)
    if labelled:
        summary.update(labelled.report(judge.gates))


def _preferences(config: Config, judge: Judge, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    from reward.tallies import PairTally, RewardTally

    counts: Counter[str] = Counter()
    rewards, pairs = RewardTally(), PairTally()
    own = config.column == "reward"
    for row, (chosen, rejected) in scored(judge, table.rows(), ["chosen", "rejected"], tools, counts):
        family = str(row.get("family") or "all")
        margin = None if chosen is None or rejected is None else chosen - rejected
        rewards.add(family, chosen)
        rewards.add(family, rejected)
        pairs.add(family, margin, row.get("margin"), *(len(message_text(row[side])) for side in ("chosen", "rejected")))
        names = f"chosen_{config.column}", f"rejected_{config.column}", "margin" if own else f"{config.column}_margin"
        yield row | dict(zip(names, (chosen, rejected, margin), strict=True))
    _tell(rewards, counts, judge, tools, summary)
    summary.update(pairs.figures())


def _tell(rewards: Any, counts: Counter[str], judge: Judge, tools: Tools, summary: dict[str, Any]) -> None:
    summary.update(rewards.figures(), without_reward=dict(+counts))
    if not summary["scored"]:
        why = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in (+counts).items()) or "there are no rows"
        raise RunError(f"score: {judge.name} gave no reward at all: {why}")
    if counts["too_long"]:
        tools.progress.say(f"{counts['too_long']} texts are longer than {judge.name} can read, and have no reward")


STAGE = Stage(
    name="score",
    summary="rewards of any completions or preferences by a reward model",
    config=Config,
    needs={
        "reward_model": Need(
            Kind.REWARD_MODEL, "a reward model, an ensemble, or any sequence classifier of one output"
        ),
        "completions": Need((Kind.COMPLETIONS, Kind.PREFERENCES), "completions, or preferences for both sides"),
    },
    gives=Kind.COMPLETIONS,
    gives_as="completions",
    run=run,
)
