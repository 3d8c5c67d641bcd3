"""A person's edits of an ontology: read from YAML, checked, applied; and the file that is made to be edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rapidfuzz import process

from align.core.errors import DataError
from align.core.records import Row

_HEADER = """\
# The tags of this run. To refine them copy this file, fill in the four sections below, and give it to the stage
# `ontology` as `refinements`; the list `tags` is only for reading. Every name must be a tag of the list (the name that
# a merge or a rename gives may be new).
#
#   merge: {mathematics: [arithmetic, algebra]}    these become one tag
#   rename: {qa: question answering}
#   drop: [instruction following]
#   parent: {arithmetic: mathematics}              put a tag under another one; '' for none
"""
_SECTIONS = ("merge", "rename", "drop", "parent", "tags")


@dataclass(frozen=True)
class Refinements:
    """Edits, applied in this order: merge, rename, drop, parent.

    Attributes:
        merge: the tag that the others become.
        rename: old name to new name.
        drop: tags that no instruction has any more.
        parent: tag to its parent; an empty text for none.
    """

    merge: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    drop: Sequence[str] = ()
    parent: Mapping[str, str] = field(default_factory=dict)

    def renaming(self, tags: Sequence[str], where: str) -> dict[str, str | None]:
        """What each tag becomes; None for a dropped one.

        Raises:
            DataError: a tag is unknown, or a new name is already taken; all such problems at once.
        """
        into: dict[str, str | None] = {tag: tag for tag in tags}
        problems: list[str] = []

        def known(tag: str, section: str) -> bool:
            now = {name for name in into.values() if name is not None}
            if tag not in now:
                nearest = process.extractOne(tag, sorted(now)) if now else None
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                problems.append(f"{where}: {section}: unknown tag {tag!r}{hint}")
            return tag in now

        def become(old: str, new: str | None) -> None:
            into.update({tag: new for tag, name in into.items() if name == old})

        for target, sources in self.merge.items():
            for source in sources:
                if source != target and known(source, f"merge.{target}"):
                    become(source, target)
        for old, new in self.rename.items():
            if known(old, "rename"):
                if new in into.values():
                    problems.append(f"{where}: rename: {new!r} is a tag already; use merge to make two tags one")
                become(old, new)
        for tag in self.drop:
            if known(tag, "drop"):
                become(tag, None)
        for tag, parent in self.parent.items():
            if known(tag, "parent") and parent and known(parent, f"parent.{tag}") and tag == parent:
                problems.append(f"{where}: parent: {tag!r} can't be its own parent")
        if problems:
            raise DataError("\n".join(problems))
        return into

    def parents(self, found: dict[str, str | None], where: str) -> dict[str, str | None]:
        """The parents with those that the edits set; a parent that was found gives way where both make a circle.

        Raises:
            DataError: the edits put a tag below itself.
        """
        parents: dict[str, str | None] = dict.fromkeys(found)
        for edited in (True, False):
            wanted = {tag: above or None for tag, above in self.parent.items()} if edited else found
            for tag, parent in wanted.items():
                above = parent
                while above is not None and above != tag:
                    above = parents[above]
                if above is None and (edited or tag not in self.parent):
                    parents[tag] = parent
                elif above is not None and edited:
                    raise DataError(f"{where}: parent: {tag!r} is put below itself; break the circle at {parent!r}")
        return parents


def read_refinements(path: Path) -> Refinements:
    """Reads a file of edits.

    Raises:
        DataError: it can't be read, or isn't of the form that `write_ontology` describes.
    """
    try:
        # every scalar stays text: a tag may be called `no`, or 2024
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise DataError(f"{path}: can't be read as a file of refinements ({problem})") from problem
    if found in (None, ""):
        return Refinements()
    if not isinstance(found, dict):
        raise DataError(
            f"{path}: a mapping with {', '.join(_SECTIONS[:-1])} was expected, found {type(found).__name__}"
        )
    for key in found:
        if key not in _SECTIONS:
            nearest = process.extractOne(str(key), _SECTIONS)
            raise DataError(f"{path}: {key}: unknown section; did you mean {nearest[0]!r}?")
    sections = {key: value for key, value in found.items() if key != "tags" and value not in (None, "")}
    forms: dict[str, tuple[str, Any]] = {
        "merge": ("a mapping of a tag to a list of tags", _is_lists),
        "rename": ("a mapping of an old name to a new one", _is_texts),
        "drop": ("a list of tags", _is_list),
        "parent": ("a mapping of a tag to its parent", _is_texts),
    }
    for key, value in sections.items():
        form, check = forms[key]
        if not check(value):
            raise DataError(f"{path}: {key}: {form} was expected, found {value!r:.80}")
    return Refinements(**sections)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_lists(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_list(item) for item in value.values())


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def write_ontology(path: Path, refinements: Refinements, rows: Sequence[Row]) -> None:
    """Writes the ontology with the edits that made it, so that the next edits can be added to a copy."""
    edits = {
        "merge": {target: list(sources) for target, sources in refinements.merge.items()},
        "rename": dict(refinements.rename),
        "drop": list(refinements.drop),
        "parent": dict(refinements.parent),
    }
    tags = [{key: row[key] for key in ("tag", "count", "parent", "members")} for row in rows]
    parts = [yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=110) for part in (edits, {"tags": tags})]
    path.write_text(_HEADER + "\n".join(["", *parts]), encoding="utf-8")
