"""What a reward model's training needs to go on after a kill, and the best weights so far."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core.stage import Tools
from align.core.trackers import Trackers, open_trackers


class State:
    """What a killed run needs to go on, and the best weights so far."""

    def __init__(self, tools: Tools, model: Any, optimizer: Any, settings: Mapping[str, Any] | None = None) -> None:
        self.tools, self.settings = tools, settings or {}
        self.trackers = Trackers({}, tools)
        self.folder = tools.work
        self.metrics = tools.out / "metrics.jsonl"
        self.model, self.optimizer = model, optimizer
        self.step = self.stale = 0
        self.history: list[dict[str, float]] = []
        self.lines: list[dict[str, float]] = []

    def log(self, accelerator: Any, **figures: float) -> None:
        """One line of the curves."""
        self.lines.append(figures)
        if accelerator.is_main_process:
            with self.metrics.open("a", encoding="utf-8") as out:
                out.write(json.dumps(figures) + "\n")
            self.trackers.log(figures)

    def note(self, score: float, accelerator: Any) -> None:
        """One evaluation: keeps the weights if none were better, and a checkpoint to go on from."""
        score = mean_over_processes(score, accelerator)  # all go on, or all stop
        best = max((past["best_of_n"] for past in self.history), default=-math.inf)
        self.stale = 0 if score > best else self.stale + 1
        self.history.append({"step": self.step, "best_of_n": score})
        self.log(accelerator, step=self.step, best_of_n=score)
        if accelerator.is_main_process and score >= best:  # of equals the one that has learned longer
            save(self._trained(), self.folder / "best.pt")
        self.save(accelerator)

    def save(self, accelerator: Any) -> None:
        """A checkpoint to go on from."""
        if accelerator.is_main_process:
            content = {
                "weights": self._trained(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "stale": self.stale, "history": self.history, "lines": self.lines,
            }  # fmt: skip
            save(content, self.folder / "checkpoint.pt")
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Any) -> bool:
        """Whether there was a checkpoint to go on from; the curves are cut back to it."""
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            if accelerator.is_main_process:
                self.metrics.unlink(missing_ok=True)
                self.trackers = open_trackers(self.tools, self.settings)
            return False
        found = torch.load(file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(found["weights"], strict=False)
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.stale = found["step"], found["stale"]
        self.history, self.lines = found["history"], found["lines"]
        if accelerator.is_main_process:
            self.metrics.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
            self.trackers = open_trackers(self.tools, self.settings, self.lines)
        return True

    def restore_best(self) -> None:
        """Puts the weights of the best evaluation into the model."""
        weights = torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(weights, strict=False)

    def _trained(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.named_parameters() if value.requires_grad}


def sum_over_processes(values: Tensor, accelerator: Any) -> list[float]:
    """Numbers that all processes agree on."""
    found: list[float] = accelerator.reduce(values, "sum").tolist()
    return found


def mean_over_processes(value: float, accelerator: Any) -> float:
    """One number that all processes agree on."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))


def save(content: Mapping[str, Any], file: Path) -> None:
    """Whole or not at all."""
    torch.save(dict(content), file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
