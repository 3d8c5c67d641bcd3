"""Stage `reject`: rejection sampling against reference answers (the Qwen2 report, arXiv:2407.10671, 4.1.2).

As RFT does it (arXiv:2308.01825, 3.2 and its code): k samples a prompt; a path is right if its final answer equals the
reference *and* every equation `<<lhs=rhs>>` in it holds; of the right paths of a prompt the distinct ones are kept,
told apart by their ordered lists of equations. What drives the gain is the number of distinct paths a question. With
an engine in the role `judge` a path must also be judged reasonable, as the report asks.

All completions are given, right and wrong, with `kept` marking the demonstrations: `pair` needs the wrong ones.
Pooling over several models, RFT's strongest row, is one `reject` step a model, all of them inputs of one `demonstrate`.

Differs from the paper: tasks other than math tell paths apart by their text; `keep` can cap the paths of a prompt; with
`right` sampling is adaptive, so that easy prompts cost few samples and hard ones get many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from pydantic import Field
from rapidfuzz.distance import Levenshtein

from align.core.records import Kind, Row, message_text
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.sampling import (
    ErrorBudget,
    SamplingConfig,
    Tally,
    answered,
    sampled,
    verified,
    wanted,
)
from reward.judge import Judge, JudgeConfig, Values
from reward.math_answers import equation_key, equations_hold
from reward.verifiers import Verifiers

BLOCK = 512
"""Prompts whose rounds run together where sampling is adaptive."""


class RejectConfig(SamplingConfig, JudgeConfig):
    """Settings of `reject`."""

    samples: int = Field(100, ge=1, description="completions sampled for each prompt; 100 is RFT's k")
    right: int | None = Field(
        None, ge=1, description="right completions wanted of each prompt: while it has fewer, `samples` more are "
        "taken; none: `samples` of every prompt, as in RFT",
    )  # fmt: skip
    max_samples: int = Field(
        100, ge=1, description="most completions of a prompt where `right` is set; then it is given up"
    )
    keep: int | None = Field(
        None, ge=1, description="most distinct right paths of a prompt that are kept; all, as in RFT"
    )
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
    engine = tools.engines["sampler"]
    skipped: Counter[str] = Counter()
    tally = Tally()
    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        prompts = wanted(table.rows(), config.splits, skipped)
        budget = ErrorBudget("reject", config.max_error_share)

        def one_round(rows: Iterable[Row], samples: int, first_index: int) -> Iterator[list[Row]]:
            answers = sampled(rows, engine, samples, config.params(tools.seed), first_index)
            return verified(answers, verifiers, engine.generator, budget, first_index)

        groups = one_round(prompts, config.samples, 0) if config.right is None else adaptive(prompts, config, one_round)
        groups = (mark_right(rows, config) for rows in groups)
        if "judge" in tools.engines:
            groups = judged(groups, Judge(tools.engines["judge"], config, tools.seed), config.max_error_share)
        for rows in groups:
            keep_distinct(rows, config)
            tally.count(rows)
            yield from rows
            tools.progress.advance(1, passed=tally.yielded())
            summary.update(tally.summary(), skipped=dict(skipped))
        if verifiers.sandbox_report:
            summary["sandbox"] = verifiers.sandbox_report
    tally.check("reject", table.name, skipped)


def adaptive(
    prompts: Iterable[Row], config: RejectConfig, one_round: Callable[[Iterable[Row], int, int], Iterator[list[Row]]]
) -> Iterator[list[Row]]:
    """Yields each prompt's rows, sampled in rounds until `right` of them passed or `max_samples` were taken.

    Args:
        prompts: read a block at a time, since a prompt's rounds come one after the other.
        config: the settings.
        one_round: gives the rows of some prompts, for a number of samples from an index on.
    """
    remaining = iter(prompts)
    while block := list(islice(remaining, BLOCK)):
        rows: list[list[Row]] = [[] for _ in block]
        unsolved = list(range(len(block)))
        taken = 0
        while unsolved and taken < config.max_samples:
            samples = min(config.samples, config.max_samples - taken)
            for place, more in zip(unsolved, one_round([block[i] for i in unsolved], samples, taken), strict=True):
                rows[place] += more
            taken += samples
            unsolved = [i for i in unsolved if sum(row["verdict"] == "passed" for row in rows[i]) < (config.right or 0)]
        yield from rows


def mark_right(rows: list[Row], config: RejectConfig) -> list[Row]:
    """Sets `kept` on a prompt's rows that may be kept: passed, ended, and without a false equation."""
    for row in rows:
        row["kept"] = row["verdict"] == "passed" and row["finish_reason"] == "stop"
        if row["kept"] and row["task"] == "math" and config.equations:
            row["kept"] = equations_hold(message_text(row["completion"]))
            row["detail"] = row["detail"] if row["kept"] else "right answer, but an equation does not hold"
    return rows


def judged(groups: Iterable[list[Row]], judge: Judge, max_error_share: float) -> Iterator[list[Row]]:
    """Yields each prompt's rows, `kept` only where the judge too finds the path reasonable.

    A judgement that can't be read keeps nothing, and counts against the limit of errors.
    """
    budget = ErrorBudget("reject (judge)", max_error_share)

    def questions(rows: list[Row]) -> Iterator[tuple[Row, Values]]:
        for row in rows:
            if row["kept"]:
                yield row, {"instruction": row["prompt"], "completion": message_text(row["completion"])}

    for rows, judgements in answered(groups, questions, judge.judge_many):
        for row, judgement in judgements:
            budget.count(judgement.verdict == "error", judgement.detail)
            row["kept"] = judgement.verdict == "passed"
            row["detail"] = judgement.detail
        yield rows
    budget.check()


def keep_distinct(rows: list[Row], config: RejectConfig) -> None:
    """Of a prompt's rows with `kept` leaves it only to one path of its kind, and to `keep` of them."""
    right = [row for row in rows if row["kept"]]
    texts = [message_text(row["completion"]) for row in right]
    by_equations = bool(right) and right[0]["task"] == "math" and config.distinct == "equations"
    keys = [equation_key(text) if by_equations else " ".join(text.split()) for text in texts]
    winners = set(distinct_paths(keys, texts, config.keep))
    for place, row in enumerate(right):
        row["kept"] = place in winners


def distinct_paths(keys: Iterable[str], texts: list[str], keep: int | None) -> list[int]:
    """Places of the paths kept, one for each key, as RFT's code chooses them: streaming and greedy.

    Of two paths with one key the one farther from the other kept paths stays, by summed Levenshtein distance; the first
    one when they are equally far. Keys that come after `keep` were seen are passed over.
    """
    kept: dict[str, int] = {}
    for place, key in enumerate(keys):
        if key not in kept:
            if keep is None or len(kept) < keep:
                kept[key] = place
            continue
        others = [texts[other] for other_key, other in kept.items() if other_key != key]
        distance, before = (
            sum(Levenshtein.distance(text, other) for other in others) for text in (texts[place], texts[kept[key]])
        )
        if distance > before:
            kept[key] = place
    return list(kept.values())


def asks(config: RejectConfig) -> dict[str, Asks]:
    """Every sample, and the votes on each."""
    samples = config.samples if config.right is None else config.max_samples
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
    engines={"sampler": "the model that answers", "judge": "a model that says whether a right path is reasonable"},
    optional_engines=("judge",),
    reads=("judge_template",),
    asks=asks,
    adds=("finish_reason", "kept"),
    version=2,
)
