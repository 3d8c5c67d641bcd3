"""A person's edits of an ontology: read from YAML, checked, applied on every run; and the file made to be edited."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rapidfuzz import process

from align.core.errors import DataError
from align.core.records import Row
from data_synthesis.tag_merging import key_of

_HEADER = """\
# The tags of this run. To refine them copy this file, fill in the five sections below, and give it to the stage
# `ontology` as `refinements`; the list `tags` is only for reading. The edits are applied again on every run: a tag is
# known by its name in any spelling, and what a run has no tag for is told and left out.
#
#   merge: {mathematics: [arithmetic, algebra]}    these become one tag; its name may be new
#   rename: {qa: question answering}
#   drop: [instruction following]
#   parent: {arithmetic: mathematics}              put a tag under another one, or one of `top`; '' for none
#   top: [mathematics, writing]                    all tags at the top, instead of those found; may be new
"""
_SECTIONS = ("merge", "rename", "drop", "parent", "top", "tags")
_MEMBERS = 20
"""Members that the file lists of a tag; the dataset has all."""
_PLAIN = re.compile(r"[^\W\d_][\w ]*\w|[^\W\d_]")
_NOT_TEXT = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


@dataclass
class Applied:
    """What edits come to with the tags of one run.

    Attributes:
        into: what each tag becomes; None for a dropped one.
        parent: tag to the parent that was set; None for none.
        top: names of the tags that were put at the top.
        edits: how many were applied.
        problems: what could not be: a line for each.
    """

    into: dict[str, str | None]
    parent: dict[str, str | None] = field(default_factory=dict)
    top: list[str] = field(default_factory=list)
    edits: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Refinements:
    """Edits, applied in this order: merge, rename, drop, parent, top.

    Attributes:
        merge: the tag that the others become.
        rename: old name to new name.
        drop: tags that no instruction has any more.
        parent: tag to its parent; an empty text for none.
        top: the tags at the top.
    """

    merge: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    drop: Sequence[str] = ()
    parent: Mapping[str, str] = field(default_factory=dict)
    top: Sequence[str] = ()

    def apply(self, tags: Sequence[str], where: str, became: Mapping[str, str] | None = None) -> Applied:
        """The edits on these tags; a tag is found by its name, else by another spelling of it.

        Args:
            tags: of this run.
            where: the edits' file, for messages.
            became: what raw tags have become, for messages.
        """
        names: dict[str, list[str]] = {tag: [tag] for tag in tags}
        spellings: dict[str, str] = {key_of(tag): tag for tag in tags}
        done = Applied({})

        def known(tag: str, section: str) -> str | None:
            name = tag if tag in names else spellings.get(key_of(tag))
            if name is not None and name in names:
                return name
            if became and became.get(tag) in names:
                hint = f"; it is part of {became[tag]!r} now"
            else:
                nearest = process.extractOne(tag, list(names), score_cutoff=70)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            done.problems.append(f"{where}: {section}: unknown tag {tag!r}{hint}")
            return None

        def become(old: str, new: str | None) -> None:
            moved = names.pop(old)
            if new is not None:
                names.setdefault(new, []).extend(moved)
                spellings[key_of(new)] = new
            done.edits += 1

        for target, sources in self.merge.items():
            found = [known(source, f"merge.{target}") for source in sources]
            same = spellings.get(key_of(target))  # the target itself, if it is spelled in another way in this run
            for name in dict.fromkeys([*found, same]):
                if name is not None and name in names and name != target:
                    become(name, target)
        for old, new in self.rename.items():
            if (name := known(old, "rename")) is not None and name != new:
                if new in names:
                    done.problems.append(f"{where}: rename: {new!r} is a tag already; the two are merged")
                become(name, new)
        for tag in self.drop:
            if (name := known(tag, "drop")) is not None:
                become(name, None)
        for tag in self.top:
            same = spellings.get(key_of(tag))
            done.top.append(same if same in names and tag not in names else tag)
            done.edits += 1
        for tag, parent in self.parent.items():
            name = known(tag, "parent")
            above = parent if not parent or parent in done.top else known(parent, f"parent.{tag}")
            if name is not None and above is not None:
                done.parent[name] = above or None
                done.edits += 1
        done.into = dict.fromkeys(tags)
        done.into.update({tag: name for name, members in names.items() for tag in members})
        return done


def with_parents(applied: Applied, found: Mapping[str, str | None], where: str) -> dict[str, str | None]:
    """The parents with those that the edits set; a parent that was found gives way where both make a circle.

    Raises:
        DataError: the edits put a tag below itself.
    """
    parents: dict[str, str | None] = dict.fromkeys([*found, *applied.top])
    set_ones = {**applied.parent, **dict.fromkeys(applied.top)}
    for edited in (True, False):
        for tag, parent in (set_ones if edited else found).items():
            if not edited and tag in set_ones:
                continue
            above = parent
            while above is not None and above != tag:
                above = parents[above]
            if above is None:
                parents[tag] = parent
            elif edited:
                raise DataError(f"{where}: parent: {tag!r} is put below itself; break the circle at {parent!r}")
    return parents


def read_refinements(path: Path) -> Refinements:
    """Reads a file of edits.

    Raises:
        DataError: it can't be read, or isn't of the form that `write_ontology` describes.
    """
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar stays text: a tag may be called `no`, or 2024
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
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
        "rename": ("a mapping of an old name to a new one", _is_renaming),
        "drop": ("a list of tags", _is_list),
        "parent": ("a mapping of a tag to its parent", _is_texts),
        "top": ("a list of tags", _is_list),
    }
    for key, value in sections.items():
        form, check = forms[key]
        if not check(value):
            raise DataError(f"{path}: {key}: {form} was expected, found {value!r:.80}")
    edits = Refinements(**sections)
    for tag, parent in edits.parent.items():
        if tag == parent:
            raise DataError(f"{path}: parent: {tag!r} can't be its own parent")
        if tag in edits.top and parent:
            raise DataError(f"{path}: parent: {tag!r} is put under {parent!r} and stands in `top`; take one out")
    return edits


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_lists(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_list(item) for item in value.values())


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_renaming(value: Any) -> bool:
    return _is_texts(value) and all(value.values())


def write_ontology(path: Path, refinements: Refinements, rows: Sequence[Row]) -> None:
    """Writes the ontology, two lines a tag, each below its parent, with the edits that made it.

    So the next edits can be added to a copy of the file.
    """
    edits = {
        "merge": {target: list(sources) for target, sources in refinements.merge.items()},
        "rename": dict(refinements.rename),
        "drop": list(refinements.drop),
        "parent": dict(refinements.parent),
        "top": list(refinements.top),
    }
    below: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        below[row["parent"]].append(row)
    with path.open("w", encoding="utf-8") as file:
        file.write(_HEADER + "\n" + yaml.safe_dump(edits, sort_keys=False, allow_unicode=True, width=110) + "\ntags:\n")
        waiting = [(row, 0) for row in reversed(below[None])]
        while waiting:
            row, depth = waiting.pop()
            file.writelines(_entry(row, depth))
            waiting += [(child, depth + 1) for child in reversed(below[row["tag"]])]


def _entry(row: Row, depth: int) -> list[str]:
    members = [_scalar(member) for member in row["members"][:_MEMBERS]]
    members += ["…"] if len(row["members"]) > _MEMBERS else []
    indent = " " * 4 * depth
    parent = "" if row["parent"] is None else f" parent: {_scalar(row['parent'])},"
    first = f"- {indent}{{tag: {_scalar(row['tag'])}, count: {row['count']},{parent} members: [{', '.join(members)}],\n"
    example = " ".join(row["examples"][0].split())[:100] if row["examples"] else ""
    return [first, f"   {indent}example: {_scalar(example)}}}\n"]


def _scalar(text: str) -> str:
    """The text as YAML inside brackets: as it is where nothing in it can be misread, else in quotes."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
