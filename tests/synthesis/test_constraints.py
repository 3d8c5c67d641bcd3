"""The library of constraints: augmented, written, cross-validated, told back; with scripted models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.asking import MalformedError
from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import COLUMNS, Kind
from align.core.sandbox import Sandbox
from data_synthesis.constraint_answers import read_function, read_lines, read_relation, read_sentence
from data_synthesis.constraints import STAGE, ConstraintsConfig, read_seeds
from reward.constraint_library import agreement, outcomes, problem_of

from .conftest import Bench
from .kills import assert_survives_kills

UPPER = "def evaluate(s): return s.isupper()"
SHORT = "def evaluate(s): return len(s) < 4"
ALWAYS = "def evaluate(s): return True"
BROKEN = "def evaluate(s) return"
CASES = [("CAT", True), ("cat", False)]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1, cpu_s=0.5) as started:
        yield started


@pytest.fixture(autouse=True)
def one_sandbox(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share one: starting it takes longer than all that runs in it."""
    monkeypatch.setattr("data_synthesis.constraints.Sandbox", lambda **settings: nullcontext(sandbox))


def written(function: str, *cases: tuple[str, bool]) -> str:
    return json.dumps({"func": function, "cases": [{"input": text, "output": met} for text, met in cases or CASES]})


def a_writer(functions: dict[str, list[str]], new: str = "", backs: dict[str, str] | None = None) -> ScriptedEngine:
    """Answers by what stands in the question: a constraint, a function, or the seeds."""

    def answer(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        for function, back in (backs or {}).items():
            if function in text:
                return back
        if "Write a Python function" in text:
            said = next(answers for constraint, answers in functions.items() if f"Demand: {constraint}\n" in text)
            return said[index % len(said)]
        return "A sentence." if "Python function" in text else new

    return ScriptedEngine(answer)


def a_judge(contradicts: Callable[[str], bool] = lambda text: False) -> ScriptedEngine:
    def answer(prompt: Any, index: int) -> str:
        return '{"relation": "contradiction"}' if contradicts(prompt[0]["content"]) else "entailment"

    return ScriptedEngine(answer)


def settings(**more: Any) -> dict[str, Any]:
    return {"seeds": ["Use capitals."], "new": 0, "verifiers": 3, "attempts": 1, "max_error_share": 1.0, **more}


def test_a_constraint_whose_functions_and_cases_agree_is_a_prompt_of_the_library(bench: Bench) -> None:
    """Three functions, of which one always says true. Of the cases CAT is agreed on by all three, cat by the other two:
    2 of 3, above 0.5. The two functions are right on both cases, the third on one of two, which is not above 0.5.
    """
    writer = a_writer(
        {"Use capitals.": [written(UPPER), written(ALWAYS), written("def evaluate(s): return s == s.upper()")]}
    )
    rows = bench.run(STAGE, settings(), {"writer": writer, "judge": a_judge()})
    assert set(COLUMNS[Kind.PROMPTS]) <= set(rows[0])
    (row,) = rows
    assert row["prompt"] == [{"role": "user", "content": "Use capitals."}]
    assert row["functions"] == [UPPER, "def evaluate(s): return s == s.upper()"]
    assert row["accuracies"] == [1.0, 1.0]
    assert json.loads(row["cases"]) == [["CAT", True], ["cat", False]]
    assert (row["told_back"], row["relations"]) == (["A sentence."] * 2, ["entailment"] * 2)
    assert json.loads(row["reference"])["functions"] == row["functions"]
    assert (row["task"], row["split"], row["origin"]) == ("follow", "train", "seed")
    assert len(json.loads(row["raw"])) == 3
    assert bench.summary["yield"] == {
        "seeds": 1, "constraints": 1, "written": 1, "agreed": 1, "told back": 1, "kept": 1,
    }  # fmt: skip


def test_every_constraint_is_kept_or_lost_for_a_reason(bench: Bench) -> None:
    """Of six constraints each but the first is lost in another way, so kept + lost = constraints."""
    functions = {
        "Good.": [written(UPPER)],
        "Unreadable.": ["I can't."],
        "Broken.": [written(BROKEN)],
        "Disputed.": [written(UPPER, ("cat", True), ("CAT", False))],
        "One-sided.": [written(ALWAYS, ("CAT", True))],
        "Contradicted.": [written(SHORT, ("CAT", True), ("LONGER", False))],
    }
    engines = {"writer": a_writer(functions), "judge": a_judge(lambda text: "Contradicted." in text)}
    rows = bench.run(STAGE, settings(seeds=list(functions)), engines)
    assert [row["constraint"] for row in rows] == ["Good."]
    assert bench.summary["lost"] == {
        "too few functions that compile": 2,
        "no case that enough functions agree with": 1,
        "its cases are all true, or all false": 1,
        "told back, every function contradicts it": 1,
    }
    steps = bench.summary["yield"]
    assert steps == {"seeds": 6, "constraints": 6, "written": 4, "agreed": 2, "told back": 2, "kept": 1}
    assert steps["kept"] + sum(bench.summary["lost"].values()) == steps["constraints"]
    assert bench.summary["lost_examples"]["too few functions that compile"] == ["Unreadable.", "Broken."]
    assert bench.summary["functions"] == {
        "asked for": 18, "could not be read": 3, "does not compile": 3, "written": 4, "the same as another": 8,
        "agreed": 2, "contradict": 1, "not told back": 0, "relation could not be read": 0, "kept": 1,
    }  # fmt: skip


def test_only_the_functions_that_are_contradicted_when_told_back_are_dropped(bench: Bench) -> None:
    small = "def evaluate(s): return s < 'a'"
    engines = {
        "writer": a_writer(
            {"Use capitals.": [written(UPPER), written(small), written("def evaluate(s): return s != 'cat'")]},
            backs={UPPER: "Write in capitals.", small: "Be short.", "!= 'cat'": "One line.\nAnother line."},
        ),
        "judge": a_judge(lambda text: "Be short." in text),
    }
    (row,) = bench.run(STAGE, settings(case_kept="above 0", function_kept="at least 0.5"), engines)
    assert (row["functions"], row["told_back"]) == ([UPPER], ["Write in capitals."])
    assert bench.summary["functions"]["contradict"] == 1
    assert bench.summary["functions"]["not told back"] == 1


def test_the_code_s_preset_asks_for_three_functions_and_ten_cases_and_any_number_can_be_set() -> None:
    config = ConstraintsConfig.model_validate({"preset": "code", "min_cases": 4})
    assert (config.min_functions, config.min_cases, config.case_kept, config.function_kept, config.new) == (
        3, 4, "above 0", "at least 0.8", 50,
    )  # fmt: skip
    paper = ConstraintsConfig()
    assert (paper.min_functions, paper.case_kept, paper.function_kept) == (1, "above 0.5", "above 0.5")
    with pytest.raises(ValidationError, match='"above" or "at least"'):
        ConstraintsConfig(case_kept="0.5")
    with pytest.raises(ValidationError, match="no constraint"):
        ConstraintsConfig(seeds=[" "])


def test_paper_and_code_keep_other_cases_and_functions() -> None:
    """Four functions, four cases that are to be true. Right: a on 1, 2, 3; b on 1, 2; c on 1; d on 1, 2, 3, 4.

    Agreement by case: 4, 3, 2 and 1 of 4. Paper (above 0.5): cases 1, 2. On them a, b, d are right on 2 of 2, c on 1 of
    2, which is not above 0.5. Code (above 0): all four cases; a 0.75, b 0.5, c 0.25, d 1: at least 0.8 is d alone.
    """
    said = [[True, True, True, False], [True, True, "raised X", False], [True, False, False, False], [True] * 4]
    paper = agreement(said, [True] * 4, "above 0.5", "above 0.5")
    assert (paper.cases, paper.functions, paper.accuracies) == ([0, 1], [0, 1, 3], [1.0, 1.0, 0.5, 1.0])
    code = agreement(said, [True] * 4, "above 0", "at least 0.8")
    assert (code.cases, code.functions) == ([0, 1, 2, 3], [3])
    assert agreement([], [], "above 0", "above 0").functions == []


def test_a_function_that_never_says_yes_is_right_on_most_of_many_false_cases_and_is_dropped_all_the_same() -> None:
    """Five cases, the first of them true. The second function says false to all: right on 4 of 5, at least 0.8."""
    said = [[True, False, False, False, False], [False] * 5, [True, False, False, False, False]]
    expected = [True, False, False, False, False]
    assert agreement(said, expected, "above 0.5", "at least 0.8").functions == [0, 2, 1]
    assert agreement(said, expected, "above 0.5", "at least 0.8", tells_apart=True).functions == [0, 2]


def test_new_constraints_are_asked_for_with_the_seeds_and_those_known_or_too_long_are_left_out(bench: Bench) -> None:
    new = "Here are some more:\n1. Use no digits.\n- USE CAPITALS.\n* Use  no digits.\n" + " ".join(["word"] * 61)
    functions = {
        "Use capitals.": [written(UPPER)],
        "Use no digits.": [written(SHORT, ("a", True), ("long one", False))],
    }
    rows = bench.run(STAGE, settings(new=3), {"writer": a_writer(functions, new), "judge": a_judge()})
    assert [(row["constraint"], row["origin"]) for row in rows] == [
        ("Use capitals.", "seed"),
        ("Use no digits.", "new"),
    ]
    assert bench.summary["lines"] == {"new": 1, "repeated": 2, "too long": 1}


def test_new_constraints_that_were_cut_off_are_not_read(bench: Bench) -> None:
    """Else half a sentence would be a constraint."""

    def answer(prompt: Any, index: int) -> str | Completion:
        text = prompt[0]["content"]
        if "Some such demands" in text:
            return Completion("Use no digits.\nUse at lea", (1, 2), "length")
        return written(UPPER) if "Write a Python function" in text else "A sentence."

    rows = bench.run(STAGE, settings(new=2), {"writer": ScriptedEngine(answer), "judge": a_judge()})
    assert [row["constraint"] for row in rows] == ["Use capitals."]


def test_seeds_may_be_shown_some_at_a_time_and_each_request_answered_several_times(bench: Bench) -> None:
    """Five seeds, two at a time: three requests, two answers each."""
    seeds = [f"Seed {n}." for n in range(5)]
    asked = []

    def answer(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        if "Some such demands" in text:
            asked.append((text.count("Seed"), index))
            return f"New {len(asked)}."
        return written(UPPER) if "Write a Python function" in text else "A sentence."

    rows = bench.run(
        STAGE, settings(seeds=seeds, new=1, shown=2, answers=2, verifiers=1),
        {"writer": ScriptedEngine(answer), "judge": a_judge()},
    )  # fmt: skip
    assert sorted(asked) == [(1, 0), (1, 1), (2, 0), (2, 0), (2, 1), (2, 1)]
    assert sum(row["origin"] == "new" for row in rows) == 6


def test_constraints_in_other_languages_are_taken_as_they_are(bench: Bench) -> None:
    constraint = "请用不超过十个字回答。"
    function = "def evaluate(s): return len(s) <= 10"
    engines = {
        "writer": a_writer({constraint: [written(function, ("好的", True), ("这是一个非常非常长的回答", False))]}),
        "judge": a_judge(),
    }
    (row,) = bench.run(STAGE, settings(seeds=[constraint], max_words=10), engines)
    assert json.loads(row["reference"])["constraint"] == constraint
    assert "好的" in row["cases"]


def test_where_nothing_is_kept_the_stage_says_why(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"none of 1 constraints kept a function \(too few functions that compile: 1"):
        bench.run(STAGE, settings(), {"writer": a_writer({"Use capitals.": ["no"]}), "judge": a_judge()})


def test_an_answer_is_read_strictly() -> None:
    fenced = f"Here it is:\n```json\n{written(UPPER)}\n```\nDone."
    assert read_function(fenced) == read_function(written(UPPER)) == (UPPER, CASES)
    spelt = written(UPPER).replace("true", "True").replace("false", '"False"')
    assert read_function(spelt) == (UPPER, CASES)
    twice = r'{"func": "def evaluate(s):\\n    return True", "cases": [{"input": "a\\n", "output": true}]}'
    assert read_function(twice) == ("def evaluate(s):\n    return True", [("a\\n", True)])
    not_text, no_truth = '[{"input": 1, "output": true}]', '[{"input": "a", "output": "maybe"}]'
    for cases in ("", ', "cases": []', f', "cases": {not_text}', f', "cases": {no_truth}'):
        with pytest.raises(MalformedError):
            read_function('{"func": "x"' + cases + "}")
    for bad in ("", "[1]", '{"func": "", "cases": [{"input": "a", "output": true}]}', fenced * 2):
        with pytest.raises(MalformedError):
            read_function(bad)
    assert read_relation('{"relation": "Neutral"}') == read_relation("neutral.") == "neutral"
    for bad in ("no", "entailment or contradiction", '{"relation": null}'):
        with pytest.raises(MalformedError):
            read_relation(bad)
    assert read_sentence("<think>hm</think>\nBe short.\n") == "Be short."
    with pytest.raises(MalformedError):
        read_lines(" \n")


def test_what_a_function_says_of_a_text_is_true_false_or_why_neither(sandbox: Sandbox) -> None:
    """The loop ends after the CPU limit at `b`, and the texts after it are asked about all the same; so are those after
    a process that ended. Where it was asked to give up after one, the others are not asked about.
    """
    picky = (
        "import os\ndef evaluate(s):\n    while s == 'b': pass\n    if s == 'c': os._exit(0)\n"
        "    return {'1': 1, 't': 'True', 'f': ' false', 'l': [], 'd': 1 / len(s) > 0.3}[s]"
    )
    found = sandbox.run(lambda slot: outcomes(slot, picky, ["1", "b", "t", "c", "f", "l", "x", ""]))
    assert [each.partition(":")[0] if str(each).startswith("timeout") else each for each in found] == [
        True, "timeout", True, "ended: exit status 0", False, "gave a list",
        "raised KeyError", "raised ZeroDivisionError",
    ]  # fmt: skip
    given_up = sandbox.run(lambda slot: outcomes(slot, picky, ["b", "b", "1"], most_timeouts=1))
    assert given_up[1:] == ["timeout: given up after 1"] * 2
    early = sandbox.run(lambda slot: outcomes(slot, "raise ValueError\n" + UPPER, ["a", "b"]))
    assert early == ["raised ValueError before it was called"] * 2


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (UPPER, ""), ("evaluate = str.isupper", ""), (BROKEN, "does not compile"), ("x = 1", "defines no evaluate"),
        ("(" * 5000, "does not compile"), ("x" * 30_000, "longer"), ("\0", "does not compile"),
    ],
)  # fmt: skip
def test_a_function_that_can_t_be_run_is_known_without_running_it(function: str, problem: str) -> None:
    assert problem_of(function).startswith(problem) and bool(problem_of(function)) == bool(problem)


def test_the_shipped_seeds_are_distinct_and_seeds_may_come_from_a_file(tmp_path: Path) -> None:
    seeds = read_seeds("default")
    assert len(seeds) >= 36 and all(seed[-1] in '."' for seed in seeds)
    file = tmp_path / "seeds.txt"
    file.write_text("Be brief.\n\nbe  brief.\nUse no commas.\n")
    assert read_seeds(str(file)) == ["Be brief.", "Use no commas."]
    with pytest.raises(DataError, match="one constraint a line"):
        read_seeds(str(tmp_path / "none.txt"))


def test_a_killed_run_goes_on_without_asking_anything_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a fork of this process can't use its sandbox

    def writer(prompt: Prompt, index: int) -> str:
        text = str(prompt[0]["content"])  # type: ignore[index]
        if "Some such demands" in text:
            return "Use no digits.\nUse no commas."
        return [written(UPPER), "nothing"][index % 2] if "Write a Python function" in text else "A sentence."

    rows = assert_survives_kills(
        tmp_path, "constraints", {"seeds": ["Use capitals."], "new": 2, "verifiers": 2, "max_error_share": 0.5}, {},
        {"writer": writer, "judge": lambda prompt, index: "entailment"},
    )  # fmt: skip
    assert len(rows) == 3
