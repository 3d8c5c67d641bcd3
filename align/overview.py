"""What a recipe would do, and how far a run is, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from align.core.errors import RunError
from align.core.manifest import Manifest
from align.core.records import Kind
from align.lock import holder
from align.pipeline import RUN_FILE, Planned
from align.plan import Recipe, Source, Step
from align.progress import duration
from align.settings import wants_model


def print_plan(recipe: Recipe, planned: Sequence[Planned], console: Console) -> None:
    """The steps in order, done or to do, and what the sampling steps will ask for, as far as it is known."""
    rows_of = {p.step.name: p.done.rows for p in planned if p.done is not None}
    table = Table("step", "stage", "from", "state", "asks for", box=box.SIMPLE_HEAD)
    for p in planned:
        again = "to do again: something changed" if p.stale else "to do"
        state = f"done, {duration(p.done.seconds)}" if p.done else again
        asks = "" if p.done else _asks_for(recipe, p.step, rows_of)
        table.add_row(p.step.name, p.step.stage.name, ", ".join(p.step.needs_steps()), state, asks)
    console.print(table)
    left = sum(p.done is None for p in planned)
    console.print(f"{recipe.name}: no fault found; {left} of {len(planned)} steps to do, in {recipe.out}")


def _asks_for(recipe: Recipe, step: Step, rows_of: dict[str, int | None]) -> str:
    if not step.engines:
        return ""
    settings: dict[str, Any] = step.config.model_dump()
    counts = [
        _count(source, rows_of)
        for name, sources in step.inputs.items()
        if not wants_model(step.stage.needs[name]) and step.stage.needs[name].kind is Kind.PROMPTS
        for source in sources
    ]
    known = sum(count for count in counts if count is not None)
    prompts = "?" if None in counts or not counts else f"{known}"
    text = f"{prompts} prompts"
    if samples := settings.get("samples"):
        text += f" × {samples} samples"
    if most := settings.get("max_tokens"):
        text += f", at most {most} tokens each"
        if prompts != "?":
            text += f" ({known * (samples or 1) * most:,} in all)"
    return text


def _count(source: Source, rows_of: dict[str, int | None]) -> int | None:
    """How many rows a source has, where that is quickly told."""
    if source.step is not None:
        return rows_of.get(source.step) if source.spec is None else None
    if not isinstance(source.spec, str) or not Path(source.spec).exists():
        return None
    from align.core.locate import locate

    return sum(part.count() for part in locate(source.spec, None, None, None))


def print_status(folder: Path, console: Console) -> None:
    """The steps of a run with their state.

    Raises:
        RunError: the folder is no run.
    """
    try:
        about = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        steps = [(str(step["step"]), str(step["stage"]), str(step["fingerprint"])) for step in about["steps"]]
    except FileNotFoundError:
        raise RunError(f"{folder}: is no run: it has no {RUN_FILE}; give the folder that `align run` named") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise RunError(f"{folder / RUN_FILE}: can't be read ({problem}); `align run` writes it again") from problem
    process = holder(folder)
    table = Table("step", "stage", "state", box=box.SIMPLE_HEAD)
    for heading in ("rows", "time", "CPU"):
        table.add_column(heading, justify="right")
    waiting = process is not None
    for name, stage, fingerprint in steps:
        manifest = Manifest.read(folder / name)
        if manifest is not None and manifest.fingerprint == fingerprint:
            rows = "model" if manifest.rows is None else str(manifest.rows)
            table.add_row(name, stage, "done", rows, duration(manifest.seconds), duration(manifest.cpu_seconds))
        else:
            begun = (folder / name / "work").is_dir()
            state = "running" if waiting and begun else "begun" if begun else "to do"
            waiting = waiting and not begun
            table.add_row(name, stage, state, "", "", "")
    console.print(table)
    console.print(f"process {process} is at work" if process else "nothing is running here")
