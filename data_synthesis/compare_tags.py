"""Stage `compare-tags`: a tagger's tags against reference tags, exact and fuzzy F1 (InsTagger; arXiv:2308.07074, 3.4).

Over all rows that both have, precision is the share of the tagger's tags that match one of the reference's tags of the
same instruction, recall the share of the reference's that are matched, F1 their harmonic mean (micro average). Tags
match exactly when they are one text after normalisation, fuzzily when the cosine of their vectors is 0.8 or more.
InsTagger reaches 31.8% exact and 73.4% fuzzy.

A row counts where the reference has tags; where the tagger has none, or lacks the row, its tags are missed.
The intervals are of 1,000 bootstrap samples of the rows, 95%.

Differs from the paper, which says nothing of it: a tag matches one tag at most (a largest matching), so that naming one
intention three times doesn't pay. Without an embedding model the vectors are of character n-grams, which see spelling
and not meaning: that fuzzy F1 is weaker, and no figure to set beside the paper's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise
from data_synthesis.tag_levels import atomic_tags
from data_synthesis.tag_merging import vectors_of

RESAMPLES = 1000

Counts = NDArray[np.int64]
"""Of each row: the tagger's tags, the reference's tags, exact matches, fuzzy matches; (rows, 4)."""


class CompareTagsConfig(StageConfig):
    """Settings of `compare-tags`."""

    embedding: str | None = Field(
        None, description="sentence-transformers model for the fuzzy match (extra `embeddings`; InsTag used "
        "PhraseBERT); none: character n-grams, which is weaker",
    )  # fmt: skip
    min_cosine: float = Field(0.8, gt=0, le=1, description="cosine from which on tags match fuzzily; 0.8 is InsTag's")
    splits: list[Split] = Field(
        ["train", "dev", "test"], min_length=1, description="instructions of these splits are compared"
    )


def run(config: CompareTagsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the rows that are compared, in the reference's order, each with its matches; the F1 is in the summary."""
    tagger, reference, ontology = inputs["prompts"], inputs["reference"], inputs.get("ontology")
    assert isinstance(tagger, Table)
    assert isinstance(reference, Table)
    assert ontology is None or isinstance(ontology, Table)
    atomic = atomic_tags(ontology) if ontology else None
    given = {row["prompt_id"]: _tags(row, atomic) for row in tagger.rows(["prompt_id", "tags"])}
    skipped: Counter[str] = Counter()
    wanted = {row["prompt_id"]: _tags(row, atomic) for row in _references(reference, config, atomic, skipped)}
    both = sum(prompt_id in given for prompt_id in wanted)
    if not both:
        raise DataError(
            f"compare-tags: {tagger.name} and {reference.name} have no tagged instruction of the splits "
            f"{', '.join(config.splits)} in common; both must be made of the same prompts (prompt_id tells)"
        )
    alike = Alike([*given.values(), *wanted.values()], config.embedding, config.min_cosine)
    found = {prompt_id: alike.matches(given.get(prompt_id, []), tags) for prompt_id, tags in wanted.items()}
    counts = np.array([
        (len(given.get(prompt_id, [])), len(tags), found[prompt_id][0], found[prompt_id][1])
        for prompt_id, tags in wanted.items()
    ])  # fmt: skip
    skipped["not tagged by the tagger"] = len(wanted) - both
    summary = {
        "yield": {"reference": len(reference), "compared": len(wanted)},
        "lost": {why: count for why, count in skipped.items() if count and why != "not tagged by the tagger"},
        "missing_from_tagger": len(wanted) - both,
        **_figures(counts, tools.seed),
        "vectors": config.embedding or "character n-grams (weaker: they see spelling, not meaning)",
    }
    return Result(_rows(reference, config, atomic, given, found), summary)


def _references(
    reference: Table, config: CompareTagsConfig, atomic: Mapping[str, str] | None, skipped: Counter[str]
) -> Iterator[Row]:
    """Yields the reference's rows that count, each instruction once."""
    seen: set[str] = set()
    for row in reference.rows():
        if row["split"] not in config.splits:
            skipped[f"split {row['split']}"] += 1
        elif not _tags(row, atomic):
            skipped["the reference has no tags"] += 1
        elif row["prompt_id"] in seen:
            skipped["the same instruction again"] += 1
        else:
            seen.add(row["prompt_id"])
            yield row


def _tags(row: Row, atomic: Mapping[str, str] | None) -> list[str]:
    """A row's distinct tags, normalised; with an ontology its own, where it has them."""
    tags = row["tags"] or []
    return list(dict.fromkeys(normalise(tag if atomic is None else atomic.get(tag, tag)) for tag in tags))


class Alike:
    """Which tags match fuzzily, by the cosine of their vectors."""

    def __init__(self, rows: Sequence[Sequence[str]], embedding: str | None, min_cosine: float) -> None:
        names = sorted({tag for tags in rows for tag in tags})
        self._numbers = {name: number for number, name in enumerate(names)}
        self._vectors = vectors_of(names, embedding, "compare-tags")
        self._min_cosine = min_cosine

    def matches(self, given: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
        """How many tags match exactly, and how many fuzzily: one tag with one tag at most."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_bipartite_matching

        exact = len(set(given) & set(wanted))
        if exact == min(len(given), len(wanted)):
            return exact, exact
        one, other = ([self._numbers[tag] for tag in tags] for tags in (given, wanted))
        cosines = self._vectors[one] @ self._vectors[other].T
        cosines = cosines.toarray() if hasattr(cosines, "toarray") else cosines
        close = csr_matrix(cosines >= self._min_cosine - 1e-6)
        return exact, int((maximum_bipartite_matching(close) >= 0).sum())


def _figures(counts: Counts, seed: int) -> dict[str, Any]:
    """Exact and fuzzy precision, recall and F1 in percent, F1 with its interval; the share of rows all right."""
    draws = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    sums = np.stack([np.bincount(draw, minlength=len(counts)) for draw in draws]) @ counts
    figures: dict[str, Any] = {}
    for name, column in (("exact", 2), ("fuzzy", 3)):
        given, wanted, hits = (int(counts[:, c].sum()) for c in (0, 1, column))
        f1s = 100 * 2 * sums[:, column] / np.maximum(sums[:, 0] + sums[:, 1], 1)
        low, high = np.percentile(f1s, [2.5, 97.5])
        figures[name] = {
            "precision": round(100 * hits / given, 1) if given else 0.0,
            "recall": round(100 * hits / wanted, 1),
            "f1": round(100 * 2 * hits / (given + wanted), 1),
            "interval": [round(float(low), 1), round(float(high), 1)],
        }
    whole = (counts[:, 2] == counts[:, 0]) & (counts[:, 2] == counts[:, 1])
    figures["all_tags_right"] = round(100 * float(whole.mean()), 1)
    figures["tags_per_row"] = {
        "tagger": round(float(counts[:, 0].mean()), 2),
        "reference": round(float(counts[:, 1].mean()), 2),
    }
    return figures


def _rows(
    reference: Table, config: CompareTagsConfig, atomic: Mapping[str, str] | None,
    given: Mapping[str, Sequence[str]], found: Mapping[str, tuple[int, int]],
) -> Iterator[Row]:  # fmt: skip
    for row in _references(reference, config, atomic, Counter()):
        exact, fuzzy = found[row["prompt_id"]]
        tags = list(given.get(row["prompt_id"], []))
        yield {**row, "tags": tags, "reference_tags": _tags(row, atomic), "exact": exact, "fuzzy": fuzzy}


STAGE = Stage(
    name="compare-tags",
    summary="a tagger's tags against reference tags: exact and fuzzy F1",
    config=CompareTagsConfig,
    needs={
        "prompts": Need(Kind.PROMPTS, "instructions with the tagger's tags", columns=("tags",)),
        "reference": Need(Kind.PROMPTS, "the same instructions with the tags to compare with", columns=("tags",)),
        "ontology": Need(Kind.ONTOLOGY, "takes raw tags of both to atomic ones before", optional=True),
    },
    gives=Kind.PROMPTS,
    run=run,
    adds=("tags", "reference_tags", "exact", "fuzzy"),
)
