"""A training stage, killed at a step: real processes (forks of this one), SIGKILL, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl  # noqa: F401 (once here, and not in every fork)
from safetensors.torch import load_file

from align.core.stage import Stage
from align.core.store import ModelRef, Table
from tests.train import steps


def assert_survives_kills(
    stage: Stage,
    folder: Path,
    inputs: Mapping[str, Table | ModelRef],
    settings: dict[str, Any],
    at: Sequence[int],
    speed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains without a break, and again with a kill at each of some steps; both must give the same weights, bit by bit.

    The losses of all steps must be the same too, each written once, and no step before the last checkpoint may have
    been taken again. Gives the unbroken run's summary.

    Args:
        folder: an empty one.
        at: optimizer steps, rising; the process is killed when the step is done and logged, before its checkpoint.
        speed: a checkpoint is written after every step where it doesn't say otherwise (`save_every`).
    """
    speed = {"save_every": 1} | (speed or {})
    summary, _ = steps.run(stage, folder / "whole", inputs, settings, speed)
    lines = steps.curves(folder / "whole")
    killed = folder / "killed"
    assert list(at) == sorted(set(at)) and at[-1] < summary["steps"], "a kill must come before the last step"
    behind = 0
    for step in (*at, None):
        status = _attempt(stage, killed, inputs, settings, speed, step)
        first = int((folder / "killed.steps").read_text().split()[0])
        assert first == behind, f"it went on from step {first}, its last checkpoint was after step {behind}"
        if step is None:
            assert status == 0, (folder / "killed.out").read_text()[-3000:]
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
                f"it was not killed at step {step}: {(folder / 'killed.out').read_text()[-3000:]}"
            )
            assert not (killed / "model").exists()
            behind = (step - 1) // speed["save_every"] * speed["save_every"]
    files = sorted(path.name for path in (folder / "whole" / "model").glob("*.safetensors"))
    assert files
    for name in files:
        one, other = load_file(folder / "whole" / "model" / name), load_file(killed / "model" / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), f"{key} differs"
    again = steps.curves(killed)
    for figure in ("step", "loss"):
        assert [line.get(figure) for line in again] == [line.get(figure) for line in lines]
    return summary


class _Noting(steps.Silent):
    """Notes each step in a file."""

    def __init__(self, kill_at: int | None, file: Path) -> None:
        super().__init__(kill_at)
        self.file = file

    def start(self, total: int | None, unit: str) -> None:
        if unit == "steps":
            self.count = 0
            self.file.write_text("")

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        with self.file.open("a") as file:
            file.write(f"{by}\n")
        super().advance(by, **figures)


def _attempt(
    stage: Stage,
    folder: Path,
    inputs: Mapping[str, Table | ModelRef],
    settings: dict[str, Any],
    speed: dict[str, Any],
    dies_at: int | None,
) -> int:
    """One run in a process of its own; its wait status."""
    progress = _Noting(dies_at, folder.with_suffix(".steps"))
    return in_fork(lambda: steps.run(stage, folder, inputs, settings, speed, progress=progress), folder)


def in_fork(function: Callable[[], Any], folder: Path) -> int:
    """Calls a function in a fork of this process and gives its wait status; what it prints goes beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        said = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
