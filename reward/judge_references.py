"""What rows of the tasks `judge` and `compare` say in their references, and preferences read as such rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator
from rapidfuzz import process

from align.core.errors import DataError
from align.core.formats import shape_of
from align.core.readers import Record
from align.core.records import Kind
from align.core.stage import StageConfig
from reward.judge import Scale
from reward.judge_pairs import Winner

Reference = TypeVar("Reference", bound=StageConfig)


class ScoreReference(StageConfig):
    """What a row of the task `judge` says in its reference."""

    rubric: str | list[str] | None = Field(None, description="what counts; a list is criteria")
    answer: str | None = Field(None, description="a reference answer to compare with")
    lowest: float | None = Field(None, allow_inf_nan=False, description="lowest score; the setting's by default")
    highest: float | None = Field(None, allow_inf_nan=False, description="highest score; the setting's by default")
    pass_from: float | None = Field(
        None, allow_inf_nan=False, description="the score from which on it passes; the setting's place on the scale"
    )

    def scale(self, default: Scale) -> Scale:
        """The row's scale; what it doesn't say is as in the settings, `pass_from` at the same share of the scale.

        Raises:
            DataError: lowest is not below highest, or pass_from is not between them.
        """
        lowest = default.lowest if self.lowest is None else self.lowest
        highest = default.highest if self.highest is None else self.highest
        if not lowest < highest:
            raise DataError(f"reference.lowest: found {lowest:g}, expected less than highest, {highest:g}")
        share = (default.pass_from - default.lowest) / (default.highest - default.lowest)
        pass_from = lowest + share * (highest - lowest) if self.pass_from is None else self.pass_from
        if not lowest <= pass_from <= highest:
            raise DataError(f"reference.pass_from: found {pass_from:g}, expected {lowest:g} to {highest:g}")
        return Scale(lowest, highest, pass_from)


class PairReference(StageConfig):
    """What a row of the task `compare` says in its reference."""

    other: str | list[Any] = Field(description="the completion to compare with, text or messages")
    winner: Winner | None = Field(None, description="the winner by a person's judgement, where it is known")
    rubric: str | list[str] | None = Field(None, description="what counts; a list is criteria")
    answer: str | None = Field(None, description="a reference answer to compare with")

    @model_validator(mode="before")
    @classmethod
    def _one_message_is_a_list_of_one(cls, given: Any) -> Any:
        other = given.get("other") if isinstance(given, dict) else None
        return {**given, "other": [other]} if isinstance(other, dict) else given


def as_comparison(record: Record, where: str) -> tuple[Record, str | None]:
    """A preference without a completion as a row of the task `compare`; any other record as it is.

    Returns:
        the record, and why the preference can't be read, if it can't.
    """
    if record.get("completion") is not None or record.get("chosen") is None or record.get("rejected") is None:
        return record, None
    try:
        (row,) = shape_of(list(record), Kind.PREFERENCES, where)(record, where)
    except DataError as problem:
        return record | {"task": "compare"}, str(problem)
    reference = record.get("reference") if record.get("task") == "compare" else None
    if isinstance(reference, str):
        try:
            reference = json.loads(reference)
        except (ValueError, RecursionError):
            return record, f"{where}: reference: no JSON object: {reference!r:.80}"
    if reference is not None and not isinstance(reference, Mapping):
        return record, f"{where}: reference: expected an object, found {type(reference).__name__}"
    reference = {**(reference or {}), "other": row["rejected"], "winner": "completion"}
    return {
        **record,
        "task": "compare",
        "prompt": row["prompt"],
        "completion": row["chosen"],
        "reference": reference,
    }, None


def read_reference(of: type[Reference], raw: Any) -> Reference:
    """A row's reference, an object or its JSON text, as what the task has there; null counts as left out.

    Raises:
        DataError: a key is unknown or missing, or a value is of the wrong kind; all that is wrong is named.
    """
    given = json.loads(raw) if isinstance(raw, str) else raw
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return of.model_validate_json(json.dumps(given))
    except ValidationError as invalid:
        raise DataError("; ".join(_told(of, error) for error in invalid.errors(include_url=False))) from invalid


def _told(of: type[StageConfig], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    where = f"reference.{name}" if name else "reference"
    if error["type"] == "extra_forbidden":
        nearest = process.extractOne(name[:80], list(of.model_fields))
        return f"{where}: unknown; did you mean {nearest[0] if nearest else 'rubric'!r}?"
    if error["type"] == "missing":
        return f"{where}: missing: {of.model_fields[name].description}"
    return f"{where}: {error['msg']}, found {error['input']!r:.80}"
