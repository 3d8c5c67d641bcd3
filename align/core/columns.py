"""Columns in the type that they are stored as, and references made from the columns that people have."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from align.core.errors import DataError
from align.core.formats import ANSWERS, GSM8K_ANSWER
from align.core.records import COLUMNS, Kind, Row
from align.core.unfold import Record

TASK_OF = {"gsm8k": "math", "ifeval": "constraints"}
"""The task that a named way to make references means."""

_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode
_OURS = {name for columns in COLUMNS.values() for name in columns} | {"answer", "tags", "raw_tags", "parent_id"}


def reference_columns(reference_from: str | dict[str, str] | None) -> set[str]:
    """The columns whose content goes into the reference and nowhere else."""
    if isinstance(reference_from, dict):
        return set(reference_from.values())
    if reference_from == "ifeval":
        return {"instruction_id_list", "kwargs"}
    return set() if reference_from in (None, "gsm8k") else {str(reference_from)}


def reference_of(record: Record, reference_from: str | dict[str, str], where: str) -> str:
    """The reference of a record as JSON text.

    Args:
        record: as it was read.
        reference_from: `gsm8k`: the number after `####` of the answer; `ifeval`: its constraints; a mapping: for each
            key of the reference the column that holds it; any other text: the column that holds the answer.
        where: the record's place.

    Raises:
        DataError: a column is missing, or holds no such answer.
    """
    if reference_from == "gsm8k":
        text = next((record[name] for name in ANSWERS if isinstance(record.get(name), str)), "")
        found = GSM8K_ANSWER.search(text)
        if not found:
            raise DataError(f"{where}: an answer that ends with '#### number' was expected: {text[-60:]!r}")
        return json.dumps({"answer": found[1].replace(",", "")})
    missing = sorted(reference_columns(reference_from) - set(record))
    if missing:
        raise DataError(f"{where}: reference_from needs {', '.join(missing)}; the columns are {', '.join(record)}")
    if reference_from == "ifeval":
        pairs = zip(record["instruction_id_list"], record["kwargs"], strict=True)
        given = [{"id": i, "kwargs": {k: v for k, v in (kw or {}).items() if v is not None}} for i, kw in pairs]
        return json.dumps({"constraints": given}, ensure_ascii=False)
    if isinstance(reference_from, dict):
        return json.dumps({key: record[name] for key, name in reference_from.items()}, ensure_ascii=False)
    return json.dumps({"answer": str(record[reference_from])}, ensure_ascii=False)


def stored(row: Row, kind: Kind | None, where: str) -> Row:
    """The row with every column in the type that it is stored as; nested values that no kind knows become JSON text.

    Raises:
        DataError: a reward, margin or sample index is no number (where `kind` is None it becomes null).
    """
    row = dict(row)
    for name, value in row.items():
        if value is None or name in ("prompt", "completion", "chosen", "rejected", "answer"):
            continue
        if name in ("reward", "margin", "sample_index", "source_row"):
            row[name] = _number(value, int if name in ("sample_index", "source_row") else float, name, kind, where)
        elif name == "tags":
            row[name] = _tags(value)
        elif name in _OURS and not isinstance(value, str):
            row[name] = _as_json(value)
        elif name in _OURS and value == "" and name != "detail":
            row[name] = None  # an empty cell of a table
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)):
            row[name] = _as_json(value)
    return row


def _number(value: Any, to: type, name: str, kind: Kind | None, where: str) -> Any:
    if value == "":
        return None
    try:
        number = to(value)
        if abs(number) >= 2**63 and to is int:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError) as problem:
        if kind is None:
            return None
        raise DataError(f"{where}: {name} is {value!r:.60}, a number was expected") from problem


def _tags(value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    return [str(tag) for tag in value] if isinstance(value, list) else [str(value)]
