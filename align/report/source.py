"""What a run left on disk, read for the report: its steps in order, with their manifests, curves and some rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from align.core.errors import RunError
from align.core.manifest import Manifest
from align.core.records import Row
from align.core.store import Table

RUN_FILE = "run.json"
SCANNED = 400
"""Rows looked through for those that are shown."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: in the recipe.
        stage: the stage's name.
        needs: names of the steps that it takes something from.
        samples_from: those of them whose model it samples from.
        state: done; or to do: not run yet, or its settings have changed since.
        folder: where it is.
        manifest: None until it is done.
    """

    name: str
    stage: str
    needs: tuple[str, ...]
    samples_from: tuple[str, ...]
    state: Literal["done", "to do"]
    folder: Path
    manifest: Manifest | None

    @property
    def is_control(self) -> bool:
        """Whether it stands beside the ladder and not on it: a step named so in the recipe."""
        return "control" in self.name

    @property
    def scores(self) -> Mapping[str, Any]:
        """The table of an evaluation, by mode; empty for other steps."""
        found = self.manifest.summary.get("scores") if self.manifest else None
        return found if isinstance(found, dict) else {}

    def curves(self) -> list[dict[str, float]]:
        """The lines of a training's metrics; a line cut short by a kill is left out."""
        file = self.folder / "metrics.jsonl"
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("step"), int | float):
                lines.append({k: v for k, v in found.items() if isinstance(v, int | float)})
        return lines

    def table(self) -> Table | None:
        """Its rows; None for a model, or where there are none."""
        files = sorted((self.folder / "data").glob("*.parquet"))
        return Table(files, self.name, self.manifest.fingerprint if self.manifest else "") if files else None

    def some_rows(self, count: int) -> list[Row]:
        """A few rows, of as many families and verdicts as there are among the first."""
        table = self.table()
        if table is None:
            return []
        by_kind: dict[tuple[str, str], list[Row]] = {}
        for row in islice(table.rows(), SCANNED):
            by_kind.setdefault((str(row.get("family")), str(row.get("verdict"))), []).append(row)
        return list(islice(_in_turn(list(by_kind.values())), count))


@dataclass(frozen=True)
class Run:
    """A run: what it is called and its steps, in the order in which they run."""

    name: str
    seed: int | None
    steps: list[Step] = field(default_factory=list)

    @property
    def evaluations(self) -> list[Step]:
        """The steps that have scores of a policy's answers."""
        return [step for step in self.steps if {"greedy", "sampled"} & step.scores.keys()]


def read_run(folder: Path) -> Run:
    """Reads the folder of a run, or that of a single step.

    Raises:
        RunError: it is neither.
        DataError: a manifest can't be read.
    """
    about_file = folder / RUN_FILE
    if about_file.exists():
        about = json.loads(about_file.read_text(encoding="utf-8"))
        steps = [
            _step(folder / s["step"], s["step"], s["stage"], tuple(s["needs"]), s["fingerprint"])
            for s in about["steps"]
        ]
        return Run(str(about.get("name") or folder.name), about.get("seed"), steps)
    manifests = [(path.parent, Manifest.read(path.parent)) for path in sorted(folder.glob("*/manifest.json"))]
    if (folder / "manifest.json").exists():
        manifests = [(folder, Manifest.read(folder))]
    found = [
        _step(place, one.step or place.name, one.stage, _needs(one), one.fingerprint)
        for place, one in manifests
        if one is not None
    ]
    if not found:
        raise RunError(f"{folder}: is no run: it has no {RUN_FILE} and no step; give the folder that `align run` named")
    return Run(folder.name, None, _in_order(found))


def _step(folder: Path, name: str, stage: str, needs: tuple[str, ...], fingerprint: str) -> Step:
    manifest = Manifest.read(folder)
    if manifest is not None and manifest.fingerprint != fingerprint:
        manifest = None
    engines = manifest.engines.values() if manifest else ()
    sampled = tuple(origin.step for origin in engines if origin.step)
    return Step(name, stage, needs, sampled, "done" if manifest else "to do", folder, manifest)


def _needs(manifest: Manifest) -> tuple[str, ...]:
    origins = [*manifest.inputs.values(), *manifest.engines.values()]
    return tuple(dict.fromkeys(origin.step for origin in origins if origin.step))


def _in_order(steps: list[Step]) -> list[Step]:
    """Each after what it needs; a step that isn't there is not waited for."""
    names, done, order = {step.name for step in steps}, set[str](), list[Step]()
    while len(order) < len(steps):
        ready = [s for s in steps if s.name not in done and all(n in done or n not in names for n in s.needs)]
        for step in ready or [s for s in steps if s.name not in done][:1]:
            done.add(step.name)
            order.append(step)
    return order


def _in_turn(lists: list[list[Row]]) -> Iterator[Row]:
    for place in range(max(map(len, lists), default=0)):
        for one in lists:
            if place < len(one):
                yield one[place]
