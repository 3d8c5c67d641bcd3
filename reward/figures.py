"""What a reward model's scores are worth, on labelled held-out groups: the completions of one prompt each.

Pair accuracy says little: a model right on 0.78 of the pairs of one prompt has been seen to *lower* the accuracy of the
completion it likes best. What counts is best-of-n: how often its favourite among n samples is right, against the
average sample (below which it does harm) and the oracle, which always finds a right one where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import comb
from typing import Any

import numpy as np

from reward.model import Gate, best_and_worst
from reward.pair_figures import Floats, Pairs, pair_figures

RESAMPLES = 1000
"""Of the prompts, for the interval of the best-of-n curve."""


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


def report(groups: Sequence[Judged], gates: dict[str, Gate] | None) -> dict[str, Any]:
    """The figures that a person judges a reward model by: `overall` and `by_family`, each family with its `gate`."""
    by_family = {}
    for family in sorted({group.family for group in groups}):
        gate = None if gates is None else gates.get(family)
        own = figures([group for group in groups if group.family == family], gates)
        by_family[family] = {**own, "gate": None if gate is None else asdict(gate)}
    return {"overall": figures(groups, gates), "by_family": by_family}


def figures(groups: Sequence[Judged], gates: dict[str, Gate] | None) -> dict[str, Any]:
    """What the report shows of the groups of one family, or of all of them.

    Returns:
        `groups`; `sampled`, `best_of_n` and `oracle`: mean value of an average, the favourite and the best completion;
        `best_of_n_curve`, see there; the figures of all pairs of unequal value (see `pair_figures`), averaged by group;
        `length_correlation` of score and length within groups; `right_pairs` of all best-worst pairs,
        `right_pairs_gated` of those that the gate lets through, and `accepted`, their share. A right pair is one whose
        best is worth more than its worst.
    """
    pairs = [(group, pair) for group in groups if (pair := best_and_worst(None, group.family, group.scores))]
    gated = [(group, pair) for group in groups if (pair := best_and_worst(gates, group.family, group.scores))]
    return {
        "groups": len(groups),
        "sampled": float(np.mean([sampled(group) for group in groups])) if groups else 0.0,
        "best_of_n": best_of_n(groups),
        "oracle": float(np.mean([max(g.values) for g in groups])) if groups else 0.0,
        "best_of_n_curve": best_of_n_curve(groups),
        **pair_figures(Pairs.of(groups)),
        "length_correlation": _length_correlation(groups),
        "right_pairs": _share_right(pairs),
        "right_pairs_gated": _share_right(gated),
        "accepted": len(gated) / len(groups) if groups else 0.0,
    }


def best_of_n(groups: Sequence[Judged]) -> float:
    """The mean value of each group's favourite; of equal scores the worse one counts. 0 for no groups."""
    return float(np.mean([min(best_scored(group)) for group in groups])) if groups else 0.0


def best_scored(group: Judged) -> list[float]:
    """The values of the completions that score highest: of one, unless scores are equal."""
    top = max(group.scores)
    return [value for value, score in zip(group.values, group.scores, strict=True) if score == top]


def sampled(group: Judged) -> float:
    """The value of an average sample."""
    return float(np.average(group.values, weights=group.counts))


def best_of_n_curve(groups: Sequence[Judged]) -> list[dict[str, Any]]:
    """Best-of-n for n = 1, 2, 4, … and for the number of samples that most prompts have, estimated from all samples.

    Of a prompt with N samples, the mean over all ways to draw n of them: in order of score the i-th is the favourite of
    C(i−1, n−1) of the C(N, n) draws. That is unbiased, as pass@k of arXiv:2107.03374 is, and uses every sample.

    Returns:
        for each n the number of `groups` with so many samples, and on those `sampled`, `best_of_n` and `oracle`, the
        means; `low` and `high`, the 95% interval of `best_of_n`, `gain_low` and `gain_high` that of its gain over
        `sampled`, by resampling prompts.
    """
    drawn = np.array([sum(group.counts) for group in groups], dtype=int)
    if not len(drawn):
        return []
    numbers, often = np.unique(drawn, return_counts=True)
    usual, most = int(numbers[often.argmax()]), int(numbers[-1])
    sizes = sorted({usual, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
    found = []
    for n in sizes:
        chosen = [group for group, samples in zip(groups, drawn, strict=True) if samples >= n]
        means = np.array(
            [[sampled(g), _expected(g, g.scores, n), _expected(g, g.values, n)] for g in chosen], dtype=float
        )
        middle, resampled = means.mean(axis=0), _resampled_means(means)
        low, high = np.quantile(resampled[:, 1], [0.025, 0.975])
        gain_low, gain_high = np.quantile(resampled[:, 1] - resampled[:, 0], [0.025, 0.975])
        found.append(
            {
                "n": n, "groups": len(chosen),
                "sampled": float(middle[0]), "best_of_n": float(middle[1]), "oracle": float(middle[2]),
                "low": float(low), "high": float(high), "gain_low": float(gain_low), "gain_high": float(gain_high),
            }
        )  # fmt: skip
    return found


def _expected(group: Judged, scores: Sequence[float], n: int) -> float:
    """The mean value of the favourite by `scores` among n samples drawn without replacement; ties go to the worse."""
    values = np.repeat(np.asarray(group.values, float), group.counts)
    order = np.lexsort((-values, np.repeat(np.asarray(scores, float), group.counts)))
    return float(values[order] @ _shares_of_draws(len(values), n))


@cache
def _shares_of_draws(samples: int, n: int) -> Floats:
    """For each place in an ordered list, the share of draws of n in which it is the last, (samples,)."""
    return np.array([comb(place, n - 1) / comb(samples, n) for place in range(samples)])


def _resampled_means(rows: Floats) -> Floats:
    """Column means of as many rows drawn with replacement, time and again, (RESAMPLES, columns)."""
    rng = np.random.default_rng(0)
    count = len(rows)
    return np.stack([rows[rng.integers(count, size=count)].mean(axis=0) for _ in range(RESAMPLES)])


def _share_right(pairs: list[tuple[Judged, tuple[int, int]]]) -> float | None:
    right = [group.values[best] > group.values[worst] for group, (best, worst) in pairs]
    return float(np.mean(right)) if right else None


def _length_correlation(groups: Sequence[Judged]) -> float | None:
    """Pearson's correlation of score and length, each less its group's mean; None where one doesn't vary."""
    scores = [np.asarray(g.scores) - np.mean(g.scores) for g in groups]
    lengths = [np.asarray(g.lengths) - np.mean(g.lengths) for g in groups]
    if not scores:
        return None
    score, length = np.concatenate(scores), np.concatenate(lengths)
    spread = float(np.sqrt((score**2).sum() * (length**2).sum()))
    return float((score * length).sum() / spread) if spread > 0 else None
