"""Counting rewards as rows stream by: numbers are kept, texts are not."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

import numpy as np

from reward.agreement import wilson
from reward.figures import Judged, report
from reward.model import Gate
from reward.pair_figures import Pairs, pair_figures


class RewardTally:
    """How rewards are spread, by family."""

    def __init__(self) -> None:
        self.rewards: dict[str, array[float]] = {}

    def add(self, family: str, reward: float | None) -> None:
        """Counts a reward; None counts as none."""
        own = self.rewards.setdefault(family, array("d"))
        if reward is not None:
            own.append(reward)

    def figures(self) -> dict[str, Any]:
        """`scored`, and `rewards`: of each family n, mean, standard deviation, and what 5, 50 and 95% lie below."""
        return {
            "scored": sum(len(own) for own in self.rewards.values()),
            "rewards": {family: _spread(np.array(own)) for family, own in sorted(self.rewards.items()) if len(own)},
        }


def _spread(rewards: Any) -> dict[str, float | int]:
    low, middle, high = np.quantile(rewards, [0.05, 0.5, 0.95]).tolist()
    return {
        "n": len(rewards), "mean": float(rewards.mean()), "std": float(rewards.std()),
        "p5": low, "p50": middle, "p95": high,
    }  # fmt: skip


class GroupTally:
    """Labelled completions with their rewards, brought together by prompt at the end."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._families: list[str] = []
        self._columns: tuple[array[Any], ...] = (array("q"), array("d"), array("d"), array("q"))

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def add(self, prompt_id: str, family: str, value: float, reward: float | None, length: int) -> None:
        """Counts a completion: what it is worth, its reward (nan where there is none), its length in characters."""
        place = self._prompts.setdefault(prompt_id, len(self._prompts))
        if place == len(self._families):
            self._families.append(family)
        for column, entry in zip(self._columns, (place, value, _or_nan(reward), length), strict=True):
            column.append(entry)

    def groups(self) -> list[Judged]:
        """The completions of each prompt, prompts in the order in which they came."""
        place, value, reward, length = (np.array(column) for column in self._columns)
        order = np.argsort(place, kind="stable")
        borders = np.flatnonzero(np.diff(place[order])) + 1
        parts = zip(*(np.split(column[order], borders) for column in (value, reward, length)), strict=True)
        return [
            Judged(family, values.tolist(), [1] * len(values), rewards.tolist(), lengths.tolist())
            for family, (values, rewards, lengths) in zip(self._families, parts, strict=True)
        ]

    def report(self, gates: Mapping[str, Gate] | None) -> dict[str, Any]:
        """See `reward.figures.report`; of the completions with a reward."""
        found = [rewarded for group in self.groups() if (rewarded := _rewarded(group)).values]
        return report(found, None if gates is None else dict(gates))


def _rewarded(group: Judged) -> Judged:
    """The completions of a group that have a reward."""
    kept = [i for i, score in enumerate(group.scores) if not isnan(score)]
    values, counts, lengths = ([column[i] for i in kept] for column in (group.values, group.counts, group.lengths))
    return Judged(group.family, values, [int(n) for n in counts], [group.scores[i] for i in kept], [*map(int, lengths)])


def _or_nan(value: float | None) -> float:
    return nan if value is None else value


class PairTally:
    """Pairs with the difference of their rewards, by subset."""

    def __init__(self) -> None:
        self._subsets: dict[str, int] = {}
        self._columns: tuple[array[Any], ...] = (array("q"), array("d"), array("d"), array("q"), array("q"))

    def add(self, subset: str, gap: float | None, margin: float | None, chosen: int, rejected: int) -> None:
        """Counts a pair.

        Args:
            subset: what it is reported under.
            gap: reward of the chosen less that of the rejected; None where one of them has none.
            margin: what the data say of how much better the chosen is, if they do.
            chosen: its length in characters.
            rejected: likewise.
        """
        place = self._subsets.setdefault(subset, len(self._subsets))
        entries = (place, _or_nan(gap), _or_nan(margin), chosen, rejected)
        for column, entry in zip(self._columns, entries, strict=True):
            column.append(entry)

    def counts(self) -> dict[str, tuple[int, int]]:
        """By subset: pairs whose chosen one has the higher reward, and all pairs; one without a reward is not right."""
        place, gap = np.array(self._columns[0]), np.array(self._columns[1])
        return {
            name: (int((gap[place == number] > 0).sum()), int((place == number).sum()))
            for name, number in sorted(self._subsets.items())
        }

    def figures(self) -> dict[str, Any]:
        """`overall` and `by_family`: pairs, and the figures of those with rewards (see `pair_figures`)."""
        place, gap, margin, chosen, rejected = (np.array(column) for column in self._columns)
        has = ~np.isnan(gap)
        longer, longest = (chosen - rejected).astype(float), np.maximum(chosen, rejected).astype(float)
        pairs = Pairs(*(column[has] for column in (gap, np.ones(len(gap)), margin, longer, longest)))
        by_family = {
            name: {"pairs": int((place[has] == number).sum()), **pair_figures(pairs.where(place[has] == number))}
            for name, number in sorted(self._subsets.items())
        }
        return {"overall": {"pairs": len(pairs), **pair_figures(pairs)}, "by_family": by_family}


def share(right: float, items: int) -> dict[str, float | int]:
    """A share in percent with its interval (Wilson's), in the form that tables of scores have."""
    low, high = wilson(min(right, items), items)
    score = 100 * right / items if items else 0.0
    return {"score": round(score, 2), "low": round(low, 2), "high": round(high, 2), "n": items}


def weighted(parts: Sequence[tuple[float, Mapping[str, float | int]]]) -> dict[str, float | int]:
    """The mean of several shares by weight, with the interval of as many items as would vary as little.

    A mean Σ w·p of shares of n items each varies by Σ w²·p(1−p)/n, as much as that of 1 / Σ(w²/n) items.
    """
    total = sum(weight for weight, _ in parts)
    if not total:
        return share(0, 0)
    shares = [(weight / total, part) for weight, part in parts if weight]
    score = sum(weight * part["score"] for weight, part in shares)
    alike = 1 / sum(weight**2 / part["n"] for weight, part in shares)
    return {**share(score / 100 * round(alike), round(alike)), "n": sum(int(part["n"]) for _, part in shares)}
