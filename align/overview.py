"""What a recipe would do, and how far a run is, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


def print_plan(recipe: Recipe, planned: Sequence[Planned], console: Console) -> None:
    """The steps in order, done or to do, and what the sampling steps will ask for, as far as settings tell."""
    rows_of = {p.step.name: p.done.rows for p in planned if p.done is not None}
    table = Table("step", "stage", "from", "state", "asks for", box=box.SIMPLE_HEAD)
    completions = tokens = 0
    for p in planned:
        again = "to do again: something changed" if p.stale else "to do"
        state = f"done, {duration(p.done.seconds)}" if p.done else again
        asks = ""
        if p.step.engines and not p.done:
            prompts, samples, most = _asks_for(recipe, p.step, rows_of)
            known = "?" if prompts is None else f"≤ {prompts:,}"
            asks = f"{known} prompts × {samples}, ≤ {most or '?'} tokens each"
            completions += (prompts or 0) * samples
            tokens += (prompts or 0) * samples * most
        table.add_row(p.step.name, p.step.stage.name, ", ".join(p.step.needs_steps()), state, asks)
    console.print(table)
    left = sum(p.done is None for p in planned)
    console.print(f"{recipe.name}: no fault found; {left} of {len(planned)} steps to do, in {recipe.out}")
    if completions:
        console.print(f"to be sampled, where it is known: up to {completions:,} completions, {tokens:,} tokens")


def _asks_for(recipe: Recipe, step: Step, rows_of: Mapping[str, int | None]) -> tuple[int | None, int, int]:
    """At most how many prompts, how many samples of each, and most tokens of a sample."""
    settings = step.config.model_dump()
    counts = [
        _most_rows(recipe, source, rows_of)
        for name, sources in step.inputs.items()
        if step.stage.needs[name].kind is Kind.PROMPTS
        for source in sources
    ]
    known = sum(count for count in counts if count is not None)
    samples = int(settings.get("samples", 1)) + int(settings.get("greedy", False))
    return (None if None in counts or not counts else known), samples, int(settings.get("max_tokens", 0))


def _most_rows(recipe: Recipe, source: Source, rows_of: Mapping[str, int | None]) -> int | None:
    """The most rows that a source can have, where that is quickly told: prompts never become more on their way."""
    if source.step is None:
        return _rows_there(source.spec)
    if rows_of.get(source.step) is not None:
        return rows_of[source.step]
    step = recipe.steps[source.step]
    limit = getattr(step.config, "count", None)
    if step.inputs:
        counts = [_most_rows(recipe, each, rows_of) for each in step.inputs.get("prompts", ())]
    else:
        given = getattr(step.config, "source", None)
        counts = [_rows_there(each) for each in (given if isinstance(given, list) else [given])]
    most = None if None in counts or not counts else sum(count for count in counts if count is not None)
    return min((count for count in (most, limit) if isinstance(count, int)), default=None)


def _rows_there(spec: Any) -> int | None:
    """Rows of a local file or folder, or of the embedded world; None for anything else."""
    if isinstance(spec, Mapping) and isinstance(tiny := spec.get("tiny"), Mapping):
        return sum(count for count in dict(tiny.get("families", {})).values() if isinstance(count, int)) or None
    path = spec.get("path", spec.get("source")) if isinstance(spec, Mapping) else spec
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return None
    from align.core.locate import locate

    return sum(part.count() for part in locate(path, None, None, None))


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
