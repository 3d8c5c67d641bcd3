"""Stage `execute`: programs against tests, in the sandbox (the Qwen2 report, arXiv:2407.10671, 4.1.2).

Solutions are sampled for prompts of the task `code` and run: against the tests of their references, which no model
sees, or, as the report has it, against tests that a model writes as well (`tests=written`). Those are believed only
where solutions agree on them, see `data_synthesis.code_agreement`; whatever no group agrees on clearly is an `error`,
of which nothing is learned.

All programs are given with their verdicts, `kept` marking the distinct right ones. A program that fails tests teaches
more than one that does not even run, so `runs` says which is which; `pair` rejects those that run first, and limits the
share of pairs with one that doesn't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from align.core.errors import RecipeError
from align.core.records import Kind, Row, message_text
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.agreed_programs import STEPS as AGREED_STEPS
from data_synthesis.agreed_programs import AgreedConfig, AgreedPrograms
from data_synthesis.distinct import most_distinct
from data_synthesis.pooling import Pool
from data_synthesis.programs import program_key
from data_synthesis.sampling import ErrorBudget, PooledConfig, Tally, wanted, yielded
from data_synthesis.written_tests import TestWriter
from reward.code_tests import extract_code
from reward.verifiers import Verifiers

CUT, SAME, BEYOND = "right, but cut off at max_tokens", "right, but the program of another", "right, but beyond `keep`"
STEPS: dict[str, tuple[str, ...]] = {
    "run": ("not sampled", "does not run"),
    "passed": ("runs out of time", "could not be verified", "fails tests"),
    "whole": (CUT,),
    "distinct": (SAME,),
    "kept": (BEYOND,),
}
"""The steps from a sample to a demonstration where tests are given, and why a sample is lost at each."""


class ExecuteConfig(AgreedConfig, PooledConfig):
    """Settings of `execute`."""

    samples: int = Field(
        10, ge=1, description="programs of each prompt, from every sampler at every temperature [our choice]"
    )
    tests: Literal["reference", "written"] = Field(
        "reference", description="what programs are run against: the tests of their references; or tests that the "
        "engine `tester` writes, believed where programs agree on them (CodeT, arXiv:2207.10397)",
    )  # fmt: skip
    keep: int | None = Field(
        None, ge=1, description="most distinct right programs of a prompt that are kept, the most different ones"
    )
    check: bool = Field(
        False, description="where tests are written and a prompt has a reference too: run what was decided against it, "
        "and tell in the summary how often the agreement was right; nothing else depends on it",
    )  # fmt: skip


def run(config: ExecuteConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every sampled program with its verdict; `runs` is false for one that never got as far as its tests."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    if config.tests == "written" and "tester" not in tools.engines:
        raise RecipeError("tests=written needs the engine `tester`, which writes them; it may be the sampler's model")
    if config.tests == "reference" and "tester" in tools.engines:
        raise RecipeError("the engine `tester` writes tests only with tests=written; set it, or leave it out")
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: ExecuteConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    skipped: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    tally = Tally()
    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        prompts = wanted(table.rows(), config.splits, skipped, tasks=["code"])
        budget = ErrorBudget("execute", config.max_error_share)
        by_reference = config.tests == "reference"
        pool = Pool(tools.all_of("sampler"), config, tools.seed, verifiers if by_reference else None, budget)
        agreed: AgreedPrograms | None = None
        groups: Iterator[list[Row]]
        if by_reference:
            groups = (with_outcomes(rows) for rows in pool.rows(prompts, config.samples))
        else:
            writer = TestWriter(tools.engines["tester"], config, tools.seed)
            agreed = AgreedPrograms(config, pool, writer, verifiers, config.check)
            groups = agreed.rows(prompts, config.samples)
        for rows in groups:
            keep_distinct(rows, config.keep)
            if agreed is not None:
                agreed.check_kept(rows)
            tally.count(rows)
            lost.update(row["lost"] for row in rows if row["lost"])
            outcomes.update(row["outcome"] for row in rows)
            yield from rows
            tools.progress.advance(1, passed=tally.yielded())
            summary.update(tally.summary(), outcomes=dict(outcomes), skipped=dict(skipped))
            summary.update(yielded(tally, lost, STEPS if by_reference else AGREED_STEPS))
            if agreed is not None:
                summary["agreement"] = agreed.summary()
        summary["sandbox"] = verifiers.sandbox_report
    tally.check("execute", table.name, skipped)


def with_outcomes(rows: list[Row]) -> list[Row]:
    """Numbers a prompt's rows, and sets `outcome` and, where a program can't be kept, `lost`."""
    for index, row in enumerate(rows):
        row["sample_index"] = index
        row["outcome"] = outcome(row)
        row["lost"] = None if row["outcome"] == "passed" else row["outcome"]
    return rows


def outcome(row: Row) -> str:
    """What became of a program that ran against given tests."""
    if row["finish_reason"] == "error":
        return "not sampled"
    if row["verdict"] == "passed":
        return "passed"
    if row["verdict"] == "error":
        return "runs out of time" if row["detail"].startswith("timeout") else "could not be verified"
    return "fails tests" if row["runs"] else "does not run"


def keep_distinct(rows: Sequence[Row], keep: int | None) -> None:
    """Sets `kept` on a prompt's right programs: on one of those that are the same, and on the `keep` most different."""
    first: dict[str, int] = {}
    texts = [message_text(row["completion"]) for row in rows]
    for place, row in enumerate(rows):
        if row["lost"] is None and row["finish_reason"] != "stop":
            row["lost"] = CUT
        if row["lost"] is None and first.setdefault(program_key(extract_code(texts[place])), place) != place:
            row["lost"] = SAME
    chosen = set(most_distinct(list(first.values()), texts, keep))
    for place, row in enumerate(rows):
        if row["lost"] is None and place not in chosen:
            row["lost"] = BEYOND
        row["kept"] = row["lost"] is None


def asks(config: ExecuteConfig) -> dict[str, Asks]:
    """Every program of one sampler, and every answer with tests."""
    asked = {"sampler": Asks(config.samples * len(config.temperatures), config.max_tokens)}
    if config.tests == "written":
        asked["tester"] = Asks(config.test_samples, config.test_max_tokens)
    return asked


STAGE = Stage(
    name="execute",
    summary="sampled programs, run against tests in the sandbox",
    config=ExecuteConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts of the task `code`, with tests as reference or tests=written")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that writes the programs, or several: '[small, large]'",
        "tester": "the model that writes the tests, with tests=written",
    },
    optional_engines=("tester",),
    several=("sampler",),
    reads=("templates",),
    asks=asks,
    adds=("finish_reason", "temperature", "runs", "kept", "lost", "outcome"),
    version=2,
)
