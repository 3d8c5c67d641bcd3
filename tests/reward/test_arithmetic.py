"""Arithmetic without `eval`, and the equations of worked solutions."""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.arithmetic import value, value_at
from reward.equations import equation_key, equations, equations_hold


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2", Fraction(24)),
        ("2 + 3 * 4", Fraction(14)),
        ("(2 + 3) * 4", Fraction(20)),
        ("10 - 2 - 3", Fraction(5)),
        ("-2^2", Fraction(-4)),
        ("2^-2", Fraction(1, 4)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1,200 * 3", Fraction(3600)),
        ("$5 x 2", Fraction(10)),
        ("5 × 2 ÷ 4", Fraction(5, 2)),
        ("2(3+4)", Fraction(14)),
        ("50*20%", Fraction(10)),
        ("7//2", Fraction(3)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("1.5e3", Fraction(1500)),
    ],
)
def test_arithmetic_is_exact(text: str, expected: Fraction) -> None:
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1/0",
        "1 2",
        "1 +",
        "(1",
        "1)",
        "9**9**9",
        "2**100000",
        "4**0.5",
        "1e99999",
        "__import__('os')",
        "²",
        "٣x",
        "(" * 300 + "1" + ")" * 300,
        "-" * 300 + "1",
        "1+" * 300 + "1",
    ],
)
def test_what_is_no_bounded_arithmetic_has_no_value(text: str) -> None:
    assert value(text) is None


def test_a_formula_has_a_value_at_a_point() -> None:
    """sqrt(2^2 + 5) - 1 = 2, halved."""
    assert value_at(r"\frac{\sqrt{x^2+5}-1}{2}", {"x": 2.0}) == pytest.approx(1.0)
    assert value_at("y", {"x": 2.0}) is None


def test_annotations_are_the_equations_of_a_solution_that_has_them() -> None:
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips, and 1 + 1 = 3.\n48+24 = <<48 + 24 = 72>>72\n#### 72"
    assert [(e.left, e.right, e.holds) for e in equations(text)] == [("48/2", "24", True), ("48 + 24", "72", True)]
    assert equation_key(text) == "48/2=24|48+24=72"
    assert equations_hold(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("She has 3 + 4 = 7 apples.", "3+4=7"),
        ("- 3 + 4 = 7", "3+4=7"),
        ("1. 3 + 4 = 7", "3+4=7"),
        ("So, in 2020, 3 + 4 = 7.", "3+4=7"),
        ("(3 + 4 = 7)", "3+4=7"),
        ("2*3+4 = 6+4 = 10", "2*3+4=6+4|6+4=10"),
        ("$5 × 2 = $10", "$5×2=$10"),
        ("1,000 + 500 = 1,500 dollars", "1,000+500=1,500"),
        ("45 + 21 = 66%", "45+21=66"),
        ("x = 5 and 2x = 10 and X*2 + 3 = 13", ""),
        ("100 / 5 = 5A", ""),
        ("3 apples + 4 = 7", ""),
        ("nothing", ""),
    ],
)
def test_plain_equations_are_found_and_algebra_is_left_alone(text: str, key: str) -> None:
    assert equation_key(text) == key
    assert equations_hold(text)


@pytest.mark.parametrize("text", ["<<3+4=8>>", "3 + 4 = 8", "<<1/3=0.332>>", "<<x=8>>", "<<8>>", "<<9**9**9=1>>"])
def test_a_wrong_equation_or_an_annotation_without_arithmetic_does_not_hold(text: str) -> None:
    assert not equations_hold(text)


def test_rounding_by_less_than_a_thousandth_holds() -> None:
    assert equations_hold("<<1/3=0.333>>")


def test_the_order_of_equations_makes_another_key() -> None:
    assert equation_key("<<1+1=2>><<2+2=4>>") != equation_key("<<2+2=4>><<1+1=2>>")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.text(alphabet="0123456789+-*/^=().,$% x<>\n", max_size=80)))
def test_no_text_makes_it_raise(text: str) -> None:
    assert isinstance(equation_key(text), str)
    assert value(text) is None or isinstance(value(text), Fraction)


@pytest.mark.parametrize("text", ["=", "1=", "1+1=2 ", "<<", "<<1+1=2>>", "x", "\n", "- ", "(", "9^"])
def test_a_huge_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    equations(text * (300_000 // len(text)))
    assert time.process_time() - start < 5


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_the_equations_of_gsm8k_hold_but_for_two_lines_that_mix_units() -> None:
    """One takes dollars for cents ("$2.50 - $2.24 = 26 cents"), one divides by 75 and writes 75%."""
    folder = Path(os.environ["ALIGN_TEST_DATA"], "gsm8k")
    lines = [line for part in ("train", "test") for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()]
    found = [equation for line in lines for equation in equations(json.loads(line)["answer"])]
    assert len(found) > 28_000
    assert [e.left for e in found if not e.holds] == ["$2.50 - $2.24", "$7500/75%"]
