"""Runs a training stage as the pipeline would, on rows and models made by the test."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.core.records import Kind
from align.core.stage import Stage, Tools
from align.core.store import ModelRef, Table


class Silent:
    """A progress reporter that keeps what was said; and may kill the process, as a power cut would, at a count."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.said: list[str] = []
        self.count, self.kill_at = 0, kill_at

    def start(self, total: int | None, unit: str) -> None:
        pass

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        self.count += by
        if self.kill_at is not None and self.count >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, line: str) -> None:
        self.said.append(line)


def table(path: Path, rows: list[dict[str, Any]]) -> Table:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return Table([path], path.stem, "0")


def policy(path: str | Path) -> ModelRef:
    return ModelRef(str(path), Kind.MODEL, Path(path).name, "0")


def run(
    stage: Stage,
    folder: Path,
    inputs: Mapping[str, Table | ModelRef],
    settings: dict[str, Any],
    speed: dict[str, Any] | None = None,
    seed: int = 3,
    kill_at: int | None = None,
    progress: Silent | None = None,
) -> tuple[dict[str, Any], Silent]:
    """Gives the summary, and what was said."""
    progress = progress or Silent(kill_at)
    speed = {"device": "cpu"} | (speed or {})
    tools = Tools(seed=seed, engines={}, progress=progress, work=folder / "work", out=folder, speed=speed)
    tools.work.mkdir(parents=True, exist_ok=True)
    result = stage.run(stage.config(**settings), inputs, tools)
    return result.summary, progress


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def script(
    verb: str,
    folder: Path,
    inputs: Mapping[str, Table | ModelRef],
    settings: dict[str, Any],
    speed: dict[str, Any],
    kill_at: int | None = None,
) -> Path:
    """A Python file that runs the stage in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call.pickle").write_bytes(pickle.dumps((folder, inputs, settings, speed, 3, kill_at)))
    path = folder / "call.py"
    path.write_text(
        "import pickle, pathlib\nfrom align.stages import load\nfrom tests.train import steps\n"
        f"call = pickle.loads(pathlib.Path({str(folder / 'call.pickle')!r}).read_bytes())\n"
        f"steps.run(load({verb!r}), *call)\n"
    )
    return path


def run_and_kill(
    verb: str,
    folder: Path,
    inputs: Mapping[str, Table | ModelRef],
    settings: dict[str, Any],
    speed: dict[str, Any],
    at_step: int,
) -> int:
    """Runs the stage in another process, killed with SIGKILL at its `at_step`-th step; gives its exit status."""
    path = script(verb, folder, inputs, settings, speed, kill_at=at_step)
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, str(path)], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True
    ).returncode
