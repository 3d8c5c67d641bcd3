"""The parquet schema of a dataset: fixed for the columns that a kind has, shown by the values for all others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind, Row

_TEXT = pa.string()
_TEXTS = pa.list_(_TEXT)
MESSAGES = ("prompt", "completion", "chosen", "rejected", "answer")
"""Columns that hold messages."""

_TYPES = {
    "prompt_id": _TEXT, "split": _TEXT, "source": _TEXT, "task": _TEXT, "family": _TEXT, "reference": _TEXT,
    "parent_id": _TEXT, "verdict": _TEXT, "detail": _TEXT, "generator": _TEXT, "raw_tags": _TEXT, "tags": _TEXTS,
    "sample_index": pa.int64(), "source_row": pa.int64(), "reward": pa.float64(), "margin": pa.float64(),
    "tag": _TEXT, "count": pa.int64(), "members": _TEXTS, "parent": _TEXT, "examples": _TEXTS,
}  # fmt: skip
_ONTOLOGY_ONLY = {"tag", "count", "members", "parent", "examples"}
_NEVER_NULL = {"prompt_id", "prompt", "split", "completion", "chosen", "rejected", "tag"}


class Schema:
    """The columns seen so far and their types; grows as rows come.

    Attributes:
        kind: of the rows.
        lenient: for rows from outside: a column of mixed types becomes text, and nothing is required.
        arrow: the schema as it is now.
    """

    def __init__(self, kind: Kind, lenient: bool = False) -> None:
        self.kind = kind
        self.lenient = lenient
        self.arrow = pa.schema([(name, _type_of(name, [])) for name in COLUMNS[kind]])

    def table(self, rows: Sequence[Row], first_row: int) -> tuple[pa.Table, bool]:
        """The rows as an Arrow table, and whether the schema had to grow for them.

        Args:
            rows: the rows.
            first_row: the number of the first, for messages.

        Raises:
            DataError: a value doesn't fit its column, or a row lacks what the kind must have.
        """
        names = list(dict.fromkeys([*self.arrow.names, *(name for row in rows for name in row)]))
        arrays: dict[str, pa.Array] = {}
        for name in names:
            values = [row.get(name) for row in rows]
            if name in _NEVER_NULL and name in COLUMNS[self.kind] and None in values and not self.lenient:
                raise DataError(f"row {first_row + values.index(None)}: has no {name!r}, which {self.kind.value} need")
            arrays[name] = self._column(name, values, first_row)
        before = self.arrow
        self.arrow = pa.schema([(name, self._grown(name, arrays[name], first_row)) for name in names])
        table = pa.table({name: arrays[name] for name in names}) if names else pa.table({})
        return self.widen(table), not self.arrow.equals(before)

    def widen(self, table: pa.Table) -> pa.Table:
        """The table with the columns and types of the schema as it is now."""
        columns = [
            self._cast(table[field.name], field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in self.arrow
        ]
        return pa.table(columns, schema=self.arrow)

    def _cast(self, column: Any, kind: pa.DataType) -> Any:
        if not self.lenient or column.type == kind:
            return column.cast(kind)
        if kind == _TEXT and pa.types.is_nested(column.type):
            return pa.array([_as_text(value) for value in column.to_pylist()], _TEXT)
        return column.cast(kind, safe=False)  # a whole number among fractions

    def _column(self, name: str, values: list[Any], first_row: int) -> pa.Array:
        if self._holds_messages(name):
            values = [_stored_messages(v, name, first_row + i) for i, v in enumerate(values)]
        fixed = _type_of(name, values) if self._is_fixed(name) else None
        if fixed is None and self.lenient and name in self.arrow.names and self.arrow.field(name).type == _TEXT:
            values = [_as_text(v) for v in values]
        try:
            found = pa.array(values, fixed) if fixed is not None else pa.array([_hollow(v) for v in values])
            if pa.types.is_list(found.type) and pa.types.is_null(found.type.value_type):
                return pa.array([v if v is None else [] for v in values], found.type)  # Arrow miscounts lists of nulls
            return found
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as problem:
            if fixed is None and self.lenient:
                return pa.array([_as_text(v) for v in values], _TEXT)
            raise _misfit(name, values, fixed, first_row, str(problem)) from problem

    def _grown(self, name: str, array: pa.Array, first_row: int) -> pa.DataType:
        if name not in self.arrow.names:
            return array.type
        known = self.arrow.field(name).type
        one, other = pa.schema([(name, known)]), pa.schema([(name, array.type)])
        try:
            return pa.unify_schemas([one, other], promote_options="permissive").field(0).type
        except pa.ArrowException as problem:
            if self.lenient and not self._is_fixed(name):
                return _TEXT
            raise DataError(
                f"rows {first_row} to {first_row + len(array) - 1}, column {name!r}: {array.type} was found, and the "
                f"rows before held {known}; one column holds one type: mend the source, or leave the column out"
            ) from problem

    def _is_fixed(self, name: str) -> bool:
        return self._holds_messages(name) or (
            name in _TYPES and (self.kind is Kind.ONTOLOGY or name not in _ONTOLOGY_ONLY)
        )

    def _holds_messages(self, name: str) -> bool:
        return self.kind is not Kind.ONTOLOGY and name in MESSAGES


def _type_of(name: str, values: Sequence[Any]) -> pa.DataType:
    if name not in MESSAGES:
        return _TYPES[name]
    more = sorted({key for value in values if value for turn in value for key in turn} - {"role", "content"})
    types = {"weight": pa.float64()}
    return pa.list_(pa.struct([(key, types.get(key, _TEXT)) for key in ("role", "content", *more)]))


def _stored_messages(value: Any, name: str, row: int) -> Any:
    """Messages as they are stored: tool calls as JSON text, for their arguments have no common shape."""
    if value is None:
        return None
    where = f"row {row}, column {name!r}"
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: {type(value).__name__} was found, a list of messages was expected: {value!r:.80}")
    stored = []
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise DataError(f'{where}: {turn!r:.80} is no message; {{"role": …, "content": …}} was expected, both text')
        if turn.get("tool_calls") is not None:
            turn = turn | {"tool_calls": json.dumps(turn["tool_calls"], ensure_ascii=False)}
        stored.append({key: part for key, part in turn.items() if part is not None})
    return stored


def _as_text(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _hollow(value: Any) -> Any:
    """The value with empty mappings made null: parquet has no struct without fields."""
    if isinstance(value, dict):
        return {key: _hollow(item) for key, item in value.items()} or None
    return [_hollow(item) for item in value] if isinstance(value, (list, tuple)) else value


def _misfit(name: str, values: list[Any], fixed: pa.DataType | None, first_row: int, problem: str) -> DataError:
    """The error for a column that Arrow refuses, with the first row that does not fit."""
    kind = fixed
    for number, value in enumerate(values):
        try:
            if fixed is not None:
                pa.array([value], fixed)
            else:
                pa.array([_hollow(v) for v in values[: number + 1]])
                kind = pa.array([_hollow(v) for v in values[: number + 1]]).type
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            expected = f"{kind} was expected" if kind is not None else "Arrow can't store it"
            return DataError(
                f"row {first_row + number}, column {name!r}: {value!r:.80} was found, {expected}; one column holds "
                "one type: mend the source, or leave the column out"
            )
    return DataError(f"column {name!r}: {problem}")
