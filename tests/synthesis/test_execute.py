import ast
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, RecipeError
from align.core.records import Row
from data_synthesis.execute import STAGE, ExecuteConfig, asks
from data_synthesis.pair import STAGE as PAIR
from data_synthesis.programs import entry_point, given_code
from data_synthesis.written_tests import read_asserts, read_inputs

from .conftest import Bench, a_completion, a_prompt
from .kills import assert_survives_kills

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
    assert summary["outcomes"] == {"passed": 2, "fails tests": 3, "does not run": 2, "runs out of time": 1}
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


GOOD = ["def add(a, b):\n    return a + b", "def add(a, b):\n    total = a + b\n    return total"]
MINUS = "def add(a, b):\n    return a - b"
FIRST = "def add(a, b):\n    return a"
ASSERTS = (
    "assert add(1, 2) == 3\nassert add(5, 5) == 10\nassert add(2, 0) == 2\nassert add(0, 4) == 4\nassert add(1, 1) == 3"
)
WRITTEN = {"tests": "written", "accept": "unsafe", "cpu_s": 0.5, "test_samples": 2}


def a_plain_task(number: int, text: str = "Write a function add that adds two numbers.", **more: Any) -> Row:
    return a_prompt(number, text, task="code", family="code", reference=None, **more)


def test_programs_are_believed_where_they_agree_on_tests_that_a_model_wrote(bench: Bench) -> None:
    """Five tests, the last of them wrong: no program passes it, so it does not count. `add(2, 0) == 2` is passed by all
    that run, and does not count either. The three good programs (two distinct) pass the other 3, MINUS and FIRST none:
    both are worse. One does not compile. Two answers with the same tests count twice: the score of the best group is
    sqrt(3) * 6 = 10.39. There is no reference.
    """
    asked: list[str] = []

    def tester(prompt: Any, index: int) -> str:
        asked.append(prompt[0]["content"])
        return f"Here are the tests:\n```python\n{ASSERTS}\n```"

    sampler = ScriptedEngine([GOOD[0], GOOD[1], MINUS, FIRST, SYNTAX, f"```python\n# the same\n{GOOD[0]}\n```"])
    settings = {**WRITTEN, "samples": 6}
    rows = bench.run(STAGE, settings, {"sampler": sampler, "tester": ScriptedEngine(tester)}, prompts=[a_plain_task(1)])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "failed", "failed", "failed", "passed"]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert [row["runs"] for row in rows] == [True, True, True, True, False, True]
    assert [row["kept"] for row in rows] == [True, True, False, False, False, False]
    assert [row["passes"] for row in rows] == [[0, 1, 2, 3], [0, 1, 2, 3], [2], [2], [], [0, 1, 2, 3]]
    assert rows[0]["detail"] == "one of 3 of 6 programs that agree on 3 tests"
    assert rows[0]["agreement"] == pytest.approx(10.3923, abs=1e-4)
    assert [row["group"] for row in rows] == [0, 0, 1, 1, None, 0]
    assert rows[5]["lost"] == "right, but the program of another" and rows[0]["entry_point"] == "add"
    assert json.loads(rows[0]["written_tests"]) == ASSERTS.splitlines() and rows[1]["written_tests"] is None
    assert len(json.loads(rows[0]["tester_words"])) == 2
    assert len(asked) == 2 and "assert add(ARGUMENTS) == VALUE" in asked[0] and "adds two numbers" in asked[0]
    summary = bench.summary
    assert summary["yield"] == {
        "prompts": 1, "sampled": 6, "run": 5, "decided": 5, "agreed": 3, "whole": 3, "distinct": 2, "kept": 2
    }  # fmt: skip
    assert summary["lost"] == {
        "does not run": 1, "passes clearly fewer tests": 2, "right, but the program of another": 1
    }  # fmt: skip
    assert summary["agreement"]["tests"] == {"answers": 2, "unread": 0, "written": 10, "distinct": 5, "telling": 3}
    pairs = bench.run(PAIR, {}, completions=rows)
    assert len(pairs) == 1 and pairs[0]["margin"] == 1.0


def test_a_prompt_without_a_clear_agreement_teaches_nothing(bench: Bench) -> None:
    """Prompt 1: two programs, one test each way. Prompt 2: the tests can't be read, twice for each of two answers."""

    def sampler(prompt: Any, index: int) -> str:
        return [GOOD[0], MINUS][index]

    def tester(prompt: Any, index: int) -> str:
        return "assert add(1, 2) == 3\nassert add(1, 2) == -1" if "two numbers" in str(prompt) else "assert True"

    prompts = [a_plain_task(1), a_plain_task(2, "Write add.")]
    engines = {"sampler": ScriptedEngine(sampler), "tester": ScriptedEngine(tester)}
    rows = bench.run(STAGE, {**WRITTEN, "samples": 2}, engines, prompts=prompts)
    assert [row["verdict"] for row in rows] == ["error"] * 4
    assert rows[0]["detail"] == "undecided: the best group passes too few tests that tell programs apart"
    assert rows[2]["detail"] == "undecided: no test could be read"
    assert bench.summary["agreement"]["prompts"] == {
        "the best group passes too few tests that tell programs apart": 1, "no test could be read": 1
    }  # fmt: skip
    assert bench.summary["agreement"]["tests"]["unread"] == 2
    yields = bench.summary["yield"]
    assert yields["sampled"] - sum(bench.summary["lost"].values()) == yields["kept"] == 0


STDIN_SUM = [
    "print(sum(map(int, input().split())))",
    "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))",
]
STDIN_MAX = "print(max(map(int, input().split())))"
CASES = (
    '{"cases": [{"stdin": "1 2", "stdout": "3"}, {"stdin": "4 4", "stdout": "8"}, {"stdin": "2 5\\n", "stdout": "%s"}]}'
)


@pytest.mark.parametrize(("expected", "third"), [("written", "7"), ("agreed", "wrong")])
def test_programs_that_read_input_get_inputs_and_written_or_agreed_outputs(
    bench: Bench, expected: str, third: str
) -> None:
    """Most programs read standard input, so inputs are asked for. With `agreed` the writer's outputs don't matter: on
    all three inputs two of three programs write the sum. A system prompt and an earlier turn are shown to the writer.
    """
    seen: list[str] = []

    def tester(prompt: Any, index: int) -> str:
        seen.append(prompt[0]["content"])
        return CASES % third

    row = a_plain_task(1)
    row["prompt"] = [
        {"role": "system", "content": "أجب ببرنامج فقط."}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "您好"}, {"role": "user", "content": "读入两个整数,输出它们的和。"},
    ]  # fmt: skip
    engines = {"sampler": ScriptedEngine([*STDIN_SUM, STDIN_MAX]), "tester": ScriptedEngine(tester)}
    rows = bench.run(STAGE, {**WRITTEN, "samples": 3, "expected": expected}, engines, prompts=[row])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "failed"]
    assert all(text in seen[0] for text in ("أجب ببرنامج فقط.", "你好", "您好", "输出它们的和"))
    assert rows[0]["prompt"] == row["prompt"] and rows[0]["entry_point"] is None
    assert json.loads(rows[0]["written_tests"])[0] == {"stdin": "1 2", "stdout": "3" if expected == "written" else None}


def test_the_reference_can_say_how_often_the_agreement_was_right(bench: Bench) -> None:
    """The programs agree on MINUS with tests to suit it; the reference knows better."""
    minus = [MINUS, "def add(a, b):\n    return -b + a"]
    tests = "assert add(3, 1) == 2\nassert add(5, 2) == 3\nassert add(9, 1) == 8"
    engines = {"sampler": ScriptedEngine([*minus, GOOD[0]]), "tester": ScriptedEngine(tests)}
    rows = bench.run(STAGE, {**WRITTEN, "samples": 3, "check": True}, engines, prompts=[a_task(1)])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "failed"]
    assert [row["reference_verdict"] for row in rows] == ["failed", "failed", "passed"]
    assert bench.summary["agreement"]["checked"] == {
        "kept: failed by reference": 2, "rejected: passed by reference": 1
    }  # fmt: skip


def test_equal_programs_are_kept_once_and_the_most_different_ones_first(bench: Bench) -> None:
    texts = [RIGHT, FENCED, f"{RIGHT}  # the sum", GOOD[1], "def add(*both):\n    return sum(both)"]
    settings = {**SETTINGS, "samples": 5, "keep": 2}
    rows = bench.run(STAGE, settings, {"sampler": ScriptedEngine(texts)}, prompts=[a_task(1)])
    assert [row["verdict"] for row in rows] == ["passed"] * 5
    assert [row["lost"] for row in rows] == [
        None, "right, but the program of another", "right, but the program of another", None, "right, but beyond `keep`"
    ]  # fmt: skip
    assert bench.summary["yield"] == {
        "prompts": 1, "sampled": 5, "run": 5, "passed": 5, "whole": 5, "distinct": 3, "kept": 2
    }  # fmt: skip


def test_tests_are_read_as_codet_reads_them() -> None:
    """Those that name the function and compile; a line that breaks off, other names and plain words are passed over."""
    said = (
        "Sure:\nassert f([1,2]) == 3, 'sum'\nassert g(1) == 1\nassert f(\n    [4]\n) == 4\nf(3) == 3\n"
        "assert f([1) == 1\nassert f is not None"
    )
    assert read_asserts(said, "f") == ["assert f([1, 2]) == 3", "assert f([4]) == 4", "assert f is not None"]
    with pytest.raises(MalformedError, match="no assertion in it that names h"):
        read_asserts(said, "h")
    assert read_inputs('So:\n{"cases": [{"stdin": "1", "stdout": "2"}]} done', agreed=False) == [("1", "2")]
    assert read_inputs('{"cases": [{"stdin": "1"}]}', agreed=True) == [("1", None)]
    for broken in (
        "none",
        "{",
        '{"cases": []}',
        '{"cases": [{"stdin": "1"}]}',
        '{"cases": [{"stdin": 1, "stdout": ""}]}',
    ):
        with pytest.raises(MalformedError):
            read_inputs(broken, agreed=False)


def test_the_function_under_test_is_the_one_that_most_programs_define() -> None:
    helper = "def helper(x):\n    return x\n"
    assert (
        entry_point("Write it.", [f"{helper}def run(x):\n    return helper(x)", "def run(x):\n    return x"]) == "run"
    )
    assert entry_point("Write run(x).", ["def run(x):\n    return x", "def other(x):\n    return x"]) == "run"
    assert entry_point("编写函数run(x)。", ["def run(x):\n    return x", "def other(x):\n    return x"]) == "run"
    assert entry_point("Write it.", [f"{helper}def go(x):\n    return helper(x)"]) == "go"
    head = 'def f(x):\n    """Adds one."""\n'
    assert entry_point(head, ["    return x + 1"]) == "f" and given_code(head, "f") == head
    assert entry_point("Say hello.", ["hello", "def (:"]) == "" and given_code("Write f.", "f") == ""


def test_programs_that_go_on_from_the_instructions_head_are_run_with_it(bench: Bench) -> None:
    head = 'def add(a, b):\n    """Adds two numbers."""\n'
    engines = {
        "sampler": ScriptedEngine(["    return a + b", "    return b + a", "    return a"]),
        "tester": ScriptedEngine(ASSERTS),
    }
    rows = bench.run(STAGE, {**WRITTEN, "samples": 3}, engines, prompts=[a_plain_task(1, head)])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "failed"]


def test_the_writer_of_tests_is_named_where_it_is_needed_and_only_there(bench: Bench) -> None:
    engine = ScriptedEngine([RIGHT])
    with pytest.raises(RecipeError, match="needs the engine `tester`"):
        bench.run(STAGE, WRITTEN, {"sampler": engine}, prompts=[a_plain_task(1)])
    with pytest.raises(RecipeError, match="only with tests=written"):
        bench.run(STAGE, SETTINGS, {"sampler": engine, "tester": engine}, prompts=[a_task(1)])
    asked = asks(ExecuteConfig(tests="written", samples=4, temperature=[0.5, 1.0], test_samples=3))
    assert (asked["sampler"].samples, asked["tester"].samples) == (8, 3)
    assert "tester" not in asks(ExecuteConfig())


def test_execution_with_written_tests_survives_kills(tmp_path: Path) -> None:
    def sampler(prompt: Any, index: int) -> str:
        return [*GOOD, MINUS, FIRST][(index + len(str(prompt))) % 4]

    answers = {
        "sampler": sampler, "sampler-2": lambda prompt, index: GOOD[index % 2], "tester": lambda prompt, index: ASSERTS
    }  # fmt: skip
    prompts = [a_plain_task(i, f"Write add{' please' * i}.") for i in range(3)]
    rows = assert_survives_kills(tmp_path, "execute", {**WRITTEN, "samples": 3}, {"prompts": prompts}, answers)
    assert any(row["kept"] for row in rows)


def _mutated(code: str) -> Iterator[str]:
    """Yields programs that differ in one constant, comparison or operation."""
    swaps: dict[type, type] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq, ast.LtE: ast.Gt, ast.GtE: ast.Lt,
    }  # fmt: skip
    for number in range(sum(1 for _ in ast.walk(ast.parse(code)))):
        tree = ast.parse(code)
        node = list(ast.walk(tree))[number]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        elif isinstance(node, ast.BinOp) and type(node.op) in swaps:
            node.op = swaps[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            node.ops[0] = swaps[type(node.ops[0])]()
        else:
            continue
        yield ast.unparse(tree)


@pytest.mark.real_data
def test_of_real_solutions_and_mutated_ones_the_real_ones_are_agreed_on(bench: Bench) -> None:
    """The first 30 problems of MBPP with two mutants: three spellings of the solution and both mutants, against the
    real assertions and one with a wrong value. A mutant may pass all assertions; then nothing tells it apart.
    """
    folder = os.environ.get("ALIGN_TEST_DATA")
    if not folder:
        pytest.skip("ALIGN_TEST_DATA is not set")
    lines = (Path(folder) / "mbpp_train_val" / "mbpp_train_val.jsonl").read_text().splitlines()
    found = ((row, list(_mutated(row["code"]))) for row in map(json.loads, lines) if not row["test_setup_code"])
    problems = list(islice(((row, mutants) for row, mutants in found if len(mutants) > 1), 30))
    solutions, tests = {}, {}
    for row, mutants in problems:
        code = row["code"].replace("\r", "")
        solutions[row["text"]] = [code, f"import math\n{code}", f"{code}\nunused = 0", mutants[0], mutants[-1]]
        left, _, _ = row["test_list"][0].rpartition("==")
        tests[row["text"]] = "\n".join([*row["test_list"], f"{left} == 'wrong'"] if left else row["test_list"])

    def tester(prompt: Any, index: int) -> str:
        return next(its for text, its in tests.items() if text in prompt[0]["content"])

    engines = {
        "sampler": ScriptedEngine(lambda prompt, index: solutions[prompt[0]["content"]][index]),
        "tester": ScriptedEngine(tester),
    }
    settings = {**WRITTEN, "samples": 5, "min_tests": 1, "test_samples": 1, "unanimous": True}
    rows = bench.run(
        STAGE, settings, engines, prompts=[a_plain_task(i, row["text"]) for i, (row, _) in enumerate(problems)]
    )
    by_prompt = [rows[start : start + 5] for start in range(0, len(rows), 5)]
    decided = [its for its in by_prompt if any(row["verdict"] == "passed" for row in its)]
    right = [its for its in decided if all(row["verdict"] == "passed" for row in its[:3])]
    assert len(by_prompt) == 30 and len(right) >= 0.95 * len(by_prompt)
