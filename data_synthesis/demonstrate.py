"""Stage `demonstrate`: scored completions to demonstrations, the report's D (arXiv:2407.10671, 4.1).

Every way of making completions (sampling, execution, principles, people) ends here and in `pair`, so that what may be
trained on is decided in one place: of the training split only, never an error, never a truncated completion, and by
default only what a verifier passed and, where a stage marked which paths it keeps (`kept`), only those.
RFT (arXiv:2308.01825, 3.2) adds the reference solutions to the sampled ones: `answers: add`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Kind, Messages, Row, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table

CARRIED = ("source", "task", "family", "tags", "sample_index", "reward", "generator")
"""Columns that travel on where the input has them, for tracing and for counting by family."""


class DemonstrateConfig(StageConfig):
    """Settings of `demonstrate`."""

    only_passed: bool = Field(
        True, description="take only completions of verdict passed and, where the column `kept` is there, kept ones; "
        "false is unfiltered self-training, the control",
    )  # fmt: skip
    min_reward: float | None = Field(
        None, description="take only completions of at least this reward; with only_passed false it alone decides"
    )
    per_prompt: int | None = Field(None, ge=1, description="most completions of one prompt; all by default, as in RFT")
    best_of: bool = Field(False, description="take a prompt's completions by reward, the best first; else as sampled")
    answers: Literal["no", "add", "only"] = Field(
        "no", description="gold answers (the column `answer`: messages or text): left out; added, before the sampled "
        "ones and not counted in per_prompt (RFT does); or nothing else",
    )  # fmt: skip
    max_per_family: int | None = Field(
        None, ge=1, description="most demonstrations of one family, the first ones taken; for a balanced mixture"
    )


def run(config: DemonstrateConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives one row for each completion or answer that may be learned from."""
    table = inputs["completions"]
    assert isinstance(table, Table)
    _check_columns(config, table)
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: DemonstrateConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    given: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    prompts = rows_in = 0
    tools.progress.start(len(table), "completions")
    for rows in by_prompt(table, tools.work):
        prompts += 1
        for demonstration in _of_prompt(config, rows, dropped):
            family = str(demonstration.get("family"))
            if config.max_per_family is not None and given[family] >= config.max_per_family:
                dropped["family full"] += 1
                continue
            given[family] += 1
            yield demonstration
        tools.progress.advance(len(rows), demonstrations=given.total())
        rows_in += len(rows)
        summary.update(
            prompts=prompts, demonstrations=given.total(), by_family=dict(sorted(given.items())),
            **{"yield": {"prompts": prompts, "rows": rows_in, "demonstrations": given.total()}},
            lost=dict(dropped.most_common()),
        )  # fmt: skip
    if not given:
        raise DataError(
            f"demonstrate: none of {len(table)} rows of {table.name} became a demonstration "
            f"({', '.join(f'{why}: {count}' for why, count in dropped.most_common()) or 'the table is empty'}); "
            "sample more completions, lower min_reward, or add gold answers (answers=add)"
        )


def _of_prompt(config: DemonstrateConfig, rows: list[Row], dropped: Counter[str]) -> Iterator[Row]:
    """Yields a prompt's demonstrations: its answer if asked for, then completions until `per_prompt`."""
    if rows[0]["split"] != "train":
        dropped[f"split {rows[0]['split']}"] += len(rows)
        return
    seen: set[str] = set()
    if config.answers != "no" and rows[0]["answer"] is not None:
        answer = rows[0]["answer"]
        messages: Messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        seen.add(message_text(messages).strip())
        yield _demonstration({**rows[0], "sample_index": None, "reward": None, "generator": "answer"}, messages)
    if config.answers == "only":
        return
    taken = 0
    if config.best_of:
        rows = sorted(rows, key=lambda row: float("-inf") if row["reward"] is None else row["reward"], reverse=True)
    for row in rows:
        text = message_text(row["completion"]).strip()
        reason = _refusal(config, row, text, seen)
        if reason is None and config.per_prompt is not None and taken == config.per_prompt:
            reason = "prompt full"
        if reason is not None:
            dropped[reason] += 1
            continue
        taken += 1
        seen.add(text)
        yield _demonstration(row, row["completion"])


def _refusal(config: DemonstrateConfig, row: Row, text: str, seen: set[str]) -> str | None:
    """Why a completion isn't learned from; None where it is."""
    if row["verdict"] == "error":
        return "error"
    if row.get("finish_reason") in ("length", "error"):
        return "truncated"
    if config.only_passed and row["verdict"] != "passed":
        return "not passed"
    if config.only_passed and row.get("kept") is False:
        return "not kept"
    if config.min_reward is not None and (row["reward"] is None or row["reward"] < config.min_reward):
        return "reward below min_reward"
    if not text:
        return "empty"
    if text in seen:
        return "same text"
    return None


def _demonstration(row: Row, completion: Any) -> Row:
    carried = {column: row[column] for column in CARRIED if column in row}
    return {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "split": row["split"],
        "completion": completion,
        **carried,
    }


def _check_columns(config: DemonstrateConfig, table: Table) -> None:
    """Checks the columns that the settings ask for, before any row is read.

    Raises:
        DataError: gold answers are asked for and there are none, or completions are and these are bare prompts.
    """
    if config.answers != "no" and "answer" not in table.columns:
        raise DataError(
            f"demonstrate: answers={config.answers} needs a column `answer` (messages or text) in {table.name}; it has "
            f"{', '.join(table.columns)}"
        )
    if config.answers != "only" and "completion" not in table.columns:
        raise DataError(
            f"demonstrate: {table.name} holds prompts without completions; sample some (reject, execute, constitute), "
            "or take their gold answers with answers=only"
        )


STAGE = Stage(
    name="demonstrate",
    summary="demonstrations for SFT from scored completions",
    config=DemonstrateConfig,
    needs={
        "completions": Need(
            (Kind.COMPLETIONS, Kind.PROMPTS), "scored completions; or prompts with a column `answer` and answers=only"
        )
    },
    gives=Kind.DEMONSTRATIONS,
    run=run,
    adds=("source", "task", "family"),
)
