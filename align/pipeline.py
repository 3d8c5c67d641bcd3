"""Running a recipe: the steps that are not done yet, one after the other, each leaving a folder with a manifest.

A step's folder holds `data/` and a card, or `model/`; `metrics.jsonl` of a training; `manifest.json`, written last, so
that a folder without one is unfinished; and while it is unfinished `work/`: completions that were sampled, and under
its fingerprint whatever the stage goes on from. So a process may be killed at any moment: the same command again does
what is left, and gives the same result.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.card import Card
from align.core.errors import AlignError, RunError
from align.core.manifest import Manifest, versions
from align.core.model_card import write_model_card
from align.core.stage import Result, Tools
from align.core.store import ModelRef, Table
from align.core.writer import DatasetWriter, disk_errors, replace_file
from align.fingerprints import fingerprints, step_seed
from align.folders import cache_folder, check_ours, check_space, disk_is_full, is_step, mark_ours, prepare, sync
from align.inputs import Engines, engine_origins, open_inputs, origins
from align.lock import locked
from align.plan import Recipe, Step
from align.progress import Lines, Silent, duration

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Planned:
    """A step with its fingerprint, and its manifest if it is done.

    Attributes:
        stale: it is finished, but was made by another recipe.
    """

    step: Step
    folder: Path
    fingerprint: str
    done: Manifest | None
    stale: bool


def plan(recipe: Recipe) -> list[Planned]:
    """What there is to do, in order.

    Raises:
        AlignError: an input or a model from outside can't be read.
    """
    planned = []
    for name, fingerprint in fingerprints(recipe).items():
        folder = recipe.folder(name)
        manifest = Manifest.read(folder)
        made = folder / ("data" if recipe.steps[name].stage.gives.is_dataset else "model")
        done = manifest if manifest and manifest.fingerprint == fingerprint and made.is_dir() else None
        planned.append(Planned(recipe.steps[name], folder, fingerprint, done, manifest is not None and done is None))
    return planned


def run(recipe: Recipe, overwrite: bool = False, rank: int = 0) -> list[Manifest]:
    """Runs what is not done, and gives the manifests of all steps, in order.

    Args:
        recipe: what to run.
        overwrite: for a stage run alone: whether another result in its folder may be replaced.
        rank: which of several processes this is; only the first one writes and prints.

    Raises:
        AlignError: a step can't go on; the message names it.
    """
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked(recipe.out))
            check_space(recipe.out)
        steps = plan(recipe)
        _check_folders(recipe, steps, overwrite)
        if rank == 0:
            _write_run_file(recipe, steps)
        manifests: list[Manifest] = []
        for number, planned in enumerate(steps, start=1):
            if planned.done is not None:
                manifest = planned.done
                outcome = "done before"
                if rank == 0:
                    shutil.rmtree(planned.folder / "work", ignore_errors=True)  # a kill came after the manifest
            else:
                _print(rank, f"[{number}/{len(steps)}] {planned.step.name}")
                manifest = _run_step(recipe, planned, rank)
                outcome = f"{_amount(manifest)} in {duration(manifest.seconds)}{_asked(manifest)}"
            _print(rank, f"[{number}/{len(steps)}] {planned.step.name}: {outcome}")
            manifests.append(manifest)
        return manifests


def _run_step(recipe: Recipe, planned: Planned, rank: int) -> Manifest:
    step, folder = planned.step, planned.folder
    progress = Lines(step.name) if rank == 0 else Silent()
    began, cpu = time.monotonic(), _cpu_seconds()
    try:
        with disk_errors(folder):
            mark_ours(folder)
            work = prepare(folder, planned.fingerprint) if rank == 0 else folder / "work" / planned.fingerprint
            work.mkdir(parents=True, exist_ok=True)
        inputs = open_inputs(recipe, step, folder / "work" / (f"sources-{rank}" if rank else "sources"))
        if step.processes > 1:
            from align.launch import launch

            seed = step_seed(recipe.seed, step.name)
            result = launch(step, inputs, seed, work, folder)
            rows, counts = None, {}
        else:
            with Engines(recipe, step, folder / "work", rank) as engines:
                progress.watch(engines.asked)
                seed = step_seed(recipe.seed, step.name)
                tools = Tools(seed, engines, progress, work, folder, step.speed, cache_folder())
                try:
                    result = step.stage.run(step.config, inputs, tools)
                    rows = _write_rows(recipe, step, inputs, result, folder) if rank == 0 else None
                finally:  # what a failed or interrupted attempt has cost is told too
                    counts = engines.counts()
                    for line in engines.usage_lines():
                        progress.say(line)
        if rank == 0 and not step.stage.gives.is_dataset:
            ModelRef.open(folder / "model", step.stage.gives, name=step.name)
            card = _card(recipe, step, inputs, result)
            write_model_card(folder, card, step.stage.gives, origins(recipe, step, inputs), versions())
            sync(folder / "model")
    except AlignError as problem:
        raise type(problem)(f"{step.name}: {problem}") from problem
    except Exception as problem:
        if disk_is_full(problem, folder):
            raise RunError(
                f"{step.name}: {folder}: no space left on the disk; nothing half-written counts as done: free some "
                "space and run the same command again to go on"
            ) from problem
        raise
    finally:
        progress.close()
    more: dict[str, Any] = {
        "gives": step.stage.gives.value,
        "rows_in": {name: len(table) for name, table in inputs.items() if isinstance(table, Table)},
    }
    manifest = Manifest(
        step=step.name,
        stage=step.stage.name,
        version=step.stage.version,
        fingerprint=planned.fingerprint,
        settings=step.config.model_dump(mode="json"),
        seed=step_seed(recipe.seed, step.name),
        inputs=origins(recipe, step, inputs),
        engines=engine_origins(recipe, step, counts),
        rows=rows,
        seconds=round(time.monotonic() - began, 3),
        cpu_seconds=round(_cpu_seconds() - cpu, 3),
        summary=result.summary,
        versions=versions(),
        **more,
    )
    if rank == 0:
        manifest.write(folder)
        shutil.rmtree(folder / "work", ignore_errors=True)
    return manifest


def _write_rows(recipe: Recipe, step: Step, inputs: Mapping[str, Any], result: Result, folder: Path) -> int | None:
    if result.rows is None:
        return None
    card = _card(recipe, step, inputs, result)
    with DatasetWriter(folder, step.stage.gives, card, lenient=result.lenient) as writer:
        for row in result.rows:
            writer.write(row)
    return writer.count


def _card(recipe: Recipe, step: Step, inputs: Mapping[str, Any], result: Result) -> Card:
    tables = [table for table in inputs.values() if isinstance(table, Table)]
    return Card(
        title=f"{recipe.name}: {step.name}",
        stage=f"{step.stage.name} {step.stage.version}",
        made_by=f"align {versions().get('align-toolkit', '')}".strip(),
        settings=step.config.model_dump(mode="json"),
        inputs={name: getattr(each, "name", "") for name, each in inputs.items()},
        licenses={name: licence for table in tables for name, licence in table.licenses.items()}
        | dict(result.summary.get("licenses", {})),
        summary=result.summary,
    )


def _check_folders(recipe: Recipe, steps: list[Planned], overwrite: bool) -> None:
    """Refuses to write over what is not this recipe's, before anything runs."""
    if not recipe.alone and is_step(recipe.out):
        raise RunError(f"{recipe.out}: holds the result of a stage run alone; give the run another folder with out=")
    for planned in steps:
        if planned.done is None:
            check_ours(planned.folder, "the result" if recipe.alone else "the run")
        if recipe.alone and planned.stale and not overwrite:
            raise RunError(
                f"{planned.folder}: holds the result of other settings or inputs; give another out=, or add "
                "overwrite=true to have it replaced"
            )


def _write_run_file(recipe: Recipe, steps: list[Planned]) -> None:
    """What the run is made of, for `align status` and the report."""
    if recipe.alone:
        return
    about = {
        "name": recipe.name,
        "seed": recipe.seed,
        "steps": [
            {"step": p.step.name, "stage": p.step.stage.name, "gives": p.step.stage.gives.value,
             "needs": p.step.needs_steps(), "fingerprint": p.fingerprint}
            for p in steps
        ],
        "recipe": recipe.text,
    }  # fmt: skip
    replace_file(recipe.out / RUN_FILE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _amount(manifest: Manifest) -> str:
    return "model" if manifest.rows is None else f"{manifest.rows} rows"


def _asked(manifest: Manifest) -> str:
    """What came from the cache, and what failed, where there was any: the last line of progress may be seconds old."""
    engines = [origin.model_dump() for origin in manifest.engines.values()]
    counts = {key: sum(each.get(key, 0) for each in engines) for key in ("sampled", "reused", "failed", "damaged")}
    parts = [f"{counts['sampled']} completions sampled, {counts['reused']} from the cache"] if counts["reused"] else []
    parts += [f"{counts['failed']} failed to be sampled"] if counts["failed"] else []
    parts += [f"{counts['damaged']} in the cache damaged"] if counts["damaged"] else []
    return "; " + ", ".join(parts) if parts else ""


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _print(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)
