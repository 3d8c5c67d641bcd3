"""Figures of pairs few enough to work out by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from reward.figures import Judged
from reward.pair_figures import Pairs, calibration, fitted_temperature, pair_figures


def pairs(*gaps: float, margins: list[float] | None = None, longer: list[float] | None = None) -> Pairs:
    """Pairs of 100 tokens and as many more as `longer` says, each of a prompt of its own."""
    more = np.array(longer or [0.0] * len(gaps))
    margin = np.array(margins or [np.nan] * len(gaps))
    return Pairs(np.array(gaps), np.ones(len(gaps)), margin, more, 100 + np.abs(more))


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_pairs_are_all_of_unequal_value_and_every_prompt_weighs_the_same() -> None:
    """Values 1, 0, 0: two pairs of weight 1/2. Values 2, 1: one of weight 1. Equal values: none."""
    groups = [
        Judged("a", [1, 0, 0], [1, 1, 1], [3.0, 1.0, 4.0], [10, 5, 20]),
        Judged("a", [2, 1], [1, 1], [1.0, 1.0], [7, 7]),
        Judged("a", [1, 1], [1, 1], [1.0, 2.0], [7, 7]),
    ]
    found = Pairs.of(groups)
    assert found.gap.tolist() == [2.0, -1.0, 0.0]
    assert found.weight.tolist() == [0.5, 0.5, 1.0]
    assert found.margin.tolist() == [1.0, 1.0, 1.0]
    assert found.longer.tolist() == [5.0, -10.0, 0.0]
    assert found.longest.tolist() == [10.0, 20.0, 7.0]
    figures = pair_figures(found)
    assert figures["pair_accuracy"] == pytest.approx(0.25), "0.5 of the first prompt's, none of the second: a tie"
    assert figures["ties"] == pytest.approx(0.5)


def test_accuracy_by_margin_is_by_its_values_where_there_are_few_and_by_quarters_where_there_are_many() -> None:
    few = pair_figures(pairs(1.0, -1.0, 2.0, 3.0, margins=[1, 1, 3, 3]))["accuracy_by_margin"]
    assert few == [
        {"margin_up_to": 1.0, "pairs": 2, "accuracy": 0.5},
        {"margin_up_to": 3.0, "pairs": 2, "accuracy": 1.0},
    ]
    many = pair_figures(pairs(*[-1.0] * 2, *[1.0] * 6, margins=list(range(8))))["accuracy_by_margin"]
    assert [(part["margin_up_to"], part["accuracy"]) for part in many] == [(1, 0), (3, 1), (5, 1), (7, 1)]
    assert pair_figures(pairs(1.0, 2.0, margins=[1, 1]))["accuracy_by_margin"] == []
    assert pair_figures(pairs(1.0, 2.0))["accuracy_by_margin"] == []


def test_the_reliability_says_with_what_confidence_pairs_were_ordered_and_how_many_were_right() -> None:
    """Confidences of 0.82, of which 3 of 4 are right, and of 0.62, of which 1 of 4 is.

    ECE: half of the pairs are off by 0.82 − 0.75, half by 0.62 − 0.25.
    """
    sure, unsure = log(0.82 / 0.18), log(0.62 / 0.38)
    found = calibration(pairs(*[sure] * 3, -sure, unsure, *[-unsure] * 3))
    assert found is not None
    assert [(b["from"], b["to"], b["pairs"]) for b in found["bins"]] == [(0.6, 0.65, 4), (0.8, 0.85, 4)]
    assert [b["said"] for b in found["bins"]] == pytest.approx([0.62, 0.82])
    assert [b["right"] for b in found["bins"]] == [0.25, 0.75]
    assert found["ece"] == pytest.approx(0.5 * 0.07 + 0.5 * 0.37)


def test_a_tie_says_that_it_can_not_tell() -> None:
    found = calibration(pairs(0.0, 0.0))
    assert found is not None
    assert (found["bins"][0]["said"], found["bins"][0]["right"], found["ece"]) == (0.5, 0.5, 0.0)


def test_the_temperature_makes_confidence_what_it_should_be() -> None:
    """All gaps are ±6 and 3 of 4 are right: σ(6/T) = 3/4, so T = 6 / ln 3; then nothing is left of the error."""
    found = calibration(pairs(6.0, 6.0, 6.0, -6.0))
    assert found is not None
    assert found["temperature"] == pytest.approx(6 / log(3))
    assert found["ece"] == pytest.approx(sigmoid(6) - 0.75)
    assert found["ece_fitted"] == pytest.approx(0, abs=1e-6)


def test_there_is_no_temperature_for_pairs_all_right_or_no_better_than_chance() -> None:
    assert fitted_temperature(pairs(1.0, 2.0)) is None
    assert fitted_temperature(pairs(1.0, -2.0)) is None
    assert calibration(pairs()) is None


def test_length_figures_tell_a_model_that_goes_by_length() -> None:
    """Gaps of a tenth of the difference in length: right where the better one is longer, wrong where it is shorter.

    Differences of up to a tenth of the longer one (10 of 110) are matched.
    """
    found = pair_figures(pairs(5.0, 10.0, -5.0, 1.0, longer=[50, 100, -50, 10]))["length"]
    assert found["correlation"] == pytest.approx(1.0)
    assert found["longer_right"] == {"pairs": 2, "accuracy": 1.0}
    assert found["shorter_right"] == {"pairs": 1, "accuracy": 0.0}
    assert found["matched"] == {"pairs": 1, "accuracy": 1.0}
    flat = pair_figures(pairs(1.0, -1.0))["length"]
    assert flat["correlation"] is None
    assert flat["longer_right"] == {"pairs": 0, "accuracy": None}


def test_no_pairs_have_no_figures() -> None:
    found = pair_figures(pairs())
    assert found["pair_accuracy"] is None and found["ties"] is None and found["accuracy_by_gap"] == []
