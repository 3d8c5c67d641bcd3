"""Stage `execute`: programs against tests, in the sandbox (the Qwen2 report, arXiv:2407.10671, 4.1.2).

Solutions are sampled for prompts of the task `code` and run against the tests of their references, which no model
sees. All are given with their verdicts. A program that fails tests teaches more than one that does not even run, so
`runs` says which is which; `pair` rejects those that run first, and limits the share of pairs with one that doesn't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from align.core.records import Kind, Row
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.sampling import ErrorBudget, SamplingConfig, Tally, sampled, verified, wanted
from reward.verifiers import Verifiers


class ExecuteConfig(SamplingConfig):
    """Settings of `execute`."""

    samples: int = Field(10, ge=1, description="programs sampled for each prompt [our choice]")


def run(config: ExecuteConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every sampled program with its verdict; `runs` is false for one that never got as far as its tests."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: ExecuteConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    engine = tools.engines["sampler"]
    skipped: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    tally = Tally()
    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        prompts = wanted(table.rows(), config.splits, skipped, tasks=["code"])
        answers = sampled(prompts, engine, config.samples, config.params(tools.seed))
        for rows in verified(answers, verifiers, engine.generator, ErrorBudget("execute", config.max_error_share)):
            for row in rows:
                outcomes[outcome(row)] += 1
            tally.count(rows)
            yield from rows
            tools.progress.advance(1, passed=tally.passed.total(), samples=tally.samples.total())
            summary.update(tally.summary(), outcomes=dict(outcomes), skipped=dict(skipped))
        summary["sandbox"] = verifiers.sandbox_report
    tally.check("execute", table.name, skipped)


def outcome(row: Row) -> str:
    """What became of a program, for the summary."""
    if row["verdict"] == "passed":
        return "passed"
    if row["verdict"] == "error":
        return "timeout" if row["detail"].startswith("timeout") else "error"
    return "failed tests" if row["runs"] else "does not run"


STAGE = Stage(
    name="execute",
    summary="sampled programs, run against tests in the sandbox",
    config=ExecuteConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts of the task `code`, with tests as reference")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={"sampler": "the model that writes the programs"},
    adds=("finish_reason", "runs", "sandbox_level"),
)
