"""Figures and thresholds on groups small enough to work out by hand."""

from __future__ import annotations

import pytest

from reward.gate import Judged, best_of_n, calibrate, figures
from reward.model import Gate


def group(values: list[float], scores: list[float], counts: list[int] | None = None, family: str = "math") -> Judged:
    return Judged(family, values, counts or [1] * len(values), scores, list(range(1, len(values) + 1)))


def test_best_of_n_is_between_sampled_and_oracle() -> None:
    """Favourites: right, wrong; samples 3 of 4 and 1 of 2; an oracle has both."""
    groups = [group([1, 0], [2.0, 1.0], counts=[3, 1]), group([1, 0], [1.0, 2.0])]
    found = figures(groups, None)
    assert found["sampled"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["best_of_n"] == 0.5
    assert found["oracle"] == 1.0
    assert found["pair_accuracy"] == 0.5
    assert found["right_pairs"] == 0.5


def test_equal_scores_count_as_wrong() -> None:
    assert best_of_n([group([1, 0], [1.0, 1.0])]) == 0.0
    assert figures([group([1, 0], [1.0, 1.0])], None)["pair_accuracy"] == 0.0


def test_pair_accuracy_is_averaged_by_group() -> None:
    """One group with 1 of 3 pairs right, one with its only pair right: (1/3 + 1) / 2."""
    groups = [group([1, 0, 0, 0], [1.0, 0.0, 2.0, 3.0]), group([1, 0], [1.0, 0.0])]
    found = figures(groups, None)
    assert found["pair_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert sum(part["pairs"] for part in found["accuracy_by_gap"]) == 4
    assert [part["gap_up_to"] for part in found["accuracy_by_gap"]] == [1.0, 1.0, 1.0, 2.0]


def test_length_correlation_is_within_groups() -> None:
    """Scores fall by 1 a token in each group; that the groups lie far apart changes nothing."""
    groups = [
        Judged("math", [1, 0, 0], [1, 1, 1], [5.0, 4.0, 3.0], [10, 11, 12]),
        Judged("math", [1, 0], [1, 1], [105.0, 104.0], [50, 51]),
    ]
    assert figures(groups, None)["length_correlation"] == pytest.approx(-1.0)
    flat = [Judged("math", [1, 0], [1, 1], [5.0, 4.0], [10, 10])]
    assert figures(flat, None)["length_correlation"] is None


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


def test_the_gated_share_of_right_pairs_counts_only_accepted_groups() -> None:
    gates = {"math": Gate(best_above=1.5, worst_below=1.5, gap=0.5)}
    groups = [group([1, 0], [2.0, 1.0]), group([0, 1], [1.2, 1.0]), group([0, 1], [1.2, 1.0])]
    found = figures(groups, gates)
    assert found["right_pairs"] == pytest.approx(1 / 3)
    assert found["right_pairs_gated"] == 1.0
    assert found["accepted"] == pytest.approx(1 / 3)
    assert figures([], None)["right_pairs"] is None
