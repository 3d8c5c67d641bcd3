"""Curves in trackers: the right run, every line, resumed, and never the end of a training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from align.core import trackers
from align.core.errors import RunError
from align.core.stage import Tools
from align.core.trackers import missing, open_trackers

LINES = [{"step": step, "loss": 1.0 / step, "epoch": step / 10} for step in range(1, 7)]


class Said:
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, total: int | None, unit: str) -> None: ...

    def advance(self, by: int = 1, **figures: float | int | str) -> None: ...

    def say(self, line: str) -> None:
        self.said.append(line)


def tools(folder: Path, *names: str) -> Tools:
    step = folder / "demo" / "sft"
    step.mkdir(parents=True, exist_ok=True)
    work = step / "work" / "abcdef0123456789"
    return Tools(seed=0, engines={}, progress=Said(), work=work, out=step, speed={"report_to": list(names)})


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of that name that keeps what it is told, by run."""
    module = ModuleType("wandb")
    module.runs = {}  # type: ignore[attr-defined]

    def init(project: str, name: str, id: str, resume: str, config: dict[str, Any]) -> Any:
        resumed = id in module.runs
        lines = module.runs.setdefault(id, [])
        about = {"project": project, "config": config}
        return SimpleNamespace(
            resumed=resumed, about=about, log=lines.append, define_metric=lambda *_, **__: None, finish=lambda: None
        )

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object() if name == "wandb" else None)
    return module


def test_a_run_is_the_step_with_a_piece_of_its_fingerprint_and_gets_every_line(tmp_path: Path, wandb: Any) -> None:
    opened = open_trackers(tools(tmp_path, "wandb"), {"learning_rate": 1e-3})
    for line in LINES:
        opened.log(line)
    opened.close()
    assert wandb.runs == {"sft-abcdef01": LINES}


def test_a_killed_step_goes_on_in_the_same_run_and_a_tracker_named_later_gets_what_was(
    tmp_path: Path, wandb: Any
) -> None:
    """Killed after 4 lines, the checkpoint at 3: the run has the fourth twice. One that knows nothing gets all."""
    opened = open_trackers(tools(tmp_path, "wandb"), {})
    for line in LINES[:4]:
        opened.log(line)
    again = open_trackers(tools(tmp_path, "wandb"), {}, LINES[:3])
    for line in LINES[3:]:
        again.log(line)
    assert wandb.runs["sft-abcdef01"] == [*LINES[:4], *LINES[3:]]
    wandb.runs.clear()
    open_trackers(tools(tmp_path, "wandb"), {}, LINES[:3])
    assert wandb.runs["sft-abcdef01"] == LINES[:3]


def test_a_missing_package_is_told_with_what_to_install(tmp_path: Path, wandb: Any) -> None:
    with pytest.raises(RunError, match=r"report_to: mlflow: the package mlflow isn't installed; pip install 'align-"):
        open_trackers(tools(tmp_path, "wandb", "mlflow"), {})
    assert missing("wandb") is None


def test_a_tracker_that_cannot_be_opened_is_told_before_the_training(tmp_path: Path, wandb: Any) -> None:
    def init(**_: Any) -> None:
        raise OSError("no login")

    wandb.init = init
    with pytest.raises(RunError, match=r"report_to: wandb: can't be opened: no login; mend its setup"):
        open_trackers(tools(tmp_path, "wandb"), {})


def test_a_tracker_that_fails_in_mid_training_is_told_of_once_and_asked_no_more(tmp_path: Path, wandb: Any) -> None:
    given = tools(tmp_path, "wandb")
    opened = open_trackers(given, {})
    opened.log(LINES[0])

    class Gone(list[Any]):
        def append(self, _: Any) -> None:
            raise ConnectionError("server is gone")

    opened._opened["wandb"].run.log = Gone().append  # type: ignore[attr-defined]
    for line in LINES[1:]:
        opened.log(line)
    opened.close()
    assert isinstance(given.progress, Said)
    assert given.progress.said == ["warning: wandb failed and is told nothing more: server is gone"]


def test_without_names_there_is_nothing_to_do(tmp_path: Path) -> None:
    opened = open_trackers(tools(tmp_path), {})
    opened.log(LINES[0])
    opened.close()
    assert list((tmp_path / "demo" / "sft").iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard isn't installed")
def test_tensorboards_files_hold_each_step_once_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = tools(tmp_path, "tensorboard")
    opened = open_trackers(given, {"learning_rate": 1e-3})
    for line in LINES[:4]:
        opened.log(line)
    opened.close()
    again = open_trackers(given, {"learning_rate": 1e-3}, LINES[:3])
    for line in LINES[3:]:
        again.log(line)
    again.close()
    events = EventAccumulator(str(given.out / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("loss")] == [
        (line["step"], round(line["loss"], 6)) for line in LINES
    ]
