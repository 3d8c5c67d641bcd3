"""One table of verifiers: verdicts in order, whatever the tasks, and no row that stops another."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from reward import verifiers as module
from reward.verifiers import CHUNK, VERIFIERS, Verifiers, VerifyRow

GOLD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "math": ("#### 72", "#### 73", {"answer": "72"}),
    "code": ("def f(x):\n    return x + 1", "def f(x):\n    return x", {"tests": ["assert f(1) == 2"]}),
    "follow": ("A", "a", {"functions": ["def evaluate(s): return s.isupper()"]}),
    "constraints": ("a b", "a, b", {"constraints": [{"id": "punctuation:no_comma"}]}),
    "exact": ("a", "b", {"answer": "a"}),
    "tags": ('["a"]', '["b"]', {"tags": ["a"]}),
    "principle": ("of course", "no", {"kind": "benign", "any": ["of course"], "none": []}),
}


def test_every_task_takes_its_gold_answer_and_refuses_a_near_miss() -> None:
    assert set(GOLD) == set(VERIFIERS)
    with Verifiers() as verifiers:
        for task, (good, bad, reference) in GOLD.items():
            assert verifiers.verify(task, good, reference).verdict == "passed", task
            assert verifiers.verify(task, bad, json.dumps(reference)).verdict == "failed", task


def test_rows_of_interleaved_tasks_keep_their_order() -> None:
    """Code runs apart from the rest; over more than one chunk, every third right answer is a wrong one."""
    rows: list[VerifyRow] = []
    expected = []
    for i in range(CHUNK + 50):
        task = ("math", "code", "tags", "exact")[i % 4] if i % 8 < 4 else ("math", "exact")[i % 2]
        good, bad, reference = GOLD[task]
        rows.append((task, bad if i % 3 == 0 else good, reference, ""))
        expected.append("failed" if i % 3 == 0 else "passed")
    with Verifiers() as verifiers:
        assert [v.verdict for v in verifiers.verify_many(rows)] == expected


def test_rows_are_read_one_chunk_at_a_time() -> None:
    read = 0

    def rows() -> Iterator[VerifyRow]:
        nonlocal read
        for _ in range(10 * CHUNK):
            read += 1
            yield "exact", "a", {"answer": "a"}, ""

    with Verifiers() as verifiers:
        verdicts = verifiers.verify_many(rows())
        for _ in range(CHUNK):
            next(verdicts)
        assert read == CHUNK
        next(verdicts)
        assert read == 2 * CHUNK


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (("maths", "x", {}, ""), "did you mean 'math'"),
        (("", "x", {}, ""), "task"),
        ((None, "x", {}, ""), "task"),
        (("math", None, {"answer": "1"}, ""), "completion"),
        (("math", ["#### 1"], {"answer": "1"}, ""), "completion"),
        (("math", "#### 1", None, ""), "reference"),
        (("math", "#### 1", "{broken", ""), "reference"),
        (("math", "#### 1", "[1]", ""), "reference"),
        (("math", "#### 1", 5, ""), "reference"),
        (("math", "#### 1", "[" * 99_999, ""), "reference"),
        (("code", "x = 1", {"tests": "no list"}, ""), "reference"),
        (("code", 5, {"tests": []}, ""), "completion"),
    ],
)
def test_a_bad_row_is_an_error_and_its_neighbours_are_verified(row: VerifyRow, named: str) -> None:
    good: VerifyRow = ("math", "#### 1", {"answer": "1"}, "")
    with Verifiers() as verifiers:
        before, bad, after = verifiers.verify_many([good, row, good])
    assert (before.verdict, after.verdict) == ("passed", "passed")
    assert (bad.verdict, bad.reward) == ("error", None)
    assert named in bad.detail


def test_a_bug_in_a_verifier_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(completion: str, reference: Any) -> Any:
        return 1 / len(completion)

    monkeypatch.setitem(module.VERIFIERS, "exact", broken)
    with Verifiers() as verifiers:
        found = list(verifiers.verify_many([("exact", "", {}, ""), ("math", "#### 1", {"answer": "1"}, "")]))
    assert found[0].verdict == "error" and "ZeroDivisionError" in found[0].detail
    assert found[1].verdict == "passed"


def test_no_sandbox_starts_without_code() -> None:
    with Verifiers() as verifiers:
        verifiers.verify("math", "#### 1", {"answer": "1"})
        assert verifiers.sandbox_report is None
        assert VERIFIERS["code"] is None
        verifiers.verify("code", *GOLD["code"][::2])
        assert verifiers.sandbox_report is not None


def test_a_completion_may_go_on_from_the_function_head_that_its_prompt_gave() -> None:
    head = 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """One more."""\n'
    reference = {"check": "def check(candidate):\n    assert candidate(1) == helper(1)", "entry_point": "f"}
    body = "    return helper(x)\n"
    chat = [{"role": "user", "content": f"Complete this:\n```python\n{head}```"}]
    whole = f"```python\n{head}{body}```"
    rows = [
        ("code", body, reference, head),
        ("code", body, reference, chat),
        ("code", whole, reference, chat),
        ("code", "    return x\n", reference, head),
        ("code", body, reference, "Write f."),
    ]
    with Verifiers() as verifiers:
        found = [verdict.verdict for verdict in verifiers.verify_many(rows)]
    assert found == ["passed", "passed", "passed", "failed", "failed"]
