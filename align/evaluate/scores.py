"""Scores with their intervals, and the test of one step against another.

Every score is in percent. An interval is Wilson's at 95% (Wilson 1927).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import erfc, sqrt
from typing import Any

from align.core.errors import DataError
from align.core.records import Row
from align.core.store import Table
from reward.agreement import wilson

EXACT_UP_TO = 50
"""McNemar's p is the exact binomial one up to this number of items that differ, the normal one beyond."""


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """McNemar's paired test of two systems on the same items (McNemar 1947).

    Only items on which they differ count: z = (b alone − a alone) / sqrt(a alone + b alone).

    Returns:
        z, above 0 where `b` is the better one, and the two-sided p; (0, 1) where they never differ.

    Raises:
        ValueError: the two are not of one length.
    """
    if len(a) != len(b):
        raise ValueError(f"mcnemar: {len(a)} and {len(b)} items are not pairs")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    differ = only_a + only_b
    if differ == 0:
        return 0.0, 1.0
    z = (only_b - only_a) / sqrt(differ)
    if differ > EXACT_UP_TO:
        return z, erfc(abs(z) / sqrt(2))
    return z, min(1.0, 2 * _binomial_tail(min(only_a, only_b), differ))


def compare(table_a: Table, table_b: Table) -> dict[str, dict[str, Any]]:
    """Pairs two outputs of `evaluate` by prompt, mode and sample index, and tests whether the second is better.

    Returns:
        By mode (greedy, sampled): `n` shared items, `a` and `b` their scores in percent, `z` and `p` of `mcnemar`.

    Raises:
        DataError: the two share no item, or one wasn't made by `evaluate`.
    """
    first, second = _passed_by_item(table_a), _passed_by_item(table_b)
    shared: dict[str, list[tuple[bool, bool]]] = {}
    for key, passed in first.items():
        if key in second:
            shared.setdefault(key[1], []).append((passed, second[key]))
    if not shared:
        raise DataError(
            f"{table_a.name} and {table_b.name} share no item to compare; give two outputs of `evaluate` "
            "made from the same prompts, split and modes"
        )
    found = {}
    for mode, pairs in sorted(shared.items()):
        a, b = [x for x, _ in pairs], [y for _, y in pairs]
        z, p = mcnemar(a, b)
        found[mode] = {"n": len(pairs), "a": 100 * sum(a) / len(a), "b": 100 * sum(b) / len(b), "z": z, "p": p}
    return found


class Tally:
    """Counts graded completions by family, and gives their table of scores.

    Several samples of one prompt are not independent: an item is a prompt, its score the mean over its samples, so
    the interval is that of as many items as there are prompts (wider than counting every sample would give).
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.passed: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self.apart = {"errors": 0, "timeouts": 0, "truncated": 0}
        self.last_error = ""

    def add(self, row: Row) -> None:
        """Counts one row of `evaluate`'s output."""
        family = row["family"]
        self.total[family] = self.total.get(family, 0) + 1
        self.passed[family] = self.passed.get(family, 0) + (row["verdict"] == "passed")
        if row["finish_reason"] == "length":
            self.apart["truncated"] += 1
        elif row["verdict"] == "error":
            self._add_error(str(row["detail"]))

    def _add_error(self, detail: str) -> None:
        """A program that runs too long is the model's doing; any other error is the machinery's."""
        if detail.startswith("timeout"):
            self.apart["timeouts"] += 1
        else:
            self.apart["errors"] += 1
            self.last_error = detail

    def scores(self) -> dict[str, Any]:
        """`overall` and `by_family`, each with score, low, high (percent) and n (prompts); kinds of failure apart."""
        return {
            "overall": self._score(sum(self.passed.values()), sum(self.total.values())),
            "by_family": {name: self._score(self.passed[name], self.total[name]) for name in sorted(self.total)},
            "samples": self.samples,
            **self.apart,
        }

    def _score(self, passed: int, total: int) -> dict[str, float | int]:
        items = total // self.samples
        low, high = wilson(passed / self.samples, items)
        score = 100 * passed / total if total else 0.0
        return {"score": round(score, 2), "low": round(low, 2), "high": round(high, 2), "n": items}


def _binomial_tail(k: int, n: int) -> float:
    """The probability of at most k heads in n throws of a fair coin."""
    term = total = 0.5**n
    for i in range(k):
        term *= (n - i) / (i + 1)
        total += term
    return total


def _passed_by_item(table: Table) -> dict[tuple[str, str, int], bool]:
    needed = ("prompt_id", "mode", "sample_index", "verdict")
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{table.name}: no column {missing[0]!r}; only outputs of `evaluate` can be compared")
    return dict(_items(table.rows(needed)))


def _items(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str, int], bool]]:
    for row in rows:
        yield (row["prompt_id"], row["mode"], row["sample_index"]), row["verdict"] == "passed"
