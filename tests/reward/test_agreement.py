"""Agreement beyond chance, against values worked out by hand."""

from __future__ import annotations

import pytest

from reward.agreement import cohens_kappa


def test_kappa_of_a_table_worked_out_by_hand() -> None:
    """Of 50, 35 agree: 0.7. By chance 25/50 · 30/50 + 25/50 · 20/50 = 0.5. Kappa is (0.7 − 0.5) / (1 − 0.5) = 0.4."""
    pairs = {("yes", "yes"): 20, ("yes", "no"): 5, ("no", "yes"): 10, ("no", "no"): 15}
    assert cohens_kappa(pairs) == pytest.approx(0.4)


def test_kappa_is_1_where_all_agree_and_below_0_where_all_differ() -> None:
    assert cohens_kappa({("a", "a"): 3, ("b", "b"): 2}) == 1
    assert cohens_kappa({("a", "b"): 2, ("b", "a"): 2}) == -1  # chance agrees half of the time: (0 − 0.5) / 0.5


def test_kappa_is_not_defined_where_there_is_nothing_or_only_one_thing_to_say() -> None:
    assert cohens_kappa({}) is None
    assert cohens_kappa({("tie", "tie"): 9}) is None
