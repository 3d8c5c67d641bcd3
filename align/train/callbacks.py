"""What a training leaves beside its weights: the curves, and checkpoints from which a killed run goes on."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.core.errors import RunError
from align.core.stage import Tools
from align.core.trackers import Trackers, open_trackers

DONE = "done"
"""A file that is written into a checkpoint last: a folder without it was cut off by a kill."""


class Curves(TrainerCallback):  # type: ignore[misc]
    """Writes one line a step to metrics.jsonl and to the trackers, and counts the steps on the screen.

    After a kill, lines beyond the checkpoint are taken back.
    """

    def __init__(self, tools: Tools, trainer: Any) -> None:
        self.tools, self.trainer = tools, trainer
        self.path = tools.out / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        self.trackers: Trackers | None = None
        self.since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the lines that are there already."""
        if not state.is_world_process_zero:
            return
        behind = self.trainer.step
        before = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = self.trainer.lines_behind([json.loads(line) for line in before if line.endswith("}")])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.trackers = open_trackers(self.tools, self.trainer.settings.model_dump(), self.lines)
        if self.trainer.announces:
            self.tools.progress.start(state.max_steps, "steps")
            self.tools.progress.advance(behind)
        self.since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"the loss is {logs['loss']} at step {self.trainer.step}; the training has blown up; "
                "lower learning_rate, or set max_grad_norm"
            )
        figures = self.trainer.figures
        line = self.trainer.place() | {name: float(value) for name, value in logs.items() if name != "epoch"} | figures
        if self.trainer.router.last is not None:
            line["router_loss"] = self.trainer.router.last
        now = time.monotonic()
        if tokens := figures.get("tokens"):
            line["tokens_per_second"] = round(tokens / (now - self.since), 1)
        self.since = now
        self.write(line)
        shown = {"learning_rate": logs["learning_rate"]} if "learning_rate" in logs else {}
        self.tools.progress.advance(loss=round(logs["loss"], 4), **shown, **({"tokens": int(tokens)} if tokens else {}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No line comes any more."""
        if self.trackers is not None:
            self.trackers.close()

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; every one goes through here."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.trackers is not None:
            self.trackers.log(line)


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint that is whole, and removes those before it.

    In this order, so that at every moment one whole checkpoint is marked: transformers' own rotation removes the old
    one before anybody knows that the new one is whole.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """This process's files of the checkpoint are there when this is called."""
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / DONE).touch()
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            if folder.name != f"checkpoint-{state.global_step}":
                (folder / DONE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


class MergesTheRest(TrainerCallback):  # type: ignore[misc]
    """Merges the steps after the last merge, where the Online Merging Optimizer merges every few steps."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the last step, before its line, its look and its checkpoint: they are of the weights that are written."""
        if state.global_step >= state.max_steps:
            self.optimizer.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the training was stopped before."""
        self.optimizer.finish()


def whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, if there is one; those that were not are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if (path / DONE).exists()]
    for path in found:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[-1]) if whole else None
