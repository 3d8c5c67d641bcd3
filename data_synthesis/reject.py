"""Stage `reject`: rejection sampling against reference answers (the Qwen2 report, arXiv:2407.10671, 4.1.2).

As RFT does it (arXiv:2308.01825, 3.2 and its code): k samples a prompt, of one model or pooled from several; a path is
right if its final answer equals the reference *and* every equation `<<lhs=rhs>>` in it holds; of the right paths of a
prompt the distinct ones are kept, told apart by their ordered lists of equations. What drives the gain is the number
of distinct paths a question, which the summary tells, by generator and pooled. With an engine in the role `judge` a
path must also be judged reasonable, as the report asks.

All completions are given, right and wrong, with `kept` marking the demonstrations: `pair` needs the wrong ones. `lost`
says why one is not kept.

Differs from the paper: tasks other than math tell paths apart by their text; `keep` can cap the paths of a prompt, and
then takes the most distinct ones; with `right` sampling is adaptive (see `data_synthesis.pooling`), so that easy and
hopeless prompts cost few samples.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from align.core.records import Kind, Row, message_text
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.distinct import distinct_paths, most_distinct
from data_synthesis.pooling import Pool, Rounds, RoundsConfig
from data_synthesis.sampling import ErrorBudget, PooledConfig, Tally, answered, wanted, why_lost, yielded
from reward.judge import Judge, JudgeConfig, Values
from reward.math_answers import equation_key, equations_hold
from reward.verifiers import Verifiers

STEPS: dict[str, tuple[str, ...]] = {
    "passed": ("not sampled", "could not be verified", "wrong", "wrong, and cut off at max_tokens"),
    "sound": ("right, but cut off at max_tokens", "right, but an equation does not hold"),
    "reasonable": ("right, but not reasonable to the judge", "right, but its judgement can't be read"),
    "distinct": ("right, but the path of another",),
    "kept": ("right, but beyond `keep`",),
}
"""The steps from a sample to a demonstration, and why a sample is lost at each."""


class RejectConfig(JudgeConfig, RoundsConfig, PooledConfig):
    """Settings of `reject`."""

    samples: int = Field(
        100, ge=1, description="completions of each prompt, from every sampler at every temperature; 100 is RFT's k"
    )
    keep: int | None = Field(
        None, ge=1, description="most distinct right paths of a prompt that are kept, the most different ones; all, as "
        "in RFT",
    )  # fmt: skip
    distinct: Literal["equations", "text"] = Field(
        "equations", description="what tells two right paths of a math prompt apart: their <<lhs=rhs>> equations (RFT; "
        "paths without any count as one), or their text; other tasks always by text",
    )  # fmt: skip
    equations: bool = Field(True, description="a math path with a false <<lhs=rhs>> isn't kept (RFT)")


def run(config: RejectConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every completion with its verdict; `kept` marks the distinct right paths."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: RejectConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    skipped: Counter[str] = Counter()
    tally = Tally()
    paths = Paths()
    steps = {step: why for step, why in STEPS.items() if step != "reasonable" or "judge" in tools.engines}
    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        prompts = wanted(table.rows(), config.splits, skipped)
        budget = ErrorBudget("reject", config.max_error_share)
        pool = Pool(tools.all_of("sampler"), config, tools.seed, verifiers, budget)
        rounds = Rounds(config, lambda row: path(row, config) if loss(row, config) is None else None)
        groups = pool.rows(prompts, config.samples)
        if config.right is not None:
            groups = rounds.rows(prompts, config.samples, pool.rows)
        groups = (mark(rows, config) for rows in groups)
        if "judge" in tools.engines:
            groups = judged(groups, Judge(tools.engines["judge"], config, tools.seed), config.max_error_share)
        for rows in groups:
            paths.count(rows, config)
            keep_distinct(rows, config)
            tally.count(rows)
            yield from rows
            tools.progress.advance(1, passed=tally.yielded())
            summary.update(tally.summary(), skipped=dict(skipped), distinct_paths=paths.summary())
            summary.update(yielded(tally, tally.lost, steps))
            if config.right is not None:
                summary["ended"] = dict(rounds.ended)
        if verifiers.sandbox_report:
            summary["sandbox"] = verifiers.sandbox_report
    tally.check("reject", table.name, skipped)


def loss(row: Row, config: RejectConfig) -> str | None:
    """Why a completion can't be kept, by its verdict, its end and its equations; None where it can."""
    if row["verdict"] != "passed" or row["finish_reason"] != "stop":
        return why_lost(row)
    if row["task"] == "math" and config.equations and not equations_hold(message_text(row["completion"])):
        return "right, but an equation does not hold"
    return None


def mark(rows: list[Row], config: RejectConfig) -> list[Row]:
    """Numbers a prompt's rows, and sets `lost` and `kept` on them by what is known without a judge."""
    for index, row in enumerate(rows):
        row["sample_index"] = index
        row["lost"] = loss(row, config)
        row["kept"] = row["lost"] is None
        if row["lost"] == "right, but an equation does not hold":
            row["detail"] = row["lost"]
    return rows


def judged(groups: Iterable[list[Row]], judge: Judge, max_error_share: float) -> Iterator[list[Row]]:
    """Yields each prompt's rows, `kept` only where the judge too finds the path reasonable.

    A judgement that can't be read keeps nothing, and counts against the limit of errors.
    """
    budget = ErrorBudget("reject (judge)", max_error_share)

    def questions(rows: list[Row]) -> Iterator[tuple[Row, Values]]:
        for row in rows:
            row["judge_score"], row["judge_words"] = None, None
            if row["kept"]:
                yield row, {"instruction": row["prompt"], "completion": message_text(row["completion"])}

    for rows, judgements in answered(groups, questions, judge.judgements):
        for row, judgement in judgements:
            verdict = judgement.verdict
            budget.count(verdict.verdict == "error", verdict.detail)
            row["detail"] = verdict.detail
            row["judge_score"] = judgement.figures()["mean"]
            row["judge_words"] = [answer.text for answer in judgement.answers]
            row["kept"] = verdict.verdict == "passed"
            if not row["kept"]:
                row["lost"] = (
                    "right, but its judgement can't be read"
                    if verdict.verdict == "error"
                    else "right, but not reasonable to the judge"
                )
        yield rows
    budget.check()


def path(row: Row, config: RejectConfig) -> str:
    """What two right completions of a prompt must differ in to be two paths."""
    text = message_text(row["completion"])
    return equation_key(text) if row["task"] == "math" and config.distinct == "equations" else " ".join(text.split())


def keep_distinct(rows: list[Row], config: RejectConfig) -> None:
    """Of a prompt's rows with `kept` leaves it only to one path of its kind, and to the `keep` most different ones."""
    right = [row for row in rows if row["kept"]]
    texts = [message_text(row["completion"]) for row in right]
    distinct = distinct_paths([path(row, config) for row in right], texts)
    chosen = most_distinct(distinct, texts, config.keep)
    for place, row in enumerate(right):
        row["kept"] = place in chosen
        if not row["kept"]:
            row["lost"] = "right, but beyond `keep`" if place in distinct else "right, but the path of another"


class Paths:
    """Counts distinct right paths a prompt: of all samples pooled, of each generator, and at each temperature."""

    def __init__(self) -> None:
        self.prompts = 0
        self.pooled = 0
        self.of: dict[str, Counter[str]] = {"by_generator": Counter(), "by_temperature": Counter()}

    def count(self, rows: Sequence[Row], config: RejectConfig) -> None:
        """Takes one prompt's rows in, whose `kept` still marks all right paths."""
        self.prompts += 1
        keys = [path(row, config) if row["kept"] else None for row in rows]
        self.pooled += len({key for key in keys if key is not None})
        for by, column in (("by_generator", "generator"), ("by_temperature", "temperature")):
            found: dict[str, set[str]] = defaultdict(set)
            for row, key in zip(rows, keys, strict=True):
                found[str(row[column])].update([] if key is None else [key])
            self.of[by].update({name: len(its) for name, its in found.items()})

    def summary(self) -> dict[str, Any]:
        """Means over all prompts; by generator and temperature where there are several."""
        means = {by: {n: round(c / self.prompts, 4) for n, c in counts.items()} for by, counts in self.of.items()}
        return {
            "pooled": round(self.pooled / self.prompts, 4),
            **{by: of for by, of in means.items() if len(of) > 1},
        }


def asks(config: RejectConfig) -> dict[str, Asks]:
    """Every sample of one sampler, and the votes on each."""
    samples = (config.samples if config.right is None else config.max_samples) * len(config.temperatures)
    return {
        "sampler": Asks(samples, config.max_tokens),
        "judge": Asks(samples * config.judge_votes, config.judge_max_tokens, reads="sampler"),
    }


STAGE = Stage(
    name="reject",
    summary="sampled completions with verdicts; the distinct right ones marked",
    config=RejectConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts with a task and a reference answer")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that answers, or several whose answers are pooled: '[small, large]'",
        "judge": "a model that says whether a right path is reasonable",
    },
    optional_engines=("judge",),
    several=("sampler",),
    reads=("judge_template",),
    asks=asks,
    adds=("finish_reason", "temperature", "kept", "lost"),
    version=3,
)
