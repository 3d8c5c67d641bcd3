"""Formulas compared by math-verify in a process: both ways round, within limits, and replaced when it is killed."""

import os
import resource
import signal
import time
from collections.abc import Iterator

import pytest

from reward import formulas as module
from reward.formulas import NO_EXTRA, Formulas
from reward.math_answers import verify
from reward.same_answer import compare

needs_extra = pytest.mark.skipif(module.version() is None, reason="the extra `math` isn't installed")


@pytest.fixture(scope="module")
def formulas() -> Iterator[Formulas]:
    with Formulas(cpu_s=1, memory_mb=400) as formulas:
        yield formulas


@needs_extra
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"x \le 3", r"(-\infty, 3]"),
        ("x > 3", "3 < x"),
        (r"\binom{5}{2} x", "10x"),
        ("10", r"\binom{5}{2}"),
        (r"\sin^2 x", r"1 - \cos^2 x"),
        (r"\log_2 x", r"\frac{\ln x}{\ln 2}"),
        ("|x - 1|", "|1 - x|"),
        ("n!", r"n \cdot (n-1)!"),
        (r"(1, \binom{5}{2} x)", "(1, 10x)"),
    ],
)
def test_formulas_that_mean_the_same_are_the_same(answer: str, expected: str, formulas: Formulas) -> None:
    """Without math-verify none of them can be told, which is what makes this a test of it."""
    assert compare(answer, expected) is None
    assert compare(answer, expected, formulas.same) is True


@needs_extra
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"x \le 3", r"(-\infty, 3)"),
        ("x > 3", "x < 3"),
        (r"x \ge 3", "x > 3"),
        ("n!", "(n+1)!"),
        ("|x|", "x"),
        (r"\binom{5}{2} x", r"\binom{5}{3} y"),
        (r"\lfloor x \rfloor", r"\lceil x \rceil"),
        (r"(\binom{5}{2} x, 1)", "(1, 10x)"),
        (r"\frac{|x|", "|x|"),
    ],
)
def test_near_misses_of_formulas_are_not_the_same(answer: str, expected: str, formulas: Formulas) -> None:
    assert compare(answer, expected, formulas.same) is False


@needs_extra
def test_math_verify_is_believed_only_where_both_ways_round_agree(formulas: Formulas) -> None:
    """It takes x^2 = 5 for 5, where that is the answer and 5 the reference; asked the other way round it does not."""
    assert formulas.same("x^2=5", "5") is False
    assert formulas.same("5", "x^2=5") is False
    assert formulas.same("x=5", "5") is True


@needs_extra
def test_a_hostile_formula_ends_the_worker_and_the_next_pair_gets_another(formulas: Formulas) -> None:
    asked, undecided = formulas.asked, formulas.undecided
    assert formulas.same("x > 30", "30 < x") is True
    first = formulas._worker
    assert first is not None
    assert formulas.same(r"9^{9^{9^9}}", "|x|") is None
    assert formulas.problem.startswith("timeout")
    assert first.poll() == -signal.SIGPROF
    assert formulas.same("x > 31", "31 < x") is True
    assert formulas.report is not None
    assert (formulas.asked - asked, formulas.undecided - undecided) == (3, 1)


@needs_extra
def test_the_worker_has_a_limit_of_memory_which_costs_a_pair_and_not_the_next(formulas: Formulas) -> None:
    """The sum's first term takes 512 MiB as a number; the limit is 400 MiB of address space."""
    assert formulas.same("x > 40", "40 < x") is True
    assert formulas._worker is not None
    limit = 400 << 20
    assert resource.prlimit(formulas._worker.pid, resource.RLIMIT_AS) == (limit, limit)
    assert formulas.same("|2^{2^{32}}+1|", "|x|") is not True
    assert formulas.same("x > 41", "41 < x") is True


@needs_extra
def test_a_worker_that_something_else_killed_is_replaced_unnoticed(formulas: Formulas) -> None:
    assert formulas.same("x > 50", "50 < x") is True
    assert formulas._worker is not None
    os.kill(formulas._worker.pid, signal.SIGKILL)
    formulas._worker.wait()
    assert formulas.same("x > 51", "51 < x") is True


@needs_extra
def test_a_worker_is_replaced_after_some_thousand_pairs(formulas: Formulas, monkeypatch: pytest.MonkeyPatch) -> None:
    assert formulas.same("x > 60", "60 < x") is True
    first = formulas._worker
    assert first is not None
    assert formulas.same("x > 61", "61 < x") is True and formulas._worker is first
    monkeypatch.setattr(module, "_MOST_PAIRS", formulas._answered)
    assert formulas.same("x > 62", "62 < x") is True
    assert formulas._worker is not first and first.poll() is not None


@needs_extra
def test_the_worker_ends_with_its_owner_and_one_pair_is_computed_once() -> None:
    with Formulas() as formulas:
        assert formulas._worker is None
        formulas.same("x > 3", "3 < x")
        worker = formulas._worker
        began = time.process_time()
        for _ in range(1000):
            assert formulas.same("x > 3", "3 < x") is True
        assert time.process_time() - began < 0.5
        assert formulas._worker is worker
    assert worker is not None and worker.poll() == -signal.SIGKILL


@needs_extra
def test_a_formula_that_is_too_long_is_never_handed_over() -> None:
    with Formulas() as formulas:
        assert formulas.same("|x|" * 1000, "|x|") is False
        assert formulas.same("|x|", "|x|" * 1000) is None
        assert "characters" in formulas.problem
        assert formulas._worker is None


def test_without_the_extra_what_it_would_tell_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our own comparison can tell stays told: equal values pass, other values fail."""
    monkeypatch.setattr(module, "version", lambda: None)
    with Formulas() as formulas:
        verdict = verify(r"\boxed{x \le 3}", {"answer": r"(-\infty, 3]"}, formulas)
        assert (verdict.verdict, verdict.reward) == ("error", None)
        assert verdict.detail.startswith("undecided: answer") and NO_EXTRA in verdict.detail
        assert verify(r"\boxed{\sqrt{8}}", {"answer": r"2\sqrt{2}"}, formulas).verdict == "passed"
        assert verify(r"\boxed{\sqrt{6}}", {"answer": r"2\sqrt{2}"}, formulas).verdict == "failed"
        assert formulas.report == {"asked": 1, "undecided": 1, "math_verify": None, "hint": NO_EXTRA}
