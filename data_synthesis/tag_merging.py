"""How tags become one: InsTag's rule, semantic and association steps (arXiv:2308.07074, 3.2); see `ontology`."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from align.core.errors import DataError
from align.core.text import normalise
from data_synthesis.neighbours import clusters
from data_synthesis.stemming import stem

Association = Literal["one_way", "mutual", "off"]

MARKS = "+#"
"""Kept where they follow a letter: C, C++ and C# are three."""


def by_rules(counts: Mapping[str, int]) -> dict[str, str | None]:
    """Tags that are one in lower case, without special characters and stemmed; each is named by its commonest form.

    A tag of special characters only becomes None.
    """
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    keys: dict[str, str] = {}
    for tag, count in counts.items():
        cleaned = cleaned_words(tag)
        keys[tag] = " ".join(map(_stem, cleaned))
        forms[keys[tag]][" ".join(cleaned)] += count
    names = {key: min(found, key=lambda form: (-found[form], form)) for key, found in forms.items()}
    return {tag: names[key] or None for tag, key in keys.items()}


def key_of(tag: str) -> str:
    """What is the same for all spellings of a tag: its words, stemmed."""
    return " ".join(map(_stem, cleaned_words(tag)))


def cleaned_words(tag: str) -> list[str]:
    """The words of the normalised tag: letters and digits of any script with the marks on them, and see `MARKS`."""
    return "".join(_marked(normalise(tag))).split()


def _marked(text: str) -> Iterator[str]:
    """The characters, with a space for each one that is no part of a word."""
    if text.isascii() and text.replace(" ", "").isalnum():
        yield from text
        return
    before = " "
    for sign in text:
        is_part = sign.isalnum() or unicodedata.category(sign)[0] == "M" or (sign in MARKS and before != " ")
        before = sign if is_part else " "
        yield before


_stem = lru_cache(maxsize=1 << 17)(stem)


def by_meaning(counts: Mapping[str, int], embedding: str | None, max_distance: float) -> dict[str, str | None]:
    """Tags that near neighbours join, directly or through others; each cluster is named by its most frequent tag."""
    tags = sorted(counts)
    members: dict[int, list[str]] = defaultdict(list)
    for tag, label in zip(tags, clusters(vectors_of(tags, embedding), max_distance).tolist(), strict=True):
        members[label].append(tag)
    return {
        tag: min(cluster, key=lambda name: (-counts[name], name)) for cluster in members.values() for tag in cluster
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
    a, b, order = rules_between(matrix, names, min_support, min_confidence, mutual=mode == "mutual")
    best = _firsts(a, b, order)
    step: dict[str, str] = {}
    for tag in best:
        end = tag
        while end in best:
            end = best[end]
        step[names[tag]] = names[end]
    return step


def rules_between(
    matrix: Any, names: Sequence[str], min_support: int, min_confidence: float, mutual: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The rules a -> b from a tag to a more frequent one (of two as frequent: to the first by name).

    Returns:
        Columns a and b of each rule, and an order of the rules: by a, then the surest first.
    """
    counts = np.asarray(matrix.sum(axis=0)).ravel()
    ranks = _ranks(names)
    frequent = np.flatnonzero(counts >= min_support)
    together = matrix[:, frequent]
    pairs = (together.T @ together).tocoo()
    a, b, both = frequent[pairs.row], frequent[pairs.col], pairs.data
    upwards = (counts[b] > counts[a]) | ((counts[b] == counts[a]) & (ranks[b] < ranks[a]))
    confidence = both / counts[b if mutual else a]  # b is the more frequent one: its share is the smaller
    holds = upwards & (both >= min_support) & (confidence >= min_confidence)
    a, b, both = a[holds], b[holds], both[holds]
    return a, b, np.lexsort((ranks[b], -both, -both / counts[a], a))


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
    ranks = _ranks(names)
    pairs = (matrix.T @ matrix).tocoo()
    above = (counts[pairs.col] > counts[pairs.row]) & (pairs.data / counts[pairs.row] >= share)
    a, b = pairs.row[above], pairs.col[above]
    best = _firsts(a, b, np.lexsort((ranks[b], counts[b], a)))
    return {name: names[best[number]] if number in best else None for number, name in enumerate(names)}


def _ranks(names: Sequence[str]) -> NDArray[np.int64]:
    """Each name's place in the order of the alphabet."""
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return ranks


def _firsts(a: NDArray[Any], b: NDArray[Any], order: NDArray[np.int64]) -> dict[int, int]:
    """For each a the b that comes first in an order that has equal a together."""
    a, b = a[order], b[order]
    firsts = np.flatnonzero(np.diff(a, prepend=-1))
    return dict(zip(a[firsts].tolist(), b[firsts].tolist(), strict=True))
