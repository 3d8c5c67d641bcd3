"""A constitution: principles with what a model is told to follow them and not to; read from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from align.core.errors import DataError
from align.core.records import Row
from align.core.stage import StageConfig

PromptKind = Literal["benign", "harmful"]

_KINDS: dict[str, PromptKind] = {
    "benign": "benign", "safe": "benign", "harmless": "benign",
    "harmful": "harmful", "unsafe": "harmful",
}  # fmt: skip
"""The words for a prompt's kind in a column of data."""


class Principle(StageConfig):
    """One line of a constitution; see the shipped file for the meaning of its fields."""

    id: str = Field(min_length=1, description="names the principle in the rows")
    text: str = Field(min_length=1, description="the principle itself; judge, critique and revision see it")
    aligned: str = Field(min_length=1, description="what the model is told so that it follows the principle")
    deviating: str = Field(min_length=1, description="what the model is told so that it doesn't")
    families: tuple[str, ...] = Field((), description="only for prompts of these families; all, where it is left out")
    kinds: tuple[PromptKind, ...] = Field(
        (), description="only for prompts known to be of these kinds, benign or harmful; all, where it is left out"
    )

    def fits(self, row: Row, kind: PromptKind | None) -> bool:
        """Whether the principle is for this prompt."""
        return (not self.families or row["family"] in self.families) and (not self.kinds or kind in self.kinds)


def kind_of(row: Row, column: str) -> PromptKind | None:
    """The kind of a prompt: of its reference (task `principle`), else of a column; None where neither knows.

    The column may say benign, safe or harmless; harmful or unsafe.
    """
    if row["task"] == "principle" and row["reference"]:
        try:
            kind = json.loads(row["reference"]).get("kind")
        except (ValueError, AttributeError):
            kind = None
        if kind in _KINDS:
            return _KINDS[kind]
    return _KINDS.get(str(row.get(column)).strip().lower())


def read_constitution(path: Path) -> list[Principle]:
    """Reads a constitution.

    Raises:
        DataError: the file can't be read, or an entry lacks a field, has an unknown one, or repeats an id.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise DataError(f"constitution {path}: can't be read ({problem})") from problem
    if not isinstance(entries, list) or not entries:
        raise DataError(f"constitution {path}: a list of principles was expected, found {entries!r:.80}")
    principles: list[Principle] = []
    for number, entry in enumerate(entries, start=1):
        try:
            principles.append(Principle.model_validate_json(json.dumps(entry)))
        except ValidationError as invalid:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in invalid.errors())
            raise DataError(
                f"constitution {path}: principle {number}: needs the texts id, text, aligned and deviating, and may "
                f"have lists `families` and `kinds`; {wrong}"
            ) from invalid
    check_ids(principles, f"constitution {path}")
    return principles


def check_ids(principles: Sequence[Principle], where: str) -> None:
    """Refuses an id that is there twice: the rows could not tell the principles apart.

    Raises:
        DataError: it is.
    """
    seen: set[str] = set()
    for number, principle in enumerate(principles, start=1):
        if principle.id in seen:
            raise DataError(f"{where}: principle {number}: the id {principle.id!r} is there twice")
        seen.add(principle.id)
