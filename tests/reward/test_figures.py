"""Figures of groups small enough to work out by hand."""

from __future__ import annotations

import pytest

from reward.figures import Judged, best_of_n, figures, report
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


def test_the_gated_share_of_right_pairs_counts_only_accepted_groups() -> None:
    gates = {"math": Gate(best_above=1.5, worst_below=1.5, gap=0.5)}
    groups = [group([1, 0], [2.0, 1.0]), group([0, 1], [1.2, 1.0]), group([0, 1], [1.2, 1.0])]
    found = figures(groups, gates)
    assert found["right_pairs"] == pytest.approx(1 / 3)
    assert found["right_pairs_gated"] == 1.0
    assert found["accepted"] == pytest.approx(1 / 3)
    assert figures([], None)["right_pairs"] is None


def test_the_best_of_n_curve_is_the_mean_over_all_draws() -> None:
    """Four samples in the order of their scores: right, wrong, right, wrong (the highest is wrong).

    n = 1: half are right. n = 2: of the 6 draws the 4th wins 3 (wrong), the 3rd 2 (right), the 2nd 1 (wrong): 2/6.
    n = 4: the highest is wrong. The oracle of n = 2 misses only the draw of both wrong ones: 5/6.
    """
    curve = figures([group([1, 0, 1, 0], [1.0, 2.0, 3.0, 4.0])], None)["best_of_n_curve"]
    assert [point["n"] for point in curve] == [1, 2, 4]
    assert [point["best_of_n"] for point in curve] == pytest.approx([1 / 2, 1 / 3, 0])
    assert [point["oracle"] for point in curve] == pytest.approx([1 / 2, 5 / 6, 1])
    assert [point["sampled"] for point in curve] == pytest.approx([1 / 2] * 3)


def test_the_curve_takes_completions_as_often_as_they_were_sampled_and_ties_as_wrong() -> None:
    """A right one sampled twice and a wrong one of the same score: two of the three draws of two have the wrong one.

    So the favourite is right in the one draw of both right ones, 1/3; n = 3 is the number of samples, and wrong.
    """
    curve = figures([group([1, 0], [5.0, 5.0], counts=[2, 1])], None)["best_of_n_curve"]
    assert [(point["n"], point["best_of_n"]) for point in curve] == [
        (1, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3)), (3, 0.0),
    ]  # fmt: skip


def test_the_curve_at_n_is_of_the_prompts_that_have_so_many_samples() -> None:
    groups = [group([1, 0], [2.0, 1.0])] * 2 + [group([1, 0, 0, 0], [1.0, 2.0, 3.0, 4.0])]
    curve = figures(groups, None)["best_of_n_curve"]
    assert [(point["n"], point["groups"]) for point in curve] == [(1, 3), (2, 3), (4, 1)]
    assert curve[-1]["sampled"] == 0.25


def test_the_curves_interval_is_that_of_the_prompts_mean() -> None:
    """100 prompts, on 80 of which the favourite of two is right: the mean's sd is √(0.8 · 0.2 / 100) = 0.04.

    Every prompt is half right when sampled, so the gain's interval is the same less 0.5.
    """
    groups = [group([1, 0], [2.0, 1.0])] * 80 + [group([1, 0], [1.0, 2.0])] * 20
    point = figures(groups, None)["best_of_n_curve"][-1]
    assert (point["n"], point["best_of_n"]) == (2, pytest.approx(0.8))
    assert point["low"] == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)
    assert point["high"] == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)
    assert (point["gain_low"], point["gain_high"]) == pytest.approx((point["low"] - 0.5, point["high"] - 0.5))


def test_the_report_has_the_figures_of_each_family_with_its_gate() -> None:
    gates = {"math": Gate(1.5, 1.5, 0.5)}
    found = report([group([1, 0], [2.0, 1.0]), group([1, 0], [1.0, 2.0], family="code")], gates)
    assert found["overall"]["best_of_n"] == 0.5
    assert {name: figures["best_of_n"] for name, figures in found["by_family"].items()} == {"math": 1.0, "code": 0.0}
    assert found["by_family"]["math"]["gate"]["best_above"] == 1.5
    assert found["by_family"]["code"]["gate"] is None
    assert figures([], None)["best_of_n_curve"] == []
