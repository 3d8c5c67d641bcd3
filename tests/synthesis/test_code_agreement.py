from math import sqrt
from typing import Any

import pytest
from pydantic import ValidationError

from data_synthesis.code_agreement import (
    FEW_PROGRAMS,
    FEW_TESTS,
    NONE_RUNS,
    NOT_AHEAD,
    SAME_TESTS,
    Agreement,
    AgreementConfig,
    agree,
)


def decided(programs: list[tuple[str, str | None]], repeats: list[int] | None = None, **settings: Any) -> Agreement:
    """Programs as (key, the tests that each passes, written as digits); None for one that does not run."""
    passed = [None if its is None else frozenset(int(digit) for digit in its) for _, its in programs]
    return agree([key for key, _ in programs], passed, repeats or [1] * 10, AgreementConfig(**settings))


def test_programs_that_pass_the_same_tests_are_ranked_and_what_is_clearly_worse_is_rejected() -> None:
    """Three programs (two distinct) pass tests 0 to 4, one 0 to 2, one 0 to 3, one 0 and 5, one nothing; one does not
    run. Test 0 counts, for the last but one fails it. The best group has the score sqrt(3) * 5 = 8.66, the next, which
    passes 0 to 3, sqrt(1) * 4. The program with 0 to 2 misses 2 of 5 = 0.4: worse. The one with 0 to 3 misses 0.2:
    undecided. The one with 0 and 5 passes a test that the group fails: undecided. The one with nothing: worse.
    """
    programs = [
        ("a", "01234"), ("b", "01234"), ("a", "01234"), ("c", "012"), ("d", "0123"), ("e", "05"), ("f", ""), ("g", None)
    ]  # fmt: skip
    found = decided(programs)
    assert found.undecided == ""
    assert found.standings == (
        "agreed", "agreed", "agreed", "worse", "undecided", "undecided", "worse", "does not run"
    )  # fmt: skip
    assert found.agreed == frozenset(range(5)) and found.useful == (0, 1, 2, 3, 4, 5)
    assert found.groups == (0, 0, 0, 2, 1, 3, 4, None)
    assert found.scores[0] == pytest.approx(sqrt(3) * 5, abs=1e-4)
    assert found.scores[3:] == (3.0, 4.0, 2.0, 0.0, None)
    assert found.shares == (1.0, 1.0, 1.0, 0.6, 0.8, 0.2, 0.0, 0.0)


def test_tests_that_all_or_none_of_the_programs_pass_do_not_count() -> None:
    """Test 0 is passed by all, test 9 by none. Without them the group of a and b passes 1, 2, 3 and has the score
    sqrt(2) * 3; the program c passes nothing that counts.
    """
    found = decided([("a", "0123"), ("b", "0123"), ("c", "0")])
    assert found.useful == (1, 2, 3)
    assert found.standings == ("agreed", "agreed", "worse")
    assert found.scores == (pytest.approx(sqrt(2) * 3, abs=1e-4), pytest.approx(sqrt(2) * 3, abs=1e-4), 0.0)


@pytest.mark.parametrize(
    ("programs", "settings", "why"),
    [
        ([("a", None), ("b", None)], {}, NONE_RUNS),
        ([("a", "012"), ("b", "012")], {}, SAME_TESTS),
        ([("a", "012"), ("b", "012"), ("c", "0")], {}, FEW_TESTS),
        ([("a", "012"), ("a", "012"), ("c", "")], {}, FEW_PROGRAMS),
        ([("a", "012"), ("b", "012"), ("c", "345"), ("d", "34")], {}, NOT_AHEAD),  # sqrt(2) * 3 = 4.24 against 3
    ],
)
def test_without_a_clear_agreement_nothing_is_known(programs: Any, settings: dict[str, Any], why: str) -> None:
    found = decided(programs, **settings)
    assert found.undecided == why and found.agreed == frozenset()
    assert set(found.standings) <= {"undecided", "does not run"}


def test_the_thresholds_are_settings() -> None:
    """sqrt(2) * 3 = 4.243 is 1.414 times 3: enough for a lead of 1.4, not for 1.5."""
    close = [("a", "012"), ("b", "012"), ("c", "345"), ("d", "34")]
    assert decided(close, lead=1.4).undecided == ""
    assert decided([("a", "012"), ("a", "012"), ("c", "")], min_programs=1).undecided == ""
    assert decided([("a", "012"), ("b", "012"), ("c", "0")], min_tests=2).undecided == ""
    assert decided([("a", "0123"), ("b", "0123"), ("c", "012"), ("d", "")], worse_by=0.25).standings[2] == "worse"
    assert decided([("a", "0123"), ("b", "0123"), ("c", "012"), ("d", "")]).standings[2] == "undecided"
    with pytest.raises(ValidationError):
        AgreementConfig(lead=0.5)


def test_programs_that_all_agree_are_believed_where_that_is_asked_for() -> None:
    found = decided([("a", "0123"), ("b", "0123"), ("c", None)], unanimous=True)
    assert found.standings == ("agreed", "agreed", "does not run") and found.agreed == frozenset(range(4))
    assert decided([("a", "01"), ("b", "01")], unanimous=True).undecided == FEW_TESTS
    assert decided([("a", "0123"), ("b", "0123"), ("c", "0")], unanimous=True).useful == (1, 2, 3)


def test_the_paper_and_its_code_weigh_many_programs_differently() -> None:
    """Nine programs that pass one test against two that pass four (and another, so that all tests tell): the code says
    sqrt(9) * 1 = 3 against sqrt(2) * 4 = 5.66, the paper 9 * 1 = 9 against 2 * 4 = 8.
    """
    programs = [("w", "0")] * 9 + [("a", "1234"), ("b", "1234")]
    assert decided(programs).groups[-1] == 0
    assert decided(programs, score="product").groups[-1] == 1


def test_a_test_that_was_written_often_counts_so_often() -> None:
    """One program each way: test 0 was written five times, tests 1 and 2 once each: 5 against 2."""
    programs = [("a", "0"), ("b", "12")]
    assert decided(programs, [5, 1, 1]).groups == (0, 1)
    assert decided(programs, [1, 1, 1]).groups == (1, 0)
