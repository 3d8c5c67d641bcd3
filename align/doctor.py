"""`align doctor`: every training of a recipe rehearsed up to its first step, before hours are spent on it.

A rehearsal is the stage itself with `Tools.rehearse`: it tokenises, masks, orders, loads the model, splits the batch
and tells its start (align/core/start.py), as a run would, and ends there. What a run refuses, it refuses. All happens
in a temporary folder; the run's own is only read.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.core.cost import amount, duration
from align.core.errors import AlignError, RecipeError
from align.core.memory import memory_there
from align.core.stage import Tools
from align.fingerprints import step_seed
from align.folders import cache_folder
from align.inputs import Engines, open_inputs
from align.pipeline import Planned
from align.plan import Recipe, Step
from align.progress import Lines

BYTES_TRAINED = 16
"""On disk for each trained weight: fp32, AdamW's two moments, and a second checkpoint while one is written over."""


@dataclass(frozen=True)
class Found:
    """What the rehearsals came to: steps that were rehearsed, those that wait for others, warnings and faults."""

    rehearsed: list[str]
    waiting: list[str]
    warnings: int
    faults: list[str]


def examine(recipe: Recipe, planned: Sequence[Planned]) -> Found:
    """Rehearses each training whose inputs are there, and prints what it finds.

    Raises:
        RecipeError: with the faults of all steps.
    """
    print(machine(recipe.out))
    done = {each.step.name for each in planned if each.done is not None}
    found = Found([], [], 0, [])
    for each in planned:
        step = each.step
        if not step.stage.trains:
            continue
        if each.done is not None and not recipe.alone:
            print(f"{step.name}: done before")
            continue
        if missing := [name for name in step.needs_steps() if name not in done]:
            print(f"{step.name}: waits for {', '.join(missing)}; run the recipe up to there, then ask again")
            found.waiting.append(step.name)
            continue
        found = _examine_step(recipe, step, found)
    _print_end(recipe, found)
    if found.faults:
        raise RecipeError(found.faults)
    return found


def _examine_step(recipe: Recipe, step: Step, found: Found) -> Found:
    began = time.monotonic()
    print(f"{step.name}: rehearsing", flush=True)
    try:
        start = rehearse(recipe, step)
    except AlignError as problem:
        problems = problem.problems if isinstance(problem, RecipeError) else [str(problem)]
        found.faults.extend(f"{step.name}: {each}" for each in problems)
        print(f"{step.name}: would be refused, see below")
        return found
    if start is None:
        found.faults.append(f"{step.name}: the stage {step.verb} trains, but tells no start when it is rehearsed")
        return found
    warnings = len(start.get("warnings", ())) + _warn_of_disk(recipe.out, step.name, start)
    print(f"{step.name}: would begin; rehearsed in {duration(time.monotonic() - began)}")
    return Found([*found.rehearsed, step.name], found.waiting, found.warnings + warnings, found.faults)


def rehearse(recipe: Recipe, step: Step) -> dict[str, Any] | None:
    """Takes a training step up to before its first step; gives its start's figures.

    Raises:
        AlignError: what a run would raise there.
    """
    with TemporaryDirectory(prefix="align-doctor-") as name:
        folder = Path(name) / step.name
        work = folder / "work" / "rehearsal"
        work.mkdir(parents=True)
        inputs = open_inputs(recipe, step, folder / "work" / "sources")
        seed = step_seed(recipe.seed, step.name)
        if step.processes > 1:
            from align.launch import launch

            result = launch(step, inputs, seed, work, folder, rehearse=True)
        else:
            progress = Lines(step.name)
            try:
                with Engines(recipe, step, folder / "work") as engines:
                    tools = Tools(seed, engines, progress, work, folder, step.speed, cache_folder(), rehearse=True)
                    result = step.stage.run(step.config, inputs, tools)
            finally:
                progress.close()
    start = result.summary.get("start")
    return dict(start) if start else None


def machine(out: Path) -> str:
    """What there is to work with, as one line."""
    import torch

    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        device = f"{', '.join(names)} ({amount(memory_there('cuda'))} free); "
    else:
        device = "no GPU; "
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{device}{cores} cores, {amount(memory_there('cpu'))} of memory and {amount(_disk_free(out))} of disk free; "
        f"Python {platform.python_version()}, {libraries}"
    )


def _warn_of_disk(out: Path, name: str, start: dict[str, Any]) -> int:
    """Warns where checkpoints and the model won't fit beside each other; gives how many warnings that is."""
    needed = BYTES_TRAINED * int(start.get("trained", 0)) + 4 * int(start.get("parameters", 0))
    if (free := _disk_free(out)) > needed:
        return 0
    print(f"  {name}: warning: checkpoints and model take about {amount(needed)}, {amount(free)} are free in {out}")
    return 1


def _disk_free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _print_end(recipe: Recipe, found: Found) -> None:
    parts = [f"{len(found.rehearsed)} rehearsed"]
    parts += [f"{len(found.waiting)} waiting for other steps"] if found.waiting else []
    parts += [f"{found.warnings} warning{'s' if found.warnings > 1 else ''}"] if found.warnings else []
    parts += [f"{len(found.faults)} at fault:" if found.faults else "no fault found"]
    if not any(step.stage.trains for step in recipe.steps.values()):
        parts = ["no step of it trains; `align check` looks at the others"]
    print(f"{recipe.name}: {', '.join(parts)}", flush=True)
