"""Clusters of unit vectors that near neighbours join, by cosine distance: exact, and without all distances in full.

For every vector x a short u is made with x·y <= u·u' for any two of them. A pair whose u·u' is below the wanted
similarity can't be near, and that is nearly all of them; of the few others the similarity itself is computed. The bound
is the inequality of Cauchy and Schwarz, so no pair is missed:

    dense   (a model's)   u: the coordinates along the principal axes that hold most of the length, and the length of
                          the rest
    sparse  (n-grams)     u: the coordinates are dealt to BUCKETS groups, and the length in each group is taken
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Vectors compared with all later ones at a time: a block of similarities is at most BLOCK x vectors floats."""
AXES = 64
"""Principal axes that dense vectors are first compared along."""
BUCKETS = 128
"""Groups of coordinates that sparse vectors are first compared by."""
CHECKED = 100_000
"""Pairs whose similarity is computed at a time."""
MANY = 16
"""Where a block has more than one in so many pairs that may be near, its similarities are computed at once."""
HELD = 5_000_000
"""Pairs held before they are made clusters."""
ROUNDING = 1e-6
"""What float32 makes of a distance of 0."""

Places = NDArray[np.int64]


def clusters(vectors: Any, max_distance: float) -> NDArray[np.int32]:
    """The cluster of each vector: those within the distance of each other, directly or through others, are in one.

    These are the clusters of DBSCAN with two points to a cluster, the points that are near to none a cluster each.

    Args:
        vectors: of unit length, float32: dense (vectors, width), or a sparse CSR matrix. One of zeros is alone.
        max_distance: 1 - cosine.
    """
    least = 1 - max_distance - ROUNDING
    count = vectors.shape[0]
    sparse = hasattr(vectors, "tocsr")
    short = _by_bucket(vectors) if sparse else _along_axes(vectors)
    labels = np.arange(count, dtype=np.int32)
    left: list[Places] = []
    right: list[Places] = []
    held = 0
    for start in range(0, count, BLOCK):
        bound = short[start : start + BLOCK] @ short[start:].T
        first, second = _at_least(bound, least - 1e-5, start)
        if len(first) * MANY > bound.size:
            whole = vectors[start : start + BLOCK] @ vectors[start:].T
            first, second = _at_least(whole.toarray() if sparse else whole, least, start)
            found = [(first, second)]
        else:
            found = [_checked(vectors, first, second, least, at) for at in range(0, len(first), CHECKED)]
        for one, other in found:
            left.append(one)
            right.append(other)
            held += len(one)
        if held > HELD or start + BLOCK >= count:
            labels = _joined(labels, left, right)
            left, right, held = [], [], 0
    return labels


def _along_axes(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coordinates along the first principal axes (about zero), and the length of the rest: (vectors, AXES + 1)."""
    lengths, axes = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    first = vectors @ axes[:, np.argsort(-lengths)[:AXES]].astype(np.float32)
    whole = np.einsum("ij,ij->i", vectors, vectors)
    rest = np.sqrt(np.maximum(0, whole - np.einsum("ij,ij->i", first, first)))
    return np.ascontiguousarray(np.column_stack([first, rest]))


def _by_bucket(vectors: Any) -> NDArray[np.float32]:
    """The length in each bucket of coordinates: (vectors, BUCKETS)."""
    from scipy.sparse import csr_matrix

    squares = csr_matrix((vectors.data**2, vectors.indices % BUCKETS, vectors.indptr), (vectors.shape[0], BUCKETS))
    return np.sqrt(np.asarray(squares.toarray(), dtype=np.float32))  # entries of one bucket are added up


def _at_least(similarities: NDArray[np.float32], least: float, start: int) -> tuple[Places, Places]:
    """The pairs of a block that reach a similarity, each once and none with itself."""
    rows, columns = np.divmod(np.flatnonzero(similarities.ravel() >= least), similarities.shape[1])
    later = columns > rows
    return rows[later] + start, columns[later] + start


def _checked(vectors: Any, first: Places, second: Places, least: float, at: int) -> tuple[Places, Places]:
    """Those of some pairs that are as similar as that."""
    one, other = first[at : at + CHECKED], second[at : at + CHECKED]
    if hasattr(vectors, "tocsr"):
        found = np.asarray(vectors[one].multiply(vectors[other]).sum(axis=1)).ravel()
    else:
        found = np.einsum("ij,ij->i", vectors[one], vectors[other])
    return one[found >= least], other[found >= least]


def _joined(labels: NDArray[np.int32], left: list[Places], right: list[Places]) -> NDArray[np.int32]:
    """The clusters after more pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(labels)
    edges = (np.concatenate([np.arange(count), *left]), np.concatenate([labels, *right]))
    graph = coo_matrix((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(count, count))
    _, numbers = connected_components(graph, directed=False)
    firsts = np.full(count, count, dtype=np.int32)
    np.minimum.at(firsts, numbers, np.arange(count, dtype=np.int32))
    joined: NDArray[np.int32] = firsts[numbers]
    return joined
