"""What pairs say of a reward model: accuracy by how far apart they are, calibration, and what length has to do with it.

A pair is two completions of one prompt of which one is known to be better. The reward model says so where the gap, its
score of the better less that of the worse, is above 0; a tie counts as wrong (RewardBench, arXiv:2403.13787).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS = 10
"""Of the reliability diagram, between "I can't tell" (0.5) and certain (1)."""

MATCHED = 0.1
"""Two completions are of like length where they differ by no more than this share of the longer one."""


class Group(Protocol):
    """The completions of one prompt; see `reward.figures.Judged`."""

    @property
    def values(self) -> Sequence[float]:
        """What each is worth."""
        ...

    @property
    def scores(self) -> Sequence[float]:
        """The reward model's of each."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """Of each, in tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of a better and a worse completion, as arrays of one length.

    Attributes:
        gap: score of the better less score of the worse.
        weight: 1 over the pairs of its prompt, so that every prompt counts the same.
        margin: value of the better less value of the worse; nan where it isn't known.
        longer: tokens of the better less tokens of the worse.
        longest: tokens of the longer one.
    """

    gap: Floats
    weight: Floats
    margin: Floats
    longer: Floats
    longest: Floats

    @staticmethod
    def of(groups: Sequence[Group]) -> Pairs:
        """All pairs of unequal value of each group."""
        columns: list[list[Floats]] = [[], [], [], [], []]
        for group in groups:
            values, scores = np.asarray(group.values, float), np.asarray(group.scores, float)
            lengths = np.asarray(group.lengths, float)
            better, worse = np.nonzero(values[:, None] > values[None, :])
            found = (
                scores[better] - scores[worse],
                np.full(len(better), 1 / max(1, len(better))),
                values[better] - values[worse],
                lengths[better] - lengths[worse],
                np.maximum(lengths[better], lengths[worse]),
            )
            for column, part in zip(columns, found, strict=True):
                column.append(part)
        return Pairs(*(np.concatenate(column) if column else np.zeros(0) for column in columns))

    def __len__(self) -> int:
        return len(self.gap)

    def where(self, chosen: npt.NDArray[Any]) -> Pairs:
        """Those at which `chosen` is true, or whose places it holds."""
        return Pairs(*(getattr(self, name)[chosen] for name in Pairs.__slots__))


def pair_figures(pairs: Pairs) -> dict[str, Any]:
    """All that the report shows of pairs.

    Returns:
        `pair_accuracy` and `ties`, shares; `accuracy_by_gap` and `accuracy_by_margin`, by quarters; `calibration`, see
        there; `length`, see `by_length`. Accuracies are None where there is no pair.
    """
    return {
        "pair_accuracy": accuracy(pairs),
        "ties": float(np.average(pairs.gap == 0, weights=pairs.weight)) if len(pairs) else None,
        "accuracy_by_gap": by_quarter(pairs, np.abs(pairs.gap), "gap_up_to"),
        "accuracy_by_margin": by_margin(pairs),
        "calibration": calibration(pairs),
        "length": by_length(pairs),
    }


def accuracy(pairs: Pairs) -> float | None:
    """Share of pairs whose better one scores higher, every prompt counting the same."""
    return float(np.average(pairs.gap > 0, weights=pairs.weight)) if len(pairs) else None


def by_quarter(pairs: Pairs, by: Floats, name: str) -> list[dict[str, Any]]:
    """Accuracy of each quarter of the pairs in the order of `by`; `name` is the key of a quarter's highest `by`."""
    order = np.argsort(by, kind="stable")
    quarters = [part for part in np.array_split(order, 4) if len(part)]
    return [
        {name: float(by[part[-1]]), "pairs": len(part), "accuracy": accuracy(pairs.where(part))} for part in quarters
    ]


def by_margin(pairs: Pairs) -> list[dict[str, Any]]:
    """Accuracy by how much the better one is worth more: by margin where there are up to four, else by quarter.

    A reward model should fail on close calls first. Empty where the margins are all one, as verdicts' are, or unknown.
    """
    known = pairs.where(~np.isnan(pairs.margin))
    margins = np.unique(known.margin)
    if len(margins) < 2:
        return []
    if len(margins) > 4:
        return by_quarter(known, known.margin, "margin_up_to")
    parts = [known.where(known.margin == margin) for margin in margins]
    return [{"margin_up_to": float(part.margin[0]), "pairs": len(part), "accuracy": accuracy(part)} for part in parts]


def calibration(pairs: Pairs) -> dict[str, Any] | None:
    """Whether σ(r_w − r_l) is the probability that it is taken for (Bradley-Terry).

    A pair is said to be ordered as the scores are with confidence σ(|gap|), between 0.5 and 1; of those said with 0.7,
    70% should be right. A tie says 0.5 and is half right.

    Returns:
        `bins`: from, to, pairs, what was `said` and how many were `right`, means; `ece`, the expected calibration
        error: the mean distance of the two (Guo and others, arXiv:1706.04599); `temperature`, by which gaps must be
        divided to be most likely (above 1: too sure of itself), and `ece_fitted` with it. It is fitted on these very
        pairs; None where no finite one is best: all pairs are right, or they are no better than chance.
        None where there are no pairs.
    """
    if not len(pairs):
        return None
    temperature = fitted_temperature(pairs)
    fitted = None if temperature is None else _reliability(pairs, pairs.gap / temperature)[1]
    bins, error = _reliability(pairs, pairs.gap)
    return {"bins": bins, "ece": error, "temperature": temperature, "ece_fitted": fitted}


def fitted_temperature(pairs: Pairs) -> float | None:
    """The T that minimises the mean of −log σ(gap / T); None where it isn't finite and above 0."""

    def slope(inverse: float) -> float:
        """The derivative of the mean loss by 1/T; it only rises."""
        return -float(np.average(pairs.gap * _sigmoid(-inverse * pairs.gap), weights=pairs.weight))

    largest = float(np.abs(pairs.gap).max())
    if not np.isfinite(largest) or slope(0.0) >= 0 or not (pairs.gap < 0).any():
        return None
    low, high = 0.0, 1.0 / largest
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def by_length(pairs: Pairs) -> dict[str, Any]:
    """What length has to do with the scores.

    Returns:
        `correlation` of gap and difference in length; and pairs and accuracy of three kinds of pair: `matched`, of like
        length (`MATCHED`), where length can't help; `shorter_right` and `longer_right`, where the better one is shorter
        or longer by more than that. A model that goes by length is right on the last and wrong on the second.
    """
    apart = np.abs(pairs.longer) > MATCHED * pairs.longest
    kinds = {
        "matched": ~apart,
        "shorter_right": apart & (pairs.longer < 0),
        "longer_right": apart & (pairs.longer > 0),
    }
    spread = float(np.sqrt((pairs.gap**2).sum() * (pairs.longer**2).sum()))
    found: dict[str, Any] = {"correlation": float((pairs.gap * pairs.longer).sum() / spread) if spread > 0 else None}
    for name, chosen in kinds.items():
        found[name] = {"pairs": int(chosen.sum()), "accuracy": accuracy(pairs.where(chosen))}
    return found


def _reliability(pairs: Pairs, gap: Floats) -> tuple[list[dict[str, Any]], float]:
    said = _sigmoid(np.abs(gap))
    right = np.where(gap == 0, 0.5, gap > 0)
    which = np.minimum(((said - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for number in np.unique(which):
        inside = which == number
        weight = pairs.weight[inside]
        means = [float(np.average(column[inside], weights=weight)) for column in (said, right)]
        error += float(weight.sum() / pairs.weight.sum()) * abs(means[0] - means[1])
        low = 0.5 + float(number) / (2 * BINS)
        bins.append(
            {
                "from": round(low, 4), "to": round(low + 0.5 / BINS, 4), "pairs": int(inside.sum()),
                "said": means[0], "right": means[1],
            }
        )  # fmt: skip
    return bins, error


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
