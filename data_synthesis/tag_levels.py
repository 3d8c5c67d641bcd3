"""The levels of an ontology: from raw tags to atomic ones, and from a tag up to its top-level tag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from align.core.store import Table


def atomic_tags(ontology: Table) -> dict[str, str]:
    """Raw tag to the ontology's tag. A name without members only groups other tags, and is on no instruction."""
    rows = (row for row in ontology.rows(["tag", "members"]) if row["members"])
    return {raw: row["tag"] for row in rows for raw in [*row["members"], row["tag"]]}


def parents_in(ontology: Table) -> dict[str, str | None]:
    """Every tag's parent; None for those at the top."""
    return {row["tag"]: row["parent"] for row in ontology.rows(["tag", "parent"])}


def lineage(tag: str, parents: Mapping[str, str | None]) -> Iterator[str]:
    """Yields a tag, its parent, and so on to the top; a chain that a person's edits closed to a ring ends there."""
    seen: set[str] = set()
    name: str | None = tag
    while name is not None and name not in seen:
        seen.add(name)
        yield name
        name = parents.get(name)


def root_of(tag: str, parents: Mapping[str, str | None]) -> str:
    """The top-level tag: the last of a tag's lineage."""
    *_, root = lineage(tag, parents)
    return root
