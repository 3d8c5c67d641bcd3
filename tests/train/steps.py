"""Runs a training stage as the pipeline would, on rows and models made by the test."""

from __future__ import annotations

import json
import os
import signal
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
