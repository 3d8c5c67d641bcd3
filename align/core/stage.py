"""What a stage is: a plain function from datasets and models to a dataset or a model, its contract beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from align.core.engines.base import Engine
from align.core.records import Kind, Row
from align.core.store import ModelRef, Table


class StageConfig(BaseModel):
    """Settings of a stage: unknown keys refused, frozen, every field with `Field(description=...)` (the help text).

    Strict: a float for an integer, or a string for a number, is an error and not rounded. Numbers are finite where a
    field doesn't say otherwise (`allow_inf_nan`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Need:
    """One input of a stage.

    Attributes:
        kind: what it must be. A tuple where several kinds will do; None where any dataset will (`verify`).
        help: one line for `--help`.
        optional: whether the stage runs without it.
        columns: columns that the stage reads beyond those of the kind.
        several: whether a list of models may be given; they are under `name`, `name-2`, `name-3`, … (see `numbered`).
    """

    kind: Kind | tuple[Kind, ...] | None
    help: str
    optional: bool = False
    columns: tuple[str, ...] = ()
    several: bool = False


@dataclass(frozen=True, slots=True)
class Asks:
    """What a stage asks of one engine at most, for `align check`; a second try of an unreadable answer apart.

    Attributes:
        samples: completions of each prompt that comes in.
        max_tokens: tokens of a completion.
        prompts: most prompts that it takes, where it doesn't take all.
        reads: the role whose completions it is asked about, one by one, where it is.
    """

    samples: int
    max_tokens: int
    prompts: int | None = None
    reads: str | None = None


class Progress(Protocol):
    """How a stage tells a person where it is; never part of a result."""

    def start(self, total: int | None, unit: str) -> None:
        """Begins a count (again) towards `total` things; None where the total is unknown."""
        ...

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """Counts on; `figures` stand beside the count (loss=0.31, passed=120)."""
        ...

    def say(self, line: str) -> None:
        """Prints one line that stays."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a stage works with besides its inputs.

    Attributes:
        seed: this step's own seed (from the recipe's seed and the step's name).
        engines: engine by role, each behind the step's completion cache; built at first use. Where a role was given a
            list, they are under `role`, `role-2`, `role-3`, ...
        progress: see `Progress`.
        work: a folder that survives a kill of this step and is removed when it is done (checkpoints).
        out: the step's own folder; a model goes to `out / "model"`, curves to `out / "metrics.jsonl"`.
        speed: settings that change how fast but not what: device, precision, micro batch size, ...
        cache: a folder that all runs share, for what is dear to compute and known by its content; may vanish any time.
            None: nothing is kept beyond the step.
        rehearse: a training stage prepares everything, tells what it would do, and returns before its first step.
    """

    seed: int
    engines: Mapping[str, Engine]
    progress: Progress
    work: Path
    out: Path
    speed: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    rehearse: bool = False

    def all_of(self, role: str) -> list[Engine]:
        """The engines of a role that may have several (`Stage.several`), in the order in which they were given."""
        return [self.engines[key] for key in self.engines if role_of(key) == role]


def numbered(role: str, number: int) -> str:
    """The key of a role's engine: `sampler` for the first (number 1), `sampler-2` for the second."""
    return role if number == 1 else f"{role}-{number}"


def role_of(key: str) -> str:
    """The role of an engine's key; see `numbered`."""
    name, _, number = key.rpartition("-")
    return name if name and number.isdigit() else key


@dataclass(frozen=True)
class Result:
    """What a stage gives: rows (streamed; the pipeline writes them as they come), or a model in `tools.out / "model"`.

    Attributes:
        rows: for a stage that gives a dataset. Each row holds the kind's columns; more columns may follow.
        summary: figures for the manifest, the report and the final table; may still be filled while rows stream.
            A stage that evaluates puts its table under "scores" (see align/evaluate).
        lenient: the rows hold columns of outside whose types may change from row to row; such a column becomes text.
    """

    rows: Iterable[Row] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage and its contract.

    Attributes:
        name: the verb on the command line.
        summary: one line for `align --help`.
        config: the settings' class.
        needs: inputs by name, in the order of the help.
        gives: the kind of its result.
        gives_as: the input whose kind it gives, for a stage that takes several kinds and gives back what came in;
            `gives` is then what it gives where nothing better is known.
        run: `run(config, inputs, tools)`; inputs hold a `Table` for datasets and a `ModelRef` for models.
            It never reads the environment or the command line, and writes only below `tools.out` and `tools.work`.
        engines: the roles it samples from, with a line of help each.
        optional_engines: those of the roles that it runs without; the others are required.
        several: those of the roles that may also be a list of engines; see `Tools.all_of`.
        reads: settings that name files or datasets; their content is part of the step's fingerprint.
        made_later: those of `reads` whose files a person may make while the recipe is under way; the stage itself says
            what to do where one is missing.
        adds: columns that it adds to those that come in or that the kind has.
        version: raised when the same settings would now give other rows.
        served: roles whose engine, while the stage trains, takes the weights of the model input of that name: it must
            hold that very model.
        asks: what it asks of each role, from its settings; None where it samples nothing or can't tell.
        trains: whether it may run in several processes (accelerate); every process calls `run`. Such a stage heeds
            `tools.rehearse`, or `align doctor` would train.
    """

    name: str
    summary: str
    config: type[StageConfig]
    needs: Mapping[str, Need]
    gives: Kind
    run: Callable[[Any, Mapping[str, Table | ModelRef], Tools], Result]
    engines: Mapping[str, str] = field(default_factory=dict)
    optional_engines: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    made_later: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    version: int = 1
    asks: Callable[[Any], Mapping[str, Asks]] | None = None
    gives_as: str = ""
    trains: bool = False
    served: Mapping[str, str] = field(default_factory=dict)
