"""May a reward model be believed? Thresholds for each family, from its scores of labelled held-out completions.

n samples may all be wrong, and then the best of them is no example. So best and worst are only believed where their
scores are high and low enough by themselves; and a family whose favourites are right less often than an average sample
is not believed at all (see `reward.figures`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reward.figures import Judged, best_of_n, sampled
from reward.model import Gate

FEW = 20
"""Fewer labelled completions beyond a threshold than this say nothing about its precision."""


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
    favourites, average = best_of_n(groups), float(np.mean([sampled(group) for group in groups]))
    closed = ""
    if favourites < average:
        closed = f"its favourites are right less often ({favourites:.2f}) than samples ({average:.2f})"
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


def gates_of(groups: Sequence[Judged], precision: float, wrong: float, gap: float) -> dict[str, Gate]:
    """The gate of every family among labelled groups; see `calibrate`."""
    families = sorted({group.family for group in groups})
    return {f: calibrate([g for g in groups if g.family == f], precision, wrong, gap) for f in families}
