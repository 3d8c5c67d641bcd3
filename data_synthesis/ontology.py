"""Stage `ontology`: from a tagger's raw tags to a set of atomic tags, as InsTag does (arXiv:2308.07074, 3.2).

In order, each step on what the last one left (in brackets the paper's number of unique tags after it):
1. frequency: raw tags on fewer than `min_count` instructions are dropped (over 100k to 8,541);
2. rules: lower case, special characters to spaces, every word stemmed (7,157);
3. semantics: tags whose vectors lie within a cosine distance of 0.05 are one (6,587);
4. association: a tag that nearly always comes with another one becomes part of it, until no such tag is left;
5. a person's refinements (the Qwen2 report, arXiv:2407.10671, 4.1.1): a file of merges, renamings and removals.

The ontology's levels are ours: a tag's parent is the least general tag that comes with it in a share `parent_share` of
its instructions and is more frequent (subsumption, Sanderson and Croft, SIGIR 1999). Tags without one are put under a
few top-level tags where there are many of them (see `top_level`), so that there always are two levels at least.

Differs from the paper: DBSCAN is run with two points to a cluster, which makes clusters the connected components of the
near neighbours; rules are between two tags only, since one with several tags on its left names no tag to merge;
without an embedding model the vectors are of character n-grams, which see spelling and not meaning; + and # after a
letter stay (C, C++ and C# are three tags). What the paper calls a minimum similarity of 0.05 is a *distance*: read as a
similarity it merges nearly everything.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.refinements import Applied, Refinements, read_refinements, with_parents, write_ontology
from data_synthesis.sampling import last_user_text
from data_synthesis.tag_merging import Association, by_association, by_meaning, by_rules, merged, parents_of
from data_synthesis.top_level import TopLevelConfig, grouped, root_of

EXAMPLES = 3
EXAMPLE_CHARACTERS = 200
TOP = 30
"""Tags listed in the summary, for the report's chart."""
TOLD = 20
"""Edits that could not be applied that are told one by one."""


class OntologyConfig(TopLevelConfig):
    """Settings of `ontology`."""

    min_count: int = Field(20, ge=1, description="raw tags on fewer instructions are dropped; 20 is InsTag's alpha")
    embedding: str | None = Field(
        None, description="sentence-transformers model for the semantic step (extra `embeddings`; InsTag used "
        "PhraseBERT); none: character n-grams, which is weaker",
    )  # fmt: skip
    max_distance: float = Field(
        0.05, ge=0, le=2, description="cosine distance within which tags are one; InsTag's 0.05"
    )
    association: Association = Field(
        "one_way", description="one_way: a tag that nearly always comes with another becomes part of it (InsTag); "
        "mutual: only where each nearly always comes with the other, which keeps special tags apart from general ones",
    )  # fmt: skip
    min_support: int = Field(
        40, ge=1, description="instructions that have both tags of a rule, at least; 40 is InsTag's"
    )
    min_confidence: float = Field(
        0.99, gt=0, le=1, description="share of a tag's instructions with the other; InsTag's"
    )
    parent_share: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of a tag's instructions that its parent has too; 0.8 is Sanderson and Croft's",
    )
    refinements: str | None = Field(
        None, description="YAML file of a person's edits (merge, rename, drop, parent, top); ontology.yaml says how"
    )
    strict_refinements: bool = Field(
        False, description="refuse edits of tags that this run doesn't have; else they are told, counted and left out"
    )
    splits: list[Split] = Field(["train"], min_length=1, description="instructions of these splits are counted")


def run(config: OntologyConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the tags by frequency, and writes `ontology.yaml` in the step's folder for a person to edit."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    edits = read_refinements(Path(config.refinements)) if config.refinements else Refinements()
    where = config.refinements or "refinements"

    raw = Counter(tag for row in _rows(table, config) for tag in set(row["tags"] or ()))
    if not raw:
        raise DataError(
            f"ontology: no row of {table.name} in the splits {', '.join(config.splits)} has tags; run `tag` first"
        )
    into = {tag: tag for tag, count in raw.items() if count >= config.min_count}
    if not into:
        raise DataError(
            f"ontology: none of the {len(raw)} tags is on {config.min_count} instructions or more (the most frequent "
            f"is on {max(raw.values())}); lower min_count"
        )
    sizes = {"raw": len(raw), "frequency": len(into)}
    tools.progress.say(f"{len(raw)} raw tags, {len(into)} on {config.min_count} instructions or more")

    signs = len(into)
    into = _then(into, by_rules(_counts(into, raw)))
    signs -= len(into)
    sizes["rules"] = len(set(into.values()))
    if not into:
        raise DataError(f"ontology: the tags of {table.name} have no letters or digits; look at its column `raw_tags`")
    into = _then(into, by_meaning(_counts(into, raw), config.embedding, config.max_distance))
    sizes["semantics"] = len(set(into.values()))

    names = sorted(set(into.values()))
    matrix, examples = _incidence(table, config, into, names)
    associated, rules = by_association(matrix, names, config.association, config.min_support, config.min_confidence)
    into = _then(into, associated)
    sizes["association"] = len(set(into.values()))

    refined = edits.apply(sorted(set(into.values())), where, into)
    _tell(refined, config.strict_refinements, tools)
    last_steps = _then(associated, refined.into)
    into = _then(into, last_steps)
    final = sorted(set(into.values()))
    sizes["refined"] = len(final)

    matrix = merged(matrix, names, last_steps, final)
    parents = with_parents(refined, parents_of(matrix, final, config.parent_share), where)
    texts: dict[str, list[str]] = {tag: [] for tag in final}
    for name, tag in last_steps.items():
        texts[tag] += examples[name]
    parents, ungrouped = grouped(config, matrix, final, parents, refined, texts, tools)
    rows = _ontology_rows(into, raw, matrix, final, parents, texts)
    write_ontology(tools.out / "ontology.yaml", edits, rows)
    dropped = sum(name is None for name in refined.into.values())
    lost = {
        f"on fewer than {config.min_count} instructions": sizes["raw"] - sizes["frequency"],
        "no letter or digit": signs,
        "another spelling of a tag": sizes["frequency"] - signs - sizes["rules"],
        "within max_distance of a tag": sizes["rules"] - sizes["semantics"],
        "nearly always with another tag": sizes["semantics"] - sizes["association"],
        "merged by a person": sizes["association"] - dropped - sizes["refined"],
        "dropped by a person": dropped,
    }
    summary: dict[str, Any] = {
        "tags": sizes,
        "yield": sizes,
        "lost": {reason: count for reason, count in lost.items() if count},
        "association_rules": rules,
        "edits": {"applied": refined.edits, "left_out": len(refined.problems)},
        "instructions": int(matrix.shape[0]),
        "tagged_instructions": int((matrix.getnnz(axis=1) > 0).sum()),
        "levels": max((_depth(tag, parents) for tag in parents), default=0),
        "top_level": {row["tag"]: row["count"] for row in rows if row["parent"] is None},
        "vectors": config.embedding or "character n-grams (weaker: they see spelling, not meaning)",
        "top_tags": {row["tag"]: row["count"] for row in [row for row in rows if row["members"]][:TOP]},
    }
    if "namer" in tools.engines:
        summary["ungrouped"] = ungrouped
    return Result(iter(rows), summary)


def _tell(refined: Applied, strict: bool, tools: Tools) -> None:
    """Says which edits could not be applied; they are an error where that is asked for."""
    if strict and refined.problems:
        raise DataError("\n".join(refined.problems))
    for line in refined.problems[:TOLD]:
        tools.progress.say(line)
    if len(refined.problems) > TOLD:
        tools.progress.say(f"{len(refined.problems) - TOLD} edits more are of tags that this run doesn't have")


def _incidence(
    table: Table, config: OntologyConfig, into: Mapping[str, str], names: Sequence[str]
) -> tuple[Any, dict[str, list[str]]]:
    """Instructions × tags as a sparse matrix of 0 and 1, and the first instructions of each tag."""
    from scipy.sparse import csr_matrix

    numbers = {name: number for number, name in enumerate(names)}
    columns, ends = array("i"), array("q", [0])
    examples: dict[str, list[str]] = {name: [] for name in names}
    for row in _rows(table, config, "prompt"):
        found = sorted({numbers[into[tag]] for tag in row["tags"] or () if tag in into})
        columns.extend(found)
        ends.append(len(columns))
        for number in found:
            if len(examples[names[number]]) < EXAMPLES:
                examples[names[number]].append(last_user_text(row)[:EXAMPLE_CHARACTERS])
    ones = np.ones(len(columns), dtype=np.int32)
    return csr_matrix((ones, np.asarray(columns), np.asarray(ends)), shape=(len(ends) - 1, len(names))), examples


def _ontology_rows(
    into: Mapping[str, str],
    raw: Mapping[str, int],
    matrix: Any,
    names: Sequence[str],
    parents: Mapping[str, str | None],
    examples: Mapping[str, list[str]],
) -> list[Row]:
    """The tags by frequency; a group that is no tag itself has no members, and the count of what lies under it."""
    members: dict[str, list[str]] = defaultdict(list)
    for tag in sorted(into, key=lambda tag: (-raw[tag], tag)):
        members[into[tag]].append(tag)
    counts = dict(zip(names, np.asarray(matrix.sum(axis=0)).ravel().tolist(), strict=True))
    groups = sorted(set(parents) - set(names))
    if groups:
        below = {name: group if (group := root_of(name, parents)) in groups else None for name in names}
        under = np.asarray(merged(matrix, names, below, groups).sum(axis=0)).ravel()
        counts.update(zip(groups, under.tolist(), strict=True))
    rows: list[Row] = [
        {
            "tag": name, "count": counts[name], "members": members[name], "parent": parents[name],
            "examples": list(dict.fromkeys(examples.get(name, ())))[:EXAMPLES],
        }
        for name in parents
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["count"], row["tag"]))


def _rows(table: Table, config: OntologyConfig, *columns: str) -> Iterator[Row]:
    return (row for row in table.rows(["tags", "split", *columns]) if row["split"] in config.splits)


def _counts(into: Mapping[str, str], raw: Mapping[str, int]) -> Counter[str]:
    """Instructions of each name, those that have two of its forms counted twice; for choosing names."""
    counts: Counter[str] = Counter()
    for tag, name in into.items():
        counts[name] += raw[tag]
    return counts


def _then(into: Mapping[str, str | None], step: Mapping[str, str | None]) -> dict[str, Any]:
    """One renaming after another; what becomes None is gone."""
    after = {tag: step.get(name) for tag, name in into.items() if name is not None}
    return {tag: name for tag, name in after.items() if name is not None}


def _depth(tag: str, parents: Mapping[str, str | None]) -> int:
    above = parents[tag]
    return 1 if above is None else 1 + _depth(above, parents)


STAGE = Stage(
    name="ontology",
    summary="raw tags merged into an ontology that a person can refine",
    config=OntologyConfig,
    needs={"prompts": Need(Kind.PROMPTS, "tagged instructions", columns=("tags",))},
    gives=Kind.ONTOLOGY,
    run=run,
    engines={"namer": "a model that names groups of tags and says which tag belongs to which"},
    optional_engines=("namer",),
    reads=("refinements", "templates"),
    version=2,
)
