"""What `align STAGE --help` shows: every input, engine and setting with its type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.table import Table

from align.core.records import COLUMNS, Kind
from align.core.stage import Need, Stage
from align.settings import speed_of

_NAMES = {int: "int", float: "float", str: "text", bool: "true | false", Path: "path", NoneType: "null", Any: "any"}
_SIGNS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("min_length", "length ≥"), ("max_length", "length ≤"))


def print_stage_help(stage: Stage, console: Console) -> None:
    """Prints the help of one stage."""
    paper = (stage.run.__globals__.get("__doc__") or "").strip()
    console.print(f"\n[bold]align {stage.name}[/bold] \\[FILE.yaml] key=value … out=FOLDER\n")
    console.print(paper or stage.summary, markup=False, highlight=False)
    console.print(f"\nGives {stage.gives.value.replace('_', ' ')}{_columns(stage)}.\n")
    inputs = [(name, _kind(need), "" if need.optional else "required", need.help) for name, need in stage.needs.items()]
    _print(
        console, "Inputs (an engine is a model, or {kind: …, model: …} with its settings)", [*inputs, *_engines(stage)]
    )
    _print(console, "Settings", sorted(settings_rows(stage.config), key=lambda row: row[2] != "required"))
    run_rows = [
        ("out", "path", "required", "folder for the result: data/ or model/, manifest.json, a card"),
        ("seed", "int", "0", "decides all randomness"),
        ("overwrite", "true | false", "false", "replace another result that is in `out`"),
        *([("processes", "int", "1", "train in so many processes on this machine")] if stage.trains else []),
        *settings_rows(speed_of(stage)),
    ]
    _print(console, "The run (how fast, where to; changing these makes no other result, but for seed)", run_rows)


def settings_rows(of: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every setting of a class."""
    for name, field in of.model_fields.items():
        yield name, type_text(field), _default(field), field.description or ""


def type_text(field: FieldInfo) -> str:
    """A setting's type in words, with its range."""
    limits = [f"{sign} {getattr(mark, key)}" for mark in field.metadata for key, sign in _SIGNS if hasattr(mark, key)]
    return " ".join([_text(field.annotation), ", ".join(limits)]).strip()


def _text(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, UnionType):
        return " | ".join(_text(each) for each in inner)
    if origin in (list, tuple, set):
        return f"list of {_text(inner[0])}" if inner else "list"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _text(inner[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(need: Need) -> str:
    kinds = need.kind if isinstance(need.kind, tuple) else (need.kind,)
    return " | ".join("any rows" if kind is None else kind.value.replace("_", " ") for kind in kinds)


def _engines(stage: Stage) -> Iterator[tuple[str, str, str, str]]:
    for role, meaning in stage.engines.items():
        default = "" if role in stage.optional_engines else "required"
        yield role, "engine, or a list" if role in stage.several else "engine", default, meaning


def _columns(stage: Stage) -> str:
    columns = [*COLUMNS.get(stage.gives, ()), *stage.adds]
    return f" with the columns {', '.join(dict.fromkeys(columns))}" if stage.gives is not Kind.MODEL and columns else ""


def _print(console: Console, title: str, rows: Any) -> None:
    table = Table("name", "type", "default", "meaning", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    table.columns[1].max_width, table.columns[2].max_width = 30, 18
    table.columns[3].min_width = 40
    any_row = False
    for name, kind, default, meaning in rows:
        any_row = True
        table.add_row(f"[bold]{name}[/bold]", _plain(kind), _plain(default), _plain(meaning))
    if any_row:
        console.print(table)


def _plain(text: str) -> str:
    """Text with nothing in it that rich would take for its own mark-up."""
    return text.replace("[", "\\[")
