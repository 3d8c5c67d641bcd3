"""The verifier of `math`: what it takes for the final answer, and when two answers are the same."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.math_answers import final_answer, same_answer, verify

real_data = pytest.mark.real_data
needs_data = pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")


def _lines(*parts: str) -> list[dict]:
    return [json.loads(line) for line in Path(os.environ["ALIGN_TEST_DATA"], *parts).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("48 / 2 = 24, so 72.\n#### 72", "72"),
        ("#### 5\nno, wait\n#### 72", "72"),
        ("####72", "72"),
        ("####\n72", "72"),
        ("#### Answer: 72", "72"),
        (r"#### Conclusion" "\n" r"It is \boxed{72}.", "72"),
        ("#### Step 1: add\n3 + 4\nThe answer is 7.", "7"),
        (r"First \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"so $\boxed 5$.", "5"),
        ("So the answer is 72.", "72"),
        ("The answer is 72 clips. I hope it is correct.", "72"),
        ("The final answer is: **72**", "72"),
        ("the answer is 3 + 4 = 7", " 7"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is 2 million dollars", "2 million"),
    ],
)
def test_the_stated_final_answer_is_found(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Natalia sold 72 clips.",
        "The answer is 72. But then she lost 24, so 48 are left.",
        "####",
        r"\boxed{72",
        r"\boxed{}",
        "The answer is 70 or 72.",
        "The answer is",
    ],
)
def test_a_number_that_is_not_stated_as_the_answer_is_none(completion: str) -> None:
    assert final_answer(completion) is None
    assert verify(completion, {"answer": "72"}).verdict == "failed"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72.0", "72"),
        ("72.", "72"),
        ("+72", "72"),
        ("-0", "0"),
        ("1,234.50", "1234.5"),
        ("$72", "72"),
        (r"\$72", "72"),
        ("72%", "72"),
        ("72 clips.", "72"),
        ("5 km/h", "5"),
        ("2 million", "2,000,000"),
        ("7.2e1", "72"),
        (r"5 \times 10^4", "50000"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("1 1/2", "1.5"),
        (r"-1\frac{1}{2}", "-1.5"),
        ("**72**", "72"),
        ("−72", "-72"),
        (r"9,\!240", "9240"),
        (r"10{,}000", "10000"),
        ("x = 5", "5"),
        (r"75^\circ", "75"),
        (r"\text{(D)}", "D"),
        (r"\text{Sunday}", "sunday"),
        (r"\left( 1, \frac{1}{2} \right)", "(1, 0.5)"),
        (r"\{2, 1\}", r"\{1,2\}"),
        ("2, 1", "1, 2"),
        (r"(-\infty, -8) \cup (8, \infty)", r"(8,\infty)\cup(-\infty,-8)"),
        (r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}", r"\begin{pmatrix}1\\ \frac{1}{2}\end{pmatrix}"),
        (r"\frac{\sqrt{5}-1}{2}", r"(\sqrt5 - 1)/2"),
        ("2 + 3x", "3x+2"),
        ("5x - 7y = 0", "5x-7y=0"),
    ],
)
def test_spellings_of_one_answer_are_the_same(answer: str, expected: str) -> None:
    assert same_answer(answer, expected)
    assert same_answer(expected, answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("73", "72"),
        ("-72", "72"),
        ("720", "72"),
        ("72,000", "72"),
        ("72 thousand", "72"),
        ("7 2", "72"),
        ("0.333", "1/3"),
        ("0.3333333333333", "1/3"),
        ("18 dollars and 50 cents", "18"),
        ("10 pm", "10"),
        ("10 am", "10 pm"),
        ("2b", "2"),
        ("2ab", "2"),
        ("(2,1)", "(1,2)"),
        ("(1,2)", "[1,2]"),
        ("[1,2)", "[1,2]"),
        (r"\{1,2\}", r"\{1,2,3\}"),
        ("1, 1", "1, 2"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("2x+3", "3x+2"),
        (r"\sqrt{5}", r"\sqrt{6}"),
        (r"\pi", "3.14159"),
        ("Sunday", "Monday"),
        ("Sunday", "undSay"),
        ("", "72"),
        ("", ""),
    ],
)
def test_near_misses_are_not_the_same(answer: str, expected: str) -> None:
    assert not same_answer(answer, expected)
    assert not same_answer(expected, answer)


@pytest.mark.parametrize("reference", ["72", "#### 72", r"\boxed{72}", "48 + 24 = 72.\n#### 72", 72, 72.0])
def test_a_reference_may_be_an_answer_or_a_solution(reference: object) -> None:
    assert verify("#### 72", {"answer": reference}).verdict == "passed"
    failed = verify("#### 71", {"answer": reference})
    assert (failed.verdict, failed.reward) == ("failed", 0.0)
    assert "71" in failed.detail and "72" in failed.detail


@pytest.mark.parametrize("reference", [{}, {"answer": None}, {"answer": " "}, {"answer": ["72"]}, {"answer": "####"}])
def test_a_reference_without_an_answer_is_an_error(reference: dict) -> None:
    verdict = verify("#### 72", reference)
    assert (verdict.verdict, verdict.reward) == ("error", None)
    assert "reference.answer" in verdict.detail


MARK_UP = st.text(alphabet=r"\{}[](),.$%^_&=+-*/ 0123456789abex#\n", max_size=60)
PIECES = st.lists(
    st.sampled_from(
        ["\\frac", "\\sqrt", "\\boxed", "\\text{", "{", "}", "(", ")", "1", "2", "^", "####", "answer is ", "\n"]
    )
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), MARK_UP, PIECES.map("".join)), st.one_of(MARK_UP, PIECES.map("".join)))
def test_no_text_makes_it_raise(completion: str, answer: str) -> None:
    for text in (completion, f"#### {completion}", f"\\boxed{{{completion}}}", f"The answer is {completion}"):
        assert verify(text, {"answer": answer}).verdict in ("passed", "failed", "error")
    assert verify(f"#### {completion}", {"answer": "72"}).verdict in ("passed", "failed")


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_accepted_in_its_spellings_and_refused_as_another(number: int) -> None:
    for text in (f"{number}", f"{number:,}", f"{number}.0", f"\\boxed{{{number}}}"):
        assert verify(f"#### {text}" if "boxed" not in text else text, {"answer": str(number)}).verdict == "passed"
        assert verify(f"#### {text}" if "boxed" not in text else text, {"answer": str(number + 1)}).verdict == "failed"


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9^{9^{9}}",
        "1e999999999",
        "{" * 500_000,
        "\\boxed{" * 150_000,
        "####" * 250_000,
        "the answer is " * 70_000,
        "=" * 1_000_000,
        "(" * 1_000_000,
        "1+" * 500_000,
        "a" * 1_000_000,
        " " * 1_000_000,
        "1,000" * 200_000,
        "<<" * 500_000,
        "\n" * 1_000_000,
        "9" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_huge_or_hostile_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    for completion in (text, f"#### {text}", f"\\boxed{{{text}}}", f"The answer is {text}"):
        assert verify(completion, {"answer": "72"}).verdict == "failed"
    assert time.process_time() - start < 3


@real_data
@needs_data
def test_all_gsm8k_references_are_accepted_and_near_misses_refused() -> None:
    solutions = [row["answer"] for part in ("train", "test") for row in _lines("gsm8k", f"{part}.jsonl")]
    assert len(solutions) == 8792
    wrong = []
    for solution in solutions:
        reasoning, stated = solution.split("\n#### ")
        number = int(stated.replace(",", ""))
        expected = {
            str(number): "passed",
            solution: "passed",
            str(number + 1): "failed",
            str(-number) if number else "1": "failed",
        }
        wrong += [
            (solution, a) for a, verdict in expected.items() if verify(solution, {"answer": a}).verdict != verdict
        ]
        if verify(reasoning, {"answer": str(number)}).verdict != "failed":
            wrong.append((reasoning, "the right number only inside the reasoning"))
        elsewhere = f"{reasoning}\nThat makes {stated}.\n#### {number + 1}"
        if verify(elsewhere, {"answer": str(number)}).verdict != "failed":
            wrong.append((elsewhere, "another number stated"))
    assert wrong == []


@real_data
@needs_data
def test_all_math_references_are_accepted_in_simple_reformattings() -> None:
    rows = _lines("math_sample", "math_test_500.jsonl")
    assert len(rows) == 500
    wrong = []
    for solution in (row["solution"] for row in rows):
        answer = final_answer(solution) or ""
        spellings = {
            answer,
            f"${answer}$",
            f"{answer}.",
            answer.replace(" ", "") if r"\text" not in answer and r"\ " not in answer else answer,
            answer.replace(r"\frac", r"\dfrac").replace(r"\ddfrac", r"\dfrac"),
            answer.replace("(", r"\left(").replace(")", r"\right)").replace(r"\left\left", r"\left"),
        }
        wrong += [
            (answer, s) for s in spellings if verify(f"So $\\boxed{{{s}}}$.", {"answer": answer}).verdict != "passed"
        ]
        if verify(solution, {"answer": solution}).verdict != "passed" or same_answer(answer, f"{answer}+1"):
            wrong.append((answer, solution[-80:]))
    assert wrong == []


@real_data
@needs_data
def test_sampled_solutions_get_the_verdict_of_the_public_grader_but_for_one_that_it_misread() -> None:
    """The one: the grader refused "10000" for the reference "10{,}000"."""
    rows = _lines("math_cot_rm8_even", "math_cot_50.jsonl")
    differ = [
        (row["answer"], final_answer(solution))
        for row in rows
        for solution, right in zip(row["code"], row["score"], strict=True)
        if (verify(solution, {"answer": row["answer"]}).verdict == "passed") != right
    ]
    assert differ == [("10{,}000", "10000")]
