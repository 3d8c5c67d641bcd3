"""Curves in the trackers that a person already uses, by name: trackio, wandb, tensorboard, mlflow.

Each gets every line of `metrics.jsonl`. A step is one run there: the project is the run's folder, the run's name the
step's with a piece of its fingerprint, so that a killed step goes on in the same run, and other settings make another.
Where a tracker keeps what it is told, and as whom, is its own affair (its login and environment variables), but for
tensorboard, whose files lie in `tensorboard/` in the step's folder.

The curves are safe without them: a tracker that fails in mid-training is told of and asked no more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol, cast

from align.core.errors import RunError
from align.core.stage import Tools

TrackerName = Literal["trackio", "wandb", "tensorboard", "mlflow"]

FOLDER = "tensorboard"

Line = Mapping[str, float]


class Tracker(Protocol):
    """One tracker's open run."""

    def log(self, line: Line) -> None:
        """One line of the curves, with its `step`."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def missing(name: str) -> str | None:
    """What to install where a tracker's package isn't there."""
    if find_spec(name) is not None:
        return None
    return f"the package {name} isn't installed; pip install 'align-toolkit[{name}]', or leave it out of report_to"


def open_trackers(tools: Tools, settings: Mapping[str, Any], lines: Sequence[Line] = ()) -> Trackers:
    """Opens the trackers that `report_to` names; none where it names none. Only the first process calls it.

    Args:
        tools: of the step; the names are in its speed settings.
        settings: of the stage; kept with the run.
        lines: of the curves so far, where a killed step goes on; told to a tracker that doesn't know the run yet.

    Raises:
        RunError: a package isn't installed, or a tracker can't be opened.
    """
    opened: dict[str, Tracker] = {}
    for name in tools.speed.get("report_to") or ():
        if remedy := missing(name):
            raise RunError(f"report_to: {name}: {remedy}")
        try:
            opened[name] = _OPENED_BY[name](tools, settings, lines)
        except Exception as problem:  # each has errors of its own
            raise RunError(
                f"report_to: {name}: can't be opened: {problem}; mend its setup (login, address), or leave it out"
            ) from problem
    return Trackers(opened, tools)


class Trackers:
    """Those of one step together."""

    def __init__(self, opened: dict[str, Tracker], tools: Tools) -> None:
        self._opened, self._tools = opened, tools

    def log(self, line: Line) -> None:
        """One line, to each."""
        self._each(lambda tracker: tracker.log(line))

    def close(self) -> None:
        """The training is over."""
        self._each(lambda tracker: tracker.close())
        self._opened.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._opened.items()):
            try:
                call(tracker)
            except Exception as problem:  # a training goes on without its tracker
                del self._opened[name]
                self._tools.progress.say(f"warning: {name} failed and is told nothing more: {problem}")


def _names(tools: Tools) -> tuple[str, str]:
    """Project and run: the run's folder, and the step with a piece of its fingerprint."""
    return tools.out.resolve().parent.name, f"{tools.out.name}-{tools.work.name[:8]}"


def _figures(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step"}


class _Tensorboard:
    """Its files are made anew from the lines so far: what a killed attempt told too much is gone."""

    def __init__(self, tools: Tools, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = tools.out / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        self.writer: Any = SummaryWriter(str(folder))
        told = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self.writer.add_text("settings", told, 0)
        for line in lines:
            self.log(line)

    def log(self, line: Line) -> None:
        for name, value in _figures(line).items():
            self.writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Steps are a figure of their own there, so that a step told twice is no step back, which it would drop."""

    def __init__(self, tools: Tools, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        wandb: Any = import_module("wandb")
        project, run = _names(tools)
        self.run = wandb.init(project=project, name=run, id=run, resume="allow", config=dict(settings))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for line in () if self.run.resumed else lines:
            self.log(line)

    def log(self, line: Line) -> None:
        self.run.log(dict(line))

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, tools: Tools, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        trackio: Any = import_module("trackio")
        project, run = _names(tools)
        known: list[str] = []
        with suppress(ValueError):  # there is no such project yet
            known = [each.name for each in trackio.Api().runs(project)]
        self.run = trackio.init(project=project, name=run, resume="allow", config=dict(settings), embed=False)
        for line in () if run in known else lines:
            self.log(line)

    def log(self, line: Line) -> None:
        self.run.log(_figures(line), step=int(line["step"]))

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    """The run is found again by its name."""

    def __init__(self, tools: Tools, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        project, run = _names(tools)
        mlflow: Any = import_module("mlflow")
        self.client = mlflow.MlflowClient()
        experiment = self.client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(project)
        found = self.client.search_runs([number], f"attributes.run_name = '{run}'", max_results=1)
        self.run: str = found[0].info.run_id if found else self.client.create_run(number, run_name=run).info.run_id
        self.client.update_run(self.run, status="RUNNING")
        if not found:
            for name, value in settings.items():
                self.client.log_param(self.run, name, str(value)[:500])
            for line in lines:
                self.log(line)

    def log(self, line: Line) -> None:
        for name, value in _figures(line).items():
            self.client.log_metric(self.run, name, value, step=int(line["step"]))

    def close(self) -> None:
        self.client.set_terminated(self.run)


_OPENED_BY: Mapping[str, Callable[[Tools, Mapping[str, Any], Sequence[Line]], Tracker]] = cast(
    "Any", {"trackio": _Trackio, "wandb": _Wandb, "tensorboard": _Tensorboard, "mlflow": _Mlflow}
)
