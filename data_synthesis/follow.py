"""Stage `follow`: completions of constrained prompts, checked by functions (AutoIF, arXiv:2406.13542, 3).

Of each prompt (of `constrain`) K completions are sampled and the constraint's functions are run on each; what enough of
them accept has passed, and its reward is their share. A judge then scores whether what passed still answers the query,
since an answer may meet the constraint and nothing else. All completions are given; `kept` marks those of a good score.

D and P of the paper are `demonstrate`, and `pair` with strategy=all, max_pairs=4 and max_rejected=0: what is chosen
passed and is kept, what is rejected no function accepts.

Differs from the paper: sampling may be done by several models; a completion that was cut off is never kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from pydantic import Field

from align.core.asking import Question, ask_each, load_template
from align.core.engines.base import Engine
from align.core.records import Kind, Row, message_text
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.autoif import PresetConfig
from data_synthesis.sampling import ErrorBudget, SamplingConfig, Tally, answered, sampled, verified, wanted
from reward.judge import TEMPLATES, JudgeConfig, Judgement, params_of, score, score_question
from reward.verifiers import Verifiers


class FollowConfig(PresetConfig, SamplingConfig, JudgeConfig):
    """Settings of `follow`."""

    samples: int = Field(8, ge=1, description="completions sampled for each prompt and sampler; 8 is AutoIF's K")
    temperature: float = Field(0.8, ge=0, le=5, description="sampling temperature; 0.8 is AutoIF's online variant's")
    judge_template: str = Field(
        "follow", description="what the judge is asked of a completion that passed: a shipped template's name, a file, "
        "or a text, with {completion}, and {instruction} (the query without the constraint) and {constraint}",
    )  # fmt: skip
    judge_lowest: float = Field(0.0, description="lowest score of the judge's scale; 0 is AutoIF's")
    judge_above: bool = Field(
        False, description="a score must be above judge_threshold (code), not only reach it (paper)"
    )
    cpu_s: float = Field(5.0, gt=0, description="CPU seconds for a function and a completion; 5 is the code's timeout")


def run(config: FollowConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every completion with its verdict and, where a judge was asked, its `score`; `kept` marks the good ones."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    template = load_template(config.judge_template, TEMPLATES, ["completion"])
    summary: dict[str, Any] = {"preset": config.preset}
    return Result(_rows(config, template, table, tools, summary), summary)


def _rows(config: FollowConfig, template: str, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    skipped: Counter[str] = Counter()
    budget = ErrorBudget("follow", config.max_error_share)
    tally = Tally()
    scored = 0
    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        groups = _checked(config, table, tools, verifiers, budget, skipped)
        if "judge" in tools.engines:
            judge_budget = ErrorBudget("follow (judge)", config.max_error_share)
            groups = judged(groups, config, template, tools.engines["judge"], tools.seed, judge_budget)
        for rows in groups:
            for row in rows:
                row["kept"] = row["verdict"] == "passed" and row["finish_reason"] == "stop" and not row["lost"]
                scored += row["score"] is not None
            tally.count(rows)
            yield from rows
            tools.progress.advance(1, passed=tally.yielded(), kept=tally.kept)
            figures = tally.summary()
            kept = figures["yield"].pop("kept")
            if "judge" in tools.engines:
                figures["yield"]["scored"] = scored
            figures["yield"]["kept"] = kept
            summary.update(figures, skipped=dict(skipped))
        summary["sandbox"] = verifiers.sandbox_report
    tally.check("follow", table.name, skipped)


def _checked(
    config: FollowConfig,
    table: Table,
    tools: Tools,
    verifiers: Verifiers,
    budget: ErrorBudget,
    skipped: Counter[str],
) -> Iterator[list[Row]]:
    """Yields each prompt's completions by all samplers, verified; sample indices go on from one to the next."""

    def of(engine: Engine, number: int) -> Iterator[list[Row]]:
        rows = wanted(table.rows(), config.splits, Counter() if number else skipped, tasks=["follow"])
        answers = sampled(rows, engine, config.samples, config.params(tools.seed))
        return verified(answers, verifiers, engine.generator, budget, first_index=number * config.samples)

    streams = [of(engine, number) for number, engine in enumerate(tools.all_of("sampler"))]
    for of_each in zip(*streams, strict=True):
        rows = [row for rows in of_each for row in rows]
        for row in rows:
            row |= {"score": None, "judgement": None, "lost": None}
        yield rows


def judged(
    groups: Iterable[list[Row]], config: FollowConfig, template: str, judge: Engine, seed: int, budget: ErrorBudget
) -> Iterator[list[Row]]:
    """Yields the groups; what passed has a score, and `lost` says where that is too low or could not be read."""

    def passed(rows: list[Row]) -> list[Row]:
        return [row for row in rows if row["verdict"] == "passed" and row["finish_reason"] == "stop"]

    def question(row: Row) -> Question[float]:
        *before, last = row["prompt"]
        values = {
            "instruction": [*before, {**last, "content": row["query"] or last["content"]}],
            "constraint": row["constraint"] or "",
            "completion": message_text(row["completion"]),
        }
        return score_question(template, values, config.scale, config.judge_json)

    def judgements(rows: Iterable[Row]) -> Iterator[Judgement]:
        asked = ((None, [question(row)]) for row in rows)
        params = params_of(config, seed)
        for _, (votes,) in ask_each(judge, asked, params, config.judge_attempts, config.judge_votes, whole=True):
            yield score(votes, config.scale, config.judge_attempts)

    for rows, found in answered(groups, passed, judgements):
        for row, judgement in zip(passed(rows), found, strict=True):
            row["judgement"] = json.dumps([answer.text for answer in judgement.answers], ensure_ascii=False)
            unread = judgement.verdict.verdict == "error"
            budget.count(unread, judgement.verdict.detail)
            if unread:
                row["lost"] = "right, but the judge's score could not be read"
                continue
            row["score"] = fmean(judgement.votes)
            enough = row["score"] > config.judge_threshold or (
                row["score"] == config.judge_threshold and not config.judge_above
            )
            row["lost"] = None if enough else "right, but the judge's score is too low"
        yield rows
    budget.check()


def asks(config: FollowConfig) -> dict[str, Asks]:
    """Every sample, and the votes on each."""
    return {
        "sampler": Asks(config.samples, config.max_tokens),
        "judge": Asks(config.samples * config.judge_votes, config.judge_max_tokens, reads="sampler"),
    }


STAGE = Stage(
    name="follow",
    summary="completions of constrained prompts, checked by the constraints' functions and a judge (AutoIF)",
    config=FollowConfig,
    needs={
        "prompts": Need(
            Kind.PROMPTS, "prompts of the task `follow`, as `constrain` gives them", columns=("query", "constraint")
        )
    },
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that answers, or several",
        "judge": "a model that scores whether what passed answers the query",
    },
    optional_engines=("judge",),
    several=("sampler",),
    reads=("judge_template",),
    asks=asks,
    adds=("finish_reason", "sandbox_level", "score", "judgement", "lost", "kept"),
)
