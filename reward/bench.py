"""Stage `reward-bench`: is a reward model right about pairs, or samples, of which it is known what is better?

As in RewardBench (arXiv:2403.13787) an item is a prompt with a chosen and a rejected answer, and is passed where the
chosen one has the higher reward; a tie is not passed. What the data call a subset is reported by itself; RewardBench's
own subsets also by section, where every item counts the same but for math-prm, which counts as much as all code, and
overall as the mean of the sections. Labelled completions do as well: then an item is a prompt with right and wrong ones
and is passed where the favourite is a best one, as in RewardBench 2 (arXiv:2506.01937; its subset Ties is scored in
another way there).

Differs from RewardBench: intervals (Wilson's); accuracy on pairs of like length, calibration and what length has to do
with it, in the summary; what is longer than the model can read is counted and not passed, never cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import isnan
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind, Row, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from reward.loading import device_of
from reward.scoring import scored

if TYPE_CHECKING:  # it imports torch
    from reward.members import Judge

SECTIONS: dict[str, list[str]] = {
    "Chat": ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
    "Chat Hard": [
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ],
    "Safety": [
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ],
    "Reasoning": ["math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"],
}  # fmt: skip
"""RewardBench's."""

MATHS, CODE = "math-prm", "hep-"


class Config(StageConfig):
    """Settings of `reward-bench`."""

    split: Literal["train", "dev", "test", "all"] = Field("all", description="which rows, by their column `split`")
    by: str | None = Field(
        None, description="the column that accuracy is reported by; else subset, family or source, what there is"
    )
    sections: dict[str, list[str]] | None = Field(
        None, description="subsets of each section; RewardBench's own where all subsets are of it, else none"
    )


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Scores both sides of every pair, or all completions of every prompt, and counts."""
    from reward.members import load_judge

    model, table = inputs["reward_model"], inputs["preferences"]
    assert isinstance(model, ModelRef) and isinstance(table, Table)
    if config.by is not None and config.by not in table.columns:
        raise DataError(f"by: {table.name} has no column {config.by!r}; it has {', '.join(table.columns)}")
    pairs = "chosen" in table.columns
    if not pairs and not {"verdict", "reward"} & set(table.columns):
        raise DataError(f"{table.name}: completions without a column `verdict` or `reward`; say which is better")
    judge = load_judge(model, device_of(tools.speed))
    total = sum(config.split in ("all", row["split"]) for row in table.rows(["split"]))
    tools.progress.start(total, "rows")
    summary: dict[str, Any] = {"reward_model": model.name}
    rows = _pairs if pairs else _completions
    return Result(rows(config, judge, table, tools, summary), summary)


def _pairs(config: Config, judge: Judge, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    from reward.tallies import PairTally

    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()  # a prompt may have several pairs
    tally = PairTally()
    for row, (chosen, rejected) in scored(judge, _of_split(config, table), ["chosen", "rejected"], tools, counts):
        gap = None if chosen is None or rejected is None else chosen - rejected
        subset = _subset(config, row)
        tally.add(subset, gap, row["margin"], *(len(message_text(row[side])) for side in ("chosen", "rejected")))
        counts["ties"] += gap == 0
        index = seen[row["prompt_id"]]
        seen[row["prompt_id"]] += 1
        yield {
            **row, "mode": "pairs", "sample_index": index, "subset": subset,
            "chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": gap,
            "verdict": "error" if gap is None else "passed" if gap > 0 else "failed",
        }  # fmt: skip
    _tell(config, "pairs", tally.counts(), counts, table, tools, summary)
    summary.update(tally.figures())


def _completions(config: Config, judge: Judge, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    from reward.figures import best_scored
    from reward.tallies import GroupTally

    counts: Counter[str] = Counter()
    tally = GroupTally()
    for row, (reward,) in scored(judge, _of_split(config, table), ["completion"], tools, counts):
        subset = _subset(config, row)
        value = {"passed": 1.0, "failed": 0.0}.get(row["verdict"], None if row["verdict"] else row["reward"])
        if value is None:
            counts["unlabelled"] += 1
        else:
            tally.add(row["prompt_id"], subset, value, reward, len(message_text(row["completion"])))
        yield {**row, "subset": subset, "score": reward}
    right: dict[str, tuple[int, int]] = {}
    for group in tally.groups() if tally else []:
        if len(set(group.values)) == 1:
            counts["one_sided"] += 1
            continue
        whole = not any(map(isnan, group.scores))  # a prompt that the model can't read all of is not passed
        counts["ties"] += whole and len(set(best_scored(group))) > 1
        passed, items = right.get(group.family, (0, 0))
        right[group.family] = passed + (whole and min(best_scored(group)) == max(group.values)), items + 1
    _tell(config, "best-of-n", dict(sorted(right.items())), counts, table, tools, summary)
    summary.update(tally.report(judge.gates))


def _of_split(config: Config, table: Table) -> Iterator[Row]:
    return (row for row in table.rows() if config.split in ("all", row["split"]))


def _subset(config: Config, row: Row) -> str:
    """What a row is reported under."""
    names = (config.by,) if config.by else ("subset", "family", "source")
    return next((str(row[name]) for name in names if row.get(name) is not None), "all")


def _tell(
    config: Config,
    mode: str,
    right: Mapping[str, tuple[int, int]],
    counts: Counter[str],
    table: Table,
    tools: Tools,
    summary: dict[str, Any],
) -> None:
    """Puts the scores into the summary: by subset, by section, and overall."""
    from reward.tallies import share

    if not right:
        raise DataError(
            f"{table.name}: nothing to tell apart in split {config.split!r}: a prompt needs better and worse answers "
            f"({counts['one_sided']} prompts have answers of one worth only, {counts['unlabelled']} answers no label)"
        )
    by_subset = {name: share(*counted) for name, counted in right.items()}
    sections = sections_of(config.sections, by_subset)
    overall = share(sum(passed for passed, _ in right.values()), sum(items for _, items in right.values()))
    scores = {"overall": overall, "by_family": by_subset}
    if sections:
        by_section = {name: section_score(subsets, by_subset) for name, subsets in sections.items()}
        scores = {"overall": weighted_mean(by_section), "by_family": by_section}
    apart = {"ties": counts["ties"], "errors": counts["too_long"] + counts["empty"]}
    if apart["errors"]:
        tools.progress.say(
            f"{counts['too_long']} texts are longer than the model can read, {counts['empty']} are empty; what they "
            "belong to is not passed"
        )
    summary["scores"] = {mode: {**scores, "samples": 1, **apart}}
    summary["by_subset"] = by_subset
    summary["left_out"] = {name: n for name in ("unlabelled", "one_sided") if (n := counts[name])}


def sections_of(given: Mapping[str, list[str]] | None, subsets: Mapping[str, Any]) -> dict[str, list[str]]:
    """The subsets of each section that are there; none where no sections are known.

    Raises:
        DataError: a section names a subset that isn't there, or a subset is in none.
    """
    known = SECTIONS if given is None else dict(given)
    listed = [name for names in known.values() for name in names]
    missing, extra = sorted(set(listed) - set(subsets)), sorted(set(subsets) - set(listed))
    if given is None and extra:
        return {}
    if given is not None and (missing or extra):
        what = f"names {missing[0]!r}, which is no subset" if missing else f"leaves out the subset {extra[0]!r}"
        raise DataError(f"sections: {what}; the subsets are {', '.join(subsets)}")
    found = {name: [subset for subset in names if subset in subsets] for name, names in known.items()}
    return {name: names for name, names in found.items() if names}


def section_score(names: list[str], by_subset: Mapping[str, Mapping[str, float | int]]) -> dict[str, float | int]:
    """A section's score: every item counts the same, but math-prm counts as much as all subsets of code together."""
    from reward.tallies import weighted

    code = sum(by_subset[name]["n"] for name in names if name.startswith(CODE))
    weights = {name: code if name == MATHS and code else by_subset[name]["n"] for name in names}
    return weighted([(weights[name], by_subset[name]) for name in names])


def weighted_mean(by_section: Mapping[str, Mapping[str, float | int]]) -> dict[str, float | int]:
    """The mean of the sections, each counting the same."""
    from reward.tallies import weighted

    return weighted([(1.0, score) for score in by_section.values()])


STAGE = Stage(
    name="reward-bench",
    summary="how often a reward model prefers what people or programs prefer, by subset, with 95% intervals",
    config=Config,
    needs={
        "reward_model": Need(
            Kind.REWARD_MODEL, "a reward model, an ensemble, or any sequence classifier of one output"
        ),
        "preferences": Need((Kind.PREFERENCES, Kind.COMPLETIONS), "pairs, or completions with verdicts or rewards"),
    },
    gives=Kind.PREFERENCES,
    gives_as="preferences",
    run=run,
    adds=("subset",),
)
