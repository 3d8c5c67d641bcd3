"""How tags become one: InsTag's rule, semantic and association steps (arXiv:2308.07074, 3.2); see `ontology`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from align.core.errors import DataError
from align.core.text import normalise
from data_synthesis.stemming import stem

Association = Literal["one_way", "mutual", "off"]

BLOCK = 1024
"""Tags compared with all others at a time: a block of similarities is BLOCK x tags floats."""


def by_rules(counts: Mapping[str, int]) -> dict[str, str | None]:
    """Tags that are one in lower case, without special characters and stemmed; each is named by its commonest form.

    A tag of special characters only becomes None.
    """
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    keys: dict[str, str] = {}
    for tag, count in counts.items():
        cleaned = re.findall(r"[^\W_]+", normalise(tag))
        keys[tag] = " ".join(stem(word) for word in cleaned)
        forms[keys[tag]][" ".join(cleaned)] += count
    names = {key: min(found, key=lambda form: (-found[form], form)) for key, found in forms.items()}
    return {tag: names[key] or None for tag, key in keys.items()}


def by_meaning(counts: Mapping[str, int], embedding: str | None, max_distance: float) -> dict[str, str | None]:
    """Tags that near neighbours join, directly or through others; each cluster is named by its most frequent tag."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    tags = sorted(counts)
    vectors = vectors_of(tags, embedding)
    left: list[Any] = []
    right: list[Any] = []
    for start in range(0, len(tags), BLOCK):
        near = vectors[start : start + BLOCK] @ vectors[start:].T
        near = near.toarray() if hasattr(near, "toarray") else near
        rows, columns = np.nonzero(near >= 1 - max_distance - 1e-6)  # 1e-6: what float32 makes of a distance of 0
        left.append(rows + start)
        right.append(columns + start)
    edges = (np.concatenate(left), np.concatenate(right))
    graph = coo_matrix((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(tags), len(tags)))
    _, labels = connected_components(graph, directed=False)
    clusters: dict[int, list[str]] = defaultdict(list)
    for tag, label in zip(tags, labels, strict=True):
        clusters[int(label)].append(tag)
    return {
        tag: min(cluster, key=lambda name: (-counts[name], name)) for cluster in clusters.values() for tag in cluster
    }


def vectors_of(tags: Sequence[str], embedding: str | None, stage: str = "ontology") -> Any:
    """Unit vectors of the tags: dense (tags, width) of a model, or sparse ones of character n-grams, float32."""
    if embedding is None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), dtype=np.float32).fit_transform(tags)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as problem:
        raise DataError(
            f"{stage}: embedding={embedding} needs sentence-transformers; pip install 'align-toolkit[embeddings]', "
            "or leave the setting out for character n-grams"
        ) from problem
    model = SentenceTransformer(embedding)
    return np.asarray(model.encode(list(tags), normalize_embeddings=True), dtype=np.float32)


def by_association(
    matrix: Any, names: Sequence[str], mode: Association, min_support: int, min_confidence: float
) -> tuple[dict[str, str | None], int]:
    """Tags that association rules merge, and the number of rules used, over all rounds.

    A rule a -> b holds where at least `min_support` instructions have both and at least `min_confidence` of those with
    a have b (mutual: of those with b have a, too). Merges go from the rarer to the more frequent tag only, so there are
    no cycles, and are repeated on the merged counts until no rule holds.

    Args:
        matrix: instructions × tags, 1 where an instruction has a tag.
        names: of the columns.
        mode: one_way, mutual, or off for none.
        min_support: instructions.
        min_confidence: a share.
    """
    into: dict[str, str | None] = {name: name for name in names}
    rules = 0
    while mode != "off":
        step = _one_round(matrix, names, mode, min_support, min_confidence)
        if not step:
            break
        rules += len(step)
        into = {tag: step.get(name, name) if name else None for tag, name in into.items()}
        left = [name for name in names if name not in step]
        matrix = merged(matrix, names, {name: step.get(name, name) for name in names}, left)
        names = left
    return into, rules


def _one_round(
    matrix: Any, names: Sequence[str], mode: Association, min_support: int, min_confidence: float
) -> dict[str, str]:
    """Tag to the tag it becomes, chains followed to their ends."""
    counts = np.asarray(matrix.sum(axis=0)).ravel()
    frequent = np.flatnonzero(counts >= min_support)
    together = matrix[:, frequent]
    pairs = (together.T @ together).tocoo()
    best: dict[int, tuple[float, int, str, int]] = {}
    for a, b, both in zip(frequent[pairs.row].tolist(), frequent[pairs.col].tolist(), pairs.data.tolist(), strict=True):
        if a == b or both < min_support or (counts[b], names[a]) < (counts[a], names[b]):
            continue  # the last: only to a tag as frequent or more; of two as frequent, to the first by name
        confidence = both / counts[a]
        needed = confidence if mode == "one_way" else both / counts[b]
        if min(confidence, needed) >= min_confidence:
            best[a] = min(best.get(a, (0.0, 0, "", -1)), (-confidence, -both, names[b], b))
    step: dict[str, str] = {}
    for a in best:
        b = a
        while b in best:
            b = best[b][3]
        step[names[a]] = names[b]
    return step


def merged(matrix: Any, names: Sequence[str], into: Mapping[str, str | None], left: Sequence[str]) -> Any:
    """The matrix with the columns of merged tags made one; dropped tags lose theirs."""
    from scipy.sparse import csr_matrix

    place = {name: number for number, name in enumerate(left)}
    moves = [(number, place[target]) for number, name in enumerate(names) if (target := into.get(name)) is not None]
    rows, columns = zip(*moves, strict=True) if moves else ((), ())
    change = csr_matrix((np.ones(len(moves), dtype=np.int32), (rows, columns)), shape=(len(names), len(left)))
    merged = matrix @ change
    merged.data[:] = 1
    return merged


def parents_of(matrix: Any, names: Sequence[str], share: float) -> dict[str, str | None]:
    """The least general of the more frequent tags that come with at least `share` of a tag's instructions."""
    counts = np.asarray(matrix.sum(axis=0)).ravel()
    pairs = (matrix.T @ matrix).tocoo()
    best: dict[int, tuple[int, str]] = {}
    for a, b, both in zip(pairs.row.tolist(), pairs.col.tolist(), pairs.data.tolist(), strict=True):
        if counts[b] > counts[a] and both / counts[a] >= share:
            one = (int(counts[b]), names[b])
            best[a] = min(best.get(a, one), one)
    return {name: best[number][1] if number in best else None for number, name in enumerate(names)}
