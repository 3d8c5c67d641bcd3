import json
from typing import Any

import pytest

from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Row
from data_synthesis.execute import STAGE, ExecuteConfig
from data_synthesis.pair import STAGE as PAIR

from .conftest import Bench, a_completion, a_prompt

RIGHT = "def add(a, b):\n    return a + b"
FENCED = f"Here it is:\n```python\n{RIGHT}\n```"
WRONG = "def add(a, b):\n    return a - b"
SYNTAX = "def add(a, b)\n    return a + b"
CRASHES = "import nothing_of_this_name\n" + RIGHT
RAISES = "def add(a, b):\n    raise ValueError(a)"
OTHER_NAME = "def plus(a, b):\n    return a + b"
ENDLESS = "def add(a, b):\n    while True: pass"

REFERENCE = json.dumps({"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]})
SETTINGS = {"samples": 8, "cpu_s": 0.5, "accept": "unsafe"}


def a_task(number: int, **more: Any) -> Row:
    return a_prompt(number, "write add", task="code", family="code", reference=REFERENCE, **more)


def test_programs_are_run_and_those_that_never_reach_their_tests_are_marked(bench: Bench) -> None:
    engine = ScriptedEngine([RIGHT, FENCED, WRONG, SYNTAX, CRASHES, RAISES, OTHER_NAME, ENDLESS])
    rows = bench.run(STAGE, SETTINGS, {"sampler": engine}, prompts=[a_task(1), a_prompt(2)])
    assert [(row["verdict"], row["runs"]) for row in rows] == [
        ("passed", True), ("passed", True), ("failed", True), ("failed", False), ("failed", False), ("failed", True),
        ("failed", True), ("error", False),
    ]  # fmt: skip
    summary = bench.summary
    assert summary["outcomes"] == {"passed": 2, "failed tests": 3, "does not run": 2, "timeout": 1}
    assert summary["passed_share"] == {"code": 0.25}
    assert summary["skipped"] == {"task exact": 1}
    assert "level" in summary["sandbox"]  # how code was isolated


def test_the_tests_are_never_shown_to_the_model(bench: Bench) -> None:
    seen: list[str] = []

    def answer(prompt: Any, index: int) -> str:
        seen.append(str(prompt))
        return RIGHT

    bench.run(STAGE, {**SETTINGS, "samples": 1}, {"sampler": ScriptedEngine(answer)}, prompts=[a_task(1)])
    assert seen and not any("assert" in prompt for prompt in seen)


def test_a_broken_solution_is_rejected_only_where_none_runs_and_only_to_a_share(bench: Bench) -> None:
    """Prompts 1 to 9 have a reject that runs; prompt 10 has none: 1 of 10 pairs is a share of 0.1."""

    def completions(share_of: int) -> list[Row]:
        rows = []
        for number in range(1, share_of):
            rows.append(a_completion(number, 0, SYNTAX, False, runs=False))
            rows += [a_completion(number, 1, RIGHT, True, runs=True), a_completion(number, 2, WRONG, False, runs=True)]
        return [
            *rows, a_completion(99, 0, RIGHT, True, runs=True), a_completion(99, 1, SYNTAX, False, runs=False)
        ]  # fmt: skip

    rows = bench.run(PAIR, {"max_broken_share": 0.1}, completions=completions(10))
    assert [row["rejected_index"] for row in rows] == [2] * 9 + [1]
    rows = bench.run(PAIR, {"max_broken_share": 0.1}, completions=completions(9))
    assert [row["rejected_index"] for row in rows] == [2] * 8
    assert bench.summary["outcome"] == {"paired": 8, "rejected_does_not_run": 1}


def test_prompts_without_any_code_are_refused(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"execute: .* has no prompt to sample \(task exact: 1\)"):
        bench.run(STAGE, SETTINGS, {"sampler": ScriptedEngine([RIGHT])}, prompts=[a_prompt(1)])


def test_by_default_code_runs_isolated_or_not_at_all() -> None:
    assert ExecuteConfig.model_validate({}).sandbox["accept"] == "isolated"
