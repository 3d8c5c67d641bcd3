"""What a recipe comes to: steps with checked settings, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.core.stage import Stage, StageConfig


@dataclass(frozen=True)
class Source:
    """Where an input comes from: a step of the recipe, or something on disk or on the Hub.

    Attributes:
        step: the step that gives it; None for anything else.
        spec: for anything else, what the user wrote: text, or a mapping with `path` and how to read it.
        at: where the recipe says so, for messages.
    """

    step: str | None
    spec: Any = None
    at: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class EngineSpec:
    """An engine as asked for: the kind of backend, the model, the settings of that backend."""

    kind: str
    model: Source
    settings: BaseModel


@dataclass(frozen=True)
class Step:
    """One stage with its settings, inputs and engines.

    Attributes:
        verb: the stage as the recipe names it.
        speed: how fast but not what: see `align.settings.TrainSpeed`; no part of the fingerprint.
        processes: more than 1 trains in so many processes.
    """

    name: str
    verb: str
    stage: Stage
    config: StageConfig
    inputs: Mapping[str, tuple[Source, ...]]
    engines: Mapping[str, EngineSpec]
    speed: Mapping[str, Any]
    processes: int = 1

    def sources(self) -> Iterator[Source]:
        """All that this step takes, the models of its engines too."""
        for sources in self.inputs.values():
            yield from sources
        for engine in self.engines.values():
            yield engine.model

    def needs_steps(self) -> list[str]:
        """The steps that must be done before this one."""
        return list(dict.fromkeys(source.step for source in self.sources() if source.step is not None))


@dataclass(frozen=True)
class Recipe:
    """A recipe in which no fault can be seen before it runs.

    Attributes:
        steps: in the order in which they run.
        out: the run's folder; for a stage run alone, the step's own folder.
        alone: whether it is one stage run from the command line.
        text: what the user wrote, overrides applied.
    """

    name: str
    seed: int
    out: Path
    steps: Mapping[str, Step]
    text: Mapping[str, Any]
    alone: bool = False

    def folder(self, step: str) -> Path:
        """Where a step's results lie."""
        return self.out if self.alone else self.out / step
