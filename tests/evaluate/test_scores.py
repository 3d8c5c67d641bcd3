"""Intervals, McNemar's test and the table of scores, against values worked out by hand."""

from __future__ import annotations

from math import comb

import pytest

from align.evaluate.scores import Tally, mcnemar
from reward.agreement import wilson


def test_wilson_interval_of_half_of_100() -> None:
    """z = 1.96: centre 0.5; half = 1.96/(1 + 3.8416/100) * sqrt(0.0025 + 3.8416/40000) = 0.09617."""
    low, high = wilson(50, 100)
    assert low == pytest.approx(40.38, abs=0.01)
    assert high == pytest.approx(59.62, abs=0.01)


def test_wilson_interval_of_none_right_still_has_width() -> None:
    """At k = 0 the bound is z²/(n + z²): 3.8415/13.8415 = 27.75%."""
    low, high = wilson(0, 10)
    assert low == 0
    assert high == pytest.approx(27.75, abs=0.01)
    assert wilson(10, 10)[0] == pytest.approx(100 - 27.75, abs=0.01)
    assert wilson(0, 0) == (0.0, 100.0)


def test_wilson_refuses_more_successes_than_items() -> None:
    with pytest.raises(ValueError, match="k = 11"):
        wilson(11, 10)


def test_mcnemar_counts_only_the_items_that_differ() -> None:
    """6 items only the second has right, 2 only the first: z = 4/sqrt(8); p = 2 * (1 + 8 + 28)/256."""
    a = [True] * 10 + [True] * 2 + [False] * 6 + [False] * 5
    b = [True] * 10 + [False] * 2 + [True] * 6 + [False] * 5
    z, p = mcnemar(a, b)
    assert z == pytest.approx(4 / 8**0.5)
    assert p == pytest.approx(2 * sum(comb(8, i) for i in range(3)) / 256)
    assert mcnemar(b, a)[0] == pytest.approx(-z)
    assert mcnemar(a, a) == (0.0, 1.0)


def test_mcnemar_of_many_items_is_the_normal_one() -> None:
    """60 against 40: z = 20/10 = 2, two-sided p of the normal distribution = 0.0455."""
    z, p = mcnemar([True] * 40 + [False] * 60, [False] * 40 + [True] * 60)
    assert z == pytest.approx(2.0)
    assert p == pytest.approx(0.0455, abs=1e-4)


def _row(family: str, verdict: str, finish_reason: str = "stop", detail: str = "") -> dict[str, str]:
    return {"family": family, "verdict": verdict, "finish_reason": finish_reason, "detail": detail}


def test_samples_of_one_prompt_are_one_item() -> None:
    """Two prompts of 4 samples, 3 and 1 right: score 50 and the interval of 1 of 2 items, not of 4 of 8."""
    tally = Tally(samples=4)
    for verdict in ["passed"] * 3 + ["failed"] + ["passed"] + ["failed"] * 3:
        tally.add(_row("math", verdict))
    overall = tally.scores()["overall"]
    assert overall["n"] == 2
    assert overall["score"] == 50
    assert (overall["low"], overall["high"]) == pytest.approx(wilson(1, 2), abs=0.01)


def test_truncated_timed_out_and_unverified_completions_fail_and_are_counted_apart() -> None:
    tally = Tally(samples=1)
    tally.add(_row("code", "passed"))
    tally.add(_row("code", "failed", "length", "truncated"))
    tally.add(_row("code", "error", "stop", "timeout: 5 s"))
    tally.add(_row("math", "error", "stop", "no answer in the reference"))
    scores = tally.scores()
    assert scores["overall"]["score"] == 25
    assert scores["by_family"]["code"]["score"] == pytest.approx(33.33)
    assert (scores["errors"], scores["timeouts"], scores["truncated"]) == (1, 1, 1)
    assert tally.last_error == "no answer in the reference"
