"""All pairs of unit vectors within a cosine distance: exactly, and without computing all distances in full.

Both ways first find few pairs that may be near, and then compute the distance of each of those. What is left out in the
first step is too far by the inequality of Cauchy and Schwarz, so nothing is missed.

Dense vectors (of a model) are turned so that most of their length lies in few coordinates (their principal axes). With
x = (u, v), u those coordinates: x·y <= u·u' + |v| |v'|. Sparse vectors (of n-grams) have a prefix: their rarest n-grams,
as many as it takes until the rest is shorter than the wanted similarity. Two vectors whose prefixes share no n-gram are
less similar than that (prefix filtering: Bayardo, Ma and Srikant, Scaling up all pairs similarity search, WWW 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Vectors compared with all later ones at a time: a block of similarities is at most BLOCK x vectors floats."""
AXES = 64
"""Coordinates that dense vectors are first compared in."""
CHECKED = 200_000
"""Pairs whose distance is computed at a time."""
ROUNDING = 1e-6
"""What float32 makes of a distance of 0."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def near_pairs(vectors: Any, max_distance: float) -> Pairs:
    """Places of the first and the second of all pairs within the distance, the first before the second.

    Args:
        vectors: of unit length (a row of zeros is near to nothing): dense (vectors, width), or a sparse CSR matrix.
        max_distance: of the cosine, 0 to 2.
    """
    least = 1 - max_distance - ROUNDING
    if least <= 0:
        find, dot = _any, _dots(vectors)
    elif hasattr(vectors, "tocsr"):
        find, dot = _sharing_a_prefix, _dots(vectors)
    else:
        find, dot = _near_in_few_axes, _dots(vectors)
    left: list[NDArray[np.int64]] = []
    right: list[NDArray[np.int64]] = []
    for first, second in find(vectors, least):
        for start in range(0, len(first), CHECKED):
            a, b = first[start : start + CHECKED], second[start : start + CHECKED]
            near = dot(a, b) >= least
            left.append(a[near])
            right.append(b[near])
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *left]), np.concatenate([none, *right])
