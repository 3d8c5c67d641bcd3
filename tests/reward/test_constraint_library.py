"""The task `follow`: completions checked by functions that a model wrote, wherever completions are verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.scripted import ScriptedEngine
from align.evaluate.evaluate import STAGE as EVALUATE
from reward.verifiers import Verifiers
from reward.verify import STAGE as VERIFY
from tests.synthesis.conftest import Bench, a_prompt

UPPER = "def evaluate(s): return s.isupper()"
SHORT = "def evaluate(s): return 'True' if len(s) < 4 else 'false'"
FRAGILE = "def evaluate(s): return int(s) > 1"
REFERENCE = {"functions": [UPPER, SHORT, FRAGILE], "constraint": "Short and loud.", "constraint_id": "c1"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_reward_is_the_share_of_functions_that_say_yes_and_more_than_the_threshold_passes() -> None:
    """CAT: two say yes, the third raises: 2/3, above 0.5. cat: one of three: not. 5 is no capital, but short and more.

    With the threshold 0, the code's, one is enough; with one of two, exactly 0.5, the paper's is not passed.
    """
    with Verifiers() as verifiers:
        rows: list[tuple[Any, ...]] = [("follow", text, REFERENCE, "") for text in ("CAT", "cat", "5", "longer")]
        rows.append(("follow", "cat", {**REFERENCE, "threshold": 0}, ""))
        rows.append(("follow", "cat", json.dumps({"functions": [UPPER, SHORT]}), ""))
        found = list(verifiers.verify_many(rows))
        assert [(v.verdict, v.reward) for v in found] == [
            ("passed", 2 / 3), ("failed", 1 / 3), ("passed", 2 / 3), ("failed", 0.0), ("passed", 1 / 3),
            ("failed", 0.5),
        ]  # fmt: skip
        assert found[0].detail == "2 of 3 functions say yes, more than 0.5 of them are needed; 1 raised ValueError"
        assert verifiers.sandbox_level is not None


def test_a_function_runs_once_for_all_the_completions_that_it_is_asked_about() -> None:
    with Verifiers() as verifiers:
        list(verifiers.verify_many([("follow", f"text {n}", {"functions": [UPPER, SHORT]}, "") for n in range(50)]))
        assert verifiers.sandbox_report is not None
        assert verifiers.sandbox_report["journal"]["executions"] == 2


def test_where_every_function_runs_out_of_time_nothing_is_known() -> None:
    endless = "def evaluate(s):\n    while s == 'a': pass\n    return True"
    with Verifiers({"cpu_s": 0.3}) as verifiers:
        rows = [("follow", text, {"functions": [endless]}, "") for text in ("b", "a", "c")]
        before, at, after = verifiers.verify_many(rows)
        assert (before.verdict, after.verdict) == ("passed", "passed")
        assert at.verdict == "error" and at.detail.startswith("timeout")
        (half,) = verifiers.verify_many([("follow", "a", {"functions": [endless, "def evaluate(s): return True"]}, "")])
        assert (half.verdict, half.reward) == ("failed", 0.5)


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ({}, "'functions'"), ({"functions": []}, "'functions'"), ({"functions": "x"}, "'functions'"),
        ({"functions": [5]}, "function 1: is no text"),
        ({"functions": [UPPER, "def f("]}, "function 2: does not compile"),
        ({"functions": ["x = 1"]}, "defines no evaluate"), ({"functions": [UPPER], "threshold": 1}, "'threshold'"),
        ({"functions": [UPPER], "threshold": "0.5"}, "'threshold'"),
        ({"functions": [UPPER], "treshold": 0}, "treshold"),
    ],
)  # fmt: skip
def test_a_reference_that_can_t_be_used_is_an_error_that_says_why(reference: dict[str, Any], named: str) -> None:
    from reward.constraint_library import _problem

    assert named in _problem(reference)


def test_verify_uses_the_functions_on_completions_that_were_made_elsewhere(bench: Bench, tmp_path: Path) -> None:
    """The two rows beside a broken reference get their verdicts."""
    file = tmp_path / "made.jsonl"
    references = [REFERENCE, {"functions": "none"}, REFERENCE]
    lines = [
        {"task": "follow", "prompt": "Greet me.", "completion": text, "reference": reference}
        for text, reference in zip(("HI!", "HI!", "hello"), references, strict=True)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    rows = bench.run(VERIFY, {"data": str(file)})
    assert [row["verdict"] for row in rows] == ["passed", "error", "failed"]
    assert rows[1]["detail"].startswith("reference: 'functions' is 'none'")
    assert rows[0]["sandbox_level"] == bench.summary["sandbox"]["level"]


def test_evaluate_scores_a_model_by_the_functions(bench: Bench) -> None:
    prompts = [
        a_prompt(n, f"Greet {n}.", task="follow", family="follow", split="test", reference=json.dumps(REFERENCE))
        for n in range(4)
    ]
    engine = ScriptedEngine({f"Greet {n}.": "HI" if n else "hello" for n in range(4)})
    rows = bench.run(EVALUATE, {"samples": 0}, {"policy": engine}, prompts=prompts)
    assert [row["verdict"] for row in rows] == ["failed", "passed", "passed", "passed"]
    assert rows[0]["sandbox_level"] is not None
    assert bench.summary["scores"]["greedy"]["by_family"]["follow"]["score"] == 75.0
