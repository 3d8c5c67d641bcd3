"""What a recipe would do, and how far a run is, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from align.core.engines.completion_file import kept_in
from align.core.errors import RunError
from align.core.manifest import Manifest
from align.forecast import Forecast, forecasts
from align.lock import holder
from align.pipeline import RUN_FILE, Planned
from align.plan import Recipe
from align.progress import duration


def print_plan(recipe: Recipe, planned: Sequence[Planned], console: Console) -> None:
    """The steps in order, done or to do; then what the sampling steps will ask for, as far as that can be told."""
    table = Table("step", "stage", "from", "state", box=box.SIMPLE_HEAD)
    for p in planned:
        begun = "begun" if (p.folder / "work").is_dir() else "to do"
        again = "to do again: something changed" if p.stale else begun
        state = f"done, {duration(p.done.seconds)}" if p.done else again
        table.add_row(p.step.name, p.step.stage.name, ", ".join(p.step.needs_steps()), state)
    console.print(table)
    asked = list(forecasts(recipe, planned))
    if asked:
        _print_asked(asked, console)
    left = sum(p.done is None for p in planned)
    console.print(f"{recipe.name}: no fault found; {left} of {len(planned)} steps to do, in {recipe.out}")
    if known := [each for each in asked if each.to_sample is not None]:
        console.print("to be sampled, where it is known: " + _total(known))


def _print_asked(asked: Sequence[Forecast], console: Console) -> None:
    begun, priced = any(each.kept != 0 for each in asked), any(each.cost is not None for each in asked)
    table = Table("to sample", "by", box=box.SIMPLE_HEAD)
    for heading in ("prompts × samples", *(["kept"] if begun else []), "tokens", *(["USD"] if priced else [])):
        table.add_column(heading, justify="right")
    table.add_column("tokens each")
    for each in asked:
        kept = "of other settings" if each.kept is None else f"{each.kept:,}" if each.kept else ""
        about = "about" if each.told_by else "≤"
        tokens = "?" if each.to_sample is None else f"{about} {round(each.to_sample * each.tokens_each):,}"
        table.add_row(
            each.step,
            f"{each.role}: {each.model}",
            f"{'?' if each.prompts is None else f'≤ {each.prompts:,}'} × {each.samples}",
            *([kept] if begun else []),
            tokens,
            *(["" if each.cost is None else f"{each.cost:,.2f}"] if priced else []),
            f"about {each.tokens_each:.0f}, {each.told_by}" if each.told_by else f"≤ {each.tokens_each:.0f}",
        )
    console.print(table)


def _total(known: Sequence[Forecast]) -> str:
    completions = sum(each.to_sample or 0 for each in known)
    tokens = sum((each.to_sample or 0) * each.tokens_each for each in known)
    parts = [f"up to {completions:,} completions, {round(tokens):,} tokens"]
    if priced := [each.cost for each in known if each.cost is not None]:
        parts.append(f"{sum(priced):,.2f} USD")
    if kept := sum(each.kept or 0 for each in known):
        parts.append(f"besides {kept:,} completions kept from before")
    return ", ".join(parts)


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
            if kept := sum(kept_in(file)[0] for file in (folder / name / "work").glob("completions-*")):
                state += f", {kept:,} completions kept"
            waiting = waiting and not begun
            table.add_row(name, stage, state, "", "", "")
    console.print(table)
    console.print(f"process {process} is at work" if process else "nothing is running here")
