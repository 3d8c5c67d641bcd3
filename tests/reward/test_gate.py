"""Thresholds on groups small enough to work out by hand."""

from __future__ import annotations

import pytest

from reward.figures import Judged
from reward.gate import calibrate
from reward.model import Gate


def group(values: list[float], scores: list[float], counts: list[int] | None = None, family: str = "math") -> Judged:
    return Judged(family, values, counts or [1] * len(values), scores, list(range(1, len(values) + 1)))


def test_thresholds_are_the_widest_that_are_precise_enough() -> None:
    """By score 39 … 0: right 39-10 but for 15; wrong below 10. At or above 12: 27 of 28 right; at 10: 29 of 30.

    Down to 7 the share is 29/33 < 0.9, to 8 29/32 = 0.906: so `best_above` is 8. From below, 10 of 10 wrong are too
    few (FEW = 20); up to score 13: 10 of 14; up to 15: 11 of 16 = 0.69; 20 completions: 11 of 20. None reaches 0.7.
    """
    right = [score >= 10 and score != 15 for score in range(40)]
    groups = [group([float(right[i]), float(right[i + 20])], [float(i), float(i + 20)]) for i in range(20)]
    gate = calibrate(groups, 0.9, 0.7, 0.5)
    assert gate.best_above == 8.0
    assert gate.worst_below is None
    assert "70%" in gate.closed
    gate = calibrate(groups, 0.9, 0.5, 0.5)
    assert gate.worst_below == pytest.approx(21.0)
    assert gate.worst_below > 21.0, "a score of 21 itself lies below the threshold"
    assert gate.closed == ""


def test_counts_weigh_as_often_as_they_were_sampled() -> None:
    """One right completion sampled 30 times is support enough; sampled once it is not."""
    often = [group([1.0, 0.0], [2.0, 1.0], counts=[30, 30])]
    assert calibrate(often, 0.9, 0.7, 0.5) == Gate(2.0, pytest.approx(1.0), 0.5, "")
    assert calibrate([group([1.0, 0.0], [2.0, 1.0])], 0.9, 0.7, 0.5).best_above is None


def test_a_family_whose_favourites_are_worse_than_samples_is_closed() -> None:
    """The favourite is wrong in each group, though half of the samples are right."""
    groups = [group([1, 0], [1.0, 2.0]) for _ in range(40)]
    gate = calibrate(groups, 0.4, 0.4, 0.5)
    assert "less often" in gate.closed
