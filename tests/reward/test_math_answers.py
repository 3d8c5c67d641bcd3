"""The verifier of `math`: what it takes for the final answer, and when two answers are the same."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.formulas import Formulas
from reward.math_answers import final_answer, same_answer, verify
from reward.same_answer import compare

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


MORE_SPELLINGS = [
    ("JUNE 20", "June 20"), ("no", "No"),
    ("(5)", "5"), ("{5}", "5"), ("B and A", "A, B"), ("y = 2", "2"),
    (r"\frac{1,234}{5}", "246.8"), (r"\left[-36, 104\right]", "[-36,104]"), (r"\{1,234\}", "1, 234"),
    ("-1,234", "-1234"), (r"\left[\begin{matrix}1\\2\end{matrix}\right]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("{0, 1}", "1,0"), (r"\{5\}", "5"), ("5", r"\{5\}"), ("25%", "25"), (r"25\%", "0.25"), ("0.25", r"25\%"),
    ("25", r"25\%"), ("1 234", "1234"), ("1{,}234", "1234"), ("1.234,5", "1234.5"), ("1.234.567", "1234567"),
    (r"10\,000", "10000"), ("€5", "5"), ("£3.50", "3.5"), (r"5\text{ cm}", "5"), (r"5\text{ m}", "5"),
    (r"6\sqrt{3}\text{ cm}^2", r"6\sqrt{3}"), (r"12\pi\text{ square inches}", r"12\pi"), (r"12\pi cm", r"12 \pi"),
    (r"\frac{1}{2}\text{ hour}", "0.5"), ("52", "52_8"), ("52_{8}", "52_8"), (r"x \in [-2,7]", "[-2,7]"),
    (r"\pi r^2", r"r^2\pi"), (r"2\pi x", r"2 x \pi"), ("y=2x+1", "2x+1"), ("2x+1", "y=2x+1"), ("2x+3y=6", "3y=6-2x"),
    ("2x+3y=6", "4x+6y=12"), ("y=2x+1", "2x-y=-1"), ("x = 3+4 = 7", "7"), ("3+4=7", "7"), ("AB = 5", "5"),
    (r"\angle ABC = 50^\circ", "50"), ("f(x) = x+1", "x+1"), (r"\pm 3", "3, -3"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"), ("3 and -3", "3,-3"), (r"x=1 \text{ or } x=2", "1,2"),
    (r"\{1,2\}", "1,2"), (r"\{2,1\}", r"\{1,2\}"), (r"0.\overline{3}", "1/3"), (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"(-\infty, 3]", r"(-\infty,3]"), (r"(3, +\infty)", r"(3,\infty)"), ("6-5i", "-5i+6"), ("(1+i)^2+x", "2i+x"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt2}"), (r"\emptyset", r"\varnothing"), ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"),
    ("2*pi", r"2\pi"), ("pi/4", r"\frac{\pi}{4}"), ("1024", "2^{10}"), (r"\text{Evelyn}", "Evelyn"),
    (r"\mathrm{(C)}", "C"), ("even", r"\text{even}"), (r"3\frac{1}{2}", "7/2"), (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{-1}{2}", "-0.5"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\ 2\end{bmatrix}"),
    (r"5 \times 10^{4}", "50000"), ("1.5e3", "1500"), ("2:3", "2:3"), (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    (r"0.5\sqrt{2}", r"\frac{\sqrt2}{2}"), (r"90^{\circ}", "90"), (r"3^\circ\text{C}", "3"), (r"\$32,348", "32348"),
    (r"\$32,\!348", "32348"), (r"\theta+1", r"1+\theta"), ("(x-1)(x+1)", "x^2-1"), (r"4 \text{ and } 5", "5,4"),
    (r"\frac{3}{2}", "1.5"),
]  # fmt: skip
"""An answer, and what is expected; not always the same the other way round."""

MORE_NEAR_MISSES = [
    ("2ab", "2AB"),
    ("2x = 4", "x = 2"), ("(5)", "-5"), ("x = 2", "x = 3"),
    ("(-1,200)", "-1200"), ("(1,200)", "1200"), ("[-36,104]", "-36104"), ("5", r"(-\infty,5]"),
    ("x+2", r"(1,2)\cup(3,4)"), (r"\{5\}", "6"), ("26%", "25"), ("0.25", "25"), ("2.5", r"25\%"), ("(1,2)", "1,2"),
    ("(2,3,5)", "(5,3,2)"), ("[1,2]", "(1,2)"), ("no", "on"), ("SAS", "SSA"), ("52_8", "52_9"), ("42", "52_8"),
    ("52_8", "52"), (r"10 \text{ am}", r"10 \text{ pm}"), ("10 am", "10 pm"), ("5 million", "5"),
    (r"5\text{ million}", "5"), ("x^2=5", "5"), ("2x=10", "10"), ("5", "2x=5"), ("x=5", "6"), ("15^2", "225"),
    ("10+5", "15"), (r"\sqrt{25}", "5"), ("3.14159265359", r"\pi"), ("0.3333", r"\frac13"), ("1.234", "1234"),
    ("1,23", "123"), ("3,5", "3.5"), ("1,234", "1.234"), ("6-5i", "6+5i"), ("y=2x+1", "y=2x-1"),
    ("2x+3y=6", "2x+3y=7"), ("2x+3y=6", "3x+2y=6"), (r"\pm 3", "3"), ("3", r"\pm 3"), ("3,3", "3,-3"),
    (r"\{1,2\}", r"\{1,2,3\}"), (r"\text{Evelyn}", r"\text{Angela}"), ("A", "B"), ("x^2+1", "y^2+1"),
    (r"3\sqrt{13}", r"13\sqrt{3}"), (r"\frac{2}{3}", r"\frac{3}{2}"), (r"\pi", r"2\pi"), (r"\frac{\pi}{2}", "90"),
    ("3x", "3y"), (r"-\frac12", r"\frac12"), ("June 20", "June 21"), (r"1\frac12", r"\frac{11}{2}"), ("72,000", "72"),
    ("7 2", "72"), ("12 34", "1234"), ("a-b", "b-a"), ("e^{2}", "7.389"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"), (r"\sin x", r"\cos x"),
    ("(1,2),(3,4)", "(1,2),(4,3)"), (r"(-\infty,1)\cup(2,3)", r"(-\infty,1)\cup(2,4)"), ("east", "seat"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), MORE_SPELLINGS)
def test_an_answer_may_be_spelt_otherwise_than_the_reference(answer: str, expected: str) -> None:
    """Percentages, separators, currencies, units, bases, names, both signs, sets, equations: without math-verify."""
    assert compare(answer, expected) is True


@pytest.mark.parametrize(("answer", "expected"), MORE_NEAR_MISSES)
def test_what_looks_like_the_reference_and_is_not_it_is_refused(answer: str, expected: str) -> None:
    assert compare(answer, expected) is False


def test_a_way_to_a_number_is_no_number_but_a_number_will_do_for_a_way_to_it() -> None:
    for way, number in (("10 + 5", "15"), ("15^2", "225"), (r"2^{10}", "1024")):
        assert compare(way, number) is False
        assert compare(number, way) is True


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
@pytest.mark.parametrize("column", ["answer", "gt", "solution"])
def test_sampled_solutions_get_the_verdict_of_the_public_grader_but_for_one_that_it_misread(column: str) -> None:
    """The one: the grader refused "10000" for the reference "10{,}000". All 400 are decided without math-verify."""
    rows = _lines("math_cot_rm8_even", "math_cot_50.jsonl")
    differ = []
    with Formulas() as formulas:
        for row in rows:
            for sample, (solution, right) in enumerate(zip(row["code"], row["score"], strict=True)):
                verdict = verify(solution, {"answer": row[column]}, formulas).verdict
                assert verdict != "error"
                if (verdict == "passed") != right:
                    differ.append((row["idx"], sample, row["answer"], final_answer(solution)))
    assert differ == [(72, 7, "10{,}000", "10000")]
    assert formulas.report is None


@real_data
@needs_data
def test_no_reference_of_another_problem_is_taken_for_the_right_one() -> None:
    """All pairs of the different references: those that are the same are other spellings of one number."""
    references = sorted({final_answer(row["solution"]) or "" for row in _lines("math_sample", "math_test_500.jsonl")})
    same = {(a, b) for a in references for b in references if a < b and compare(a, b)}
    assert same == {
        (r"-\frac12", r"-\frac{1}{2}"), ("1", r"100\%"), ("100", r"100\%"), ("120", r"120^\circ"),
        ("135", r"135\text{ square feet}"), ("180", r"180^\circ"), ("20", r"20\%"), (r"20\%", r"\frac{1}{5}"),
        ("25", r"25^\circ"), ("50", r"50^\circ"), ("6", r"\$6"), ("75", r"75^\circ"), (r"\$0.50", r"\frac{1}{2}"),
        (r"\dfrac{5}{6}", r"\frac{5}{6}"), (r"\frac14", r"\frac{1}{4}"), (r"\sqrt 5", r"\sqrt{5}"),
    }  # fmt: skip
