"""May a reward model be believed? Its figures on labelled held-out groups, and the thresholds that follow from them.

Pair accuracy says little: a model right on 0.78 of the pairs of one prompt has been seen to *lower* the accuracy of the
completion it likes best. What counts is best-of-n: how often its favourite among n samples is right, against the
average sample (below which it does harm) and the oracle. And because n samples may all be wrong, best and worst are
only believed where their scores are high and low enough by themselves: two thresholds for each family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.model import Gate, _best_and_worst

FEW = 20
"""Fewer labelled completions beyond a threshold than this say nothing about its precision."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The distinct completions of one prompt, labelled and scored.

    Attributes:
        family: of the prompt.
        values: what is known to be true: 1 right and 0 wrong, or any number where higher is better.
        counts: how often each completion was sampled.
        scores: the reward model's.
        lengths: in tokens.
    """

    family: str
    values: Sequence[float]
    counts: Sequence[int]
    scores: Sequence[float]
    lengths: Sequence[int]


def best_of_n(groups: Sequence[Judged]) -> float:
    """The mean value of each group's favourite; of equal scores the worse one counts. 0 for no groups."""
    return float(np.mean([_favourite(group) for group in groups])) if groups else 0.0


def figures(groups: Sequence[Judged], gates: dict[str, Gate] | None) -> dict[str, Any]:
    """What the report shows of the groups of one family, or of all of them.

    Returns:
        `groups`; `sampled`, `best_of_n` and `oracle`: mean value of an average, the favourite and the best completion;
        `pair_accuracy` over pairs of unequal value, averaged by group (a tie counts as wrong), and `accuracy_by_gap`,
        the same by quarter of the score gap; `length_correlation` of score and length within groups;
        `right_pairs` of all best-worst pairs, `right_pairs_gated` of those that the gate lets through, and
        `accepted`, their share. A right pair is one whose best is worth more than its worst.
    """
    pairs = [(group, pair) for group in groups if (pair := _best_and_worst(None, group.family, group.scores))]
    gated = [(group, pair) for group in groups if (pair := _best_and_worst(gates, group.family, group.scores))]
    return {
        "groups": len(groups),
        "sampled": float(np.mean([np.average(g.values, weights=g.counts) for g in groups])) if groups else 0.0,
        "best_of_n": best_of_n(groups),
        "oracle": float(np.mean([max(g.values) for g in groups])) if groups else 0.0,
        **_pair_figures(groups),
        "length_correlation": _length_correlation(groups),
        "right_pairs": _share_right(pairs),
        "right_pairs_gated": _share_right(gated),
        "accepted": len(gated) / len(groups) if groups else 0.0,
    }


def calibrate(groups: Sequence[Judged], precision: float, wrong: float, gap: float) -> Gate:
    """The gate of one family, from its labelled groups (values 1 and 0).

    Args:
        groups: the family's held-out groups.
        precision: share of right completions that those at or above `best_above` must reach.
        wrong: share of wrong ones that those below `worst_below` must reach.
        gap: least difference of best and worst.
    """
    values = np.concatenate([np.repeat(g.values, g.counts) for g in groups])
    scores = np.concatenate([np.repeat(g.scores, g.counts) for g in groups])
    best_above = _lowest_precise(scores, values, precision)
    below = _lowest_precise(-scores, 1 - values, wrong)
    worst_below = None if below is None else float(np.nextafter(-below, np.inf))
    plain = figures(groups, None)
    closed = ""
    if plain["best_of_n"] < plain["sampled"]:
        closed = f"its favourites are right less often ({plain['best_of_n']:.2f}) than samples ({plain['sampled']:.2f})"
    elif best_above is None:
        closed = f"no score above which {precision:.0%} of at least {FEW} completions are right"
    elif worst_below is None:
        closed = f"no score below which {wrong:.0%} of at least {FEW} completions are wrong"
    return Gate(best_above, worst_below, gap, closed)


def _lowest_precise(scores: np.ndarray, good: np.ndarray, precision: float) -> float | None:
    """The lowest score at or above which the share of good ones reaches `precision`, over at least FEW of them."""
    order = np.argsort(-scores, kind="stable")
    scores, good = scores[order], good[order]
    share = np.cumsum(good) / np.arange(1, len(good) + 1)
    last_of_its_score = np.append(scores[1:] != scores[:-1], True)
    enough = np.arange(1, len(good) + 1) >= FEW
    found = np.flatnonzero(last_of_its_score & enough & (share >= precision))
    return float(scores[found[-1]]) if len(found) else None


def _favourite(group: Judged) -> float:
    top = max(group.scores)
    return min(value for value, score in zip(group.values, group.scores, strict=True) if score == top)


def _share_right(pairs: list[tuple[Judged, tuple[int, int]]]) -> float | None:
    right = [group.values[best] > group.values[worst] for group, (best, worst) in pairs]
    return float(np.mean(right)) if right else None


def _pair_figures(groups: Sequence[Judged]) -> dict[str, Any]:
    by_group, gaps = [], []
    for group in groups:
        values, scores = np.asarray(group.values), np.asarray(group.scores)
        better, worse = np.nonzero(values[:, None] > values[None, :])
        if len(better):
            by_group.append(float(np.mean(scores[better] > scores[worse])))
            gaps.append(scores[better] - scores[worse])
    if not gaps:
        return {"pair_accuracy": None, "accuracy_by_gap": []}
    gap = np.concatenate(gaps)
    gap = gap[np.argsort(np.abs(gap))]
    quarters = [part for part in np.array_split(gap, 4) if len(part)]
    return {
        "pair_accuracy": float(np.mean(by_group)),
        "accuracy_by_gap": [
            {"gap_up_to": float(np.abs(part[-1])), "pairs": len(part), "accuracy": float(np.mean(part > 0))}
            for part in quarters
        ],
    }


def _length_correlation(groups: Sequence[Judged]) -> float | None:
    """Pearson's correlation of score and length, each less its group's mean; None where one doesn't vary."""
    scores = [np.asarray(g.scores) - np.mean(g.scores) for g in groups]
    lengths = [np.asarray(g.lengths) - np.mean(g.lengths) for g in groups]
    if not scores:
        return None
    score, length = np.concatenate(scores), np.concatenate(lengths)
    spread = float(np.sqrt((score**2).sum() * (length**2).sum()))
    return float((score * length).sum() / spread) if spread > 0 else None
