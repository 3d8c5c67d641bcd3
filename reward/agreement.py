"""How far judgements agree: with labels, between orders, between votes."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson(k: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share k/n, in percent (Wilson 1927).

    It stays inside 0-100 and is right near both ends, where small samples often are.

    Args:
        k: successes; a fraction where an item is the mean of several samples.
        n: independent items; 0 gives the whole range.

    Raises:
        ValueError: k is not between 0 and n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson: k = {k} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 100.0
    share, z2 = k / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def cohens_kappa(pairs: Mapping[tuple[str, str], int]) -> float | None:
    """Cohen's kappa of two raters (Cohen 1960): agreement beyond chance, 1 at most, 0 where chance gives as much.

    Args:
        pairs: how often the first rater said one thing and the second one another.

    Returns:
        kappa; None where it isn't defined: no items, or both raters said one and the same thing throughout.
    """
    items = sum(pairs.values())
    if not items:
        return None
    first: dict[str, int] = {}
    second: dict[str, int] = {}
    for (one, other), count in pairs.items():
        first[one] = first.get(one, 0) + count
        second[other] = second.get(other, 0) + count
    agreed = sum(count for (one, other), count in pairs.items() if one == other) / items
    by_chance = sum(count * second.get(said, 0) for said, count in first.items()) / items**2
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
