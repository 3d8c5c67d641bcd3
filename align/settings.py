"""Checking what a user wrote against a settings class, with every problem told where it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from align.core.errors import RecipeError
from align.core.stage import Need, Stage, StageConfig
from align.core.trackers import TrackerName
from align.stages import nearest
from align.yamlfile import Key, Problems, split_argument

Config = TypeVar("Config", bound=BaseModel)
Scalar = TypeVar("Scalar", bound=str | int)


class Speed(StageConfig):
    """How fast but not what: no part of a fingerprint, so changing it re-runs nothing."""

    device: str = Field("auto", description="cpu, cuda, or cuda:1 for an engine; auto is a GPU where there is one")


class TrainSpeed(Speed):
    """The same for a stage that trains."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the arithmetic in training; auto is bf16 on a GPU and fp32 on a CPU"
    )
    micro_batch_size: int = Field(0, ge=0, description="rows at once in one process; 0 chooses it")
    gradient_checkpointing: bool = Field(False, description="less memory for 20 to 30% more time")
    save_every: int = Field(
        500, ge=1, description="optimizer steps between checkpoints, from which a killed step goes on"
    )
    report_to: list[str] = Field(
        [], description=f"trackers that get the curves too: {', '.join(get_args(TrackerName))}"
    )

    @field_validator("report_to")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in get_args(TrackerName):
                raise ValueError(f"there is no tracker '{name}'; {nearest(name, list(get_args(TrackerName)))}")
        return names


def speed_of(stage: Stage) -> type[Speed]:
    """Which of these settings a stage has."""
    return TrainSpeed if stage.trains else Speed


def stage_keys(stage: Stage) -> dict[str, str]:
    """Where each key of a stage run alone belongs in a step: in, engines, with or speed."""
    return {
        **dict.fromkeys(speed_of(stage).model_fields, "speed"),
        **dict.fromkeys(stage.config.model_fields, "with"),
        **dict.fromkeys(stage.engines, "engines"),
        **dict.fromkeys(stage.needs, "in"),
    }


def wants_model(need: Need) -> bool:
    """Whether an input is a model rather than rows."""
    kinds = need.kind if isinstance(need.kind, tuple) else (need.kind,)
    return all(kind is not None and not kind.is_dataset for kind in kinds)


def checked(of: type[Config], raw: Mapping[str, Any], at: Key, problems: Problems) -> Config:
    """Settings of a class from what was written; where that is wrong: problems, and settings that nobody may use."""
    try:
        # Through JSON, where a strict class takes a list for a tuple and text for a path, but no float for an int.
        return of.model_validate_json(json.dumps(raw))
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            # A place within a union names its branch too ("list[str]"), which nobody wrote.
            where = tuple(part for part in error["loc"] if isinstance(part, int) or part.isidentifier())
            problems.add((*at, *where), _told(of, error, where))
        return of.model_construct()


def from_arguments(of: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Settings of a command that is no stage, from its `key=value` arguments.

    Raises:
        RecipeError: with every problem that was found.
    """
    problems, raw = Problems(command), dict[str, Any]()
    for argument in arguments:
        try:
            keys, value = split_argument(argument)
        except RecipeError as problem:
            problems.add((), str(problem))
        else:
            raw[".".join(keys)] = value
    settings = checked(of, raw, (), problems)
    problems.stop()
    return settings


def _told(of: type[BaseModel], error: Any, where: Key) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key; {nearest(str(where[-1]), _names_beside(of, where))}"
    if error["type"] == "missing":
        fields = _fields(of, where[:-1])
        described = fields[where[-1]].description if fields and where[-1] in fields else None
        return "missing" + (f": {described}" if described else "")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    wanted = _WANTED.get(error["type"]) or message.replace("Input should be", "").strip()
    return f"expected {wanted}, found {found(error['input'])}"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}


def _fields(of: type[BaseModel], where: Key) -> dict[Any, Any] | None:
    """The fields of the settings class that stands at a place within `of`."""
    current: Any = of
    for part in where:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        current = next(iter(_classes(field.annotation)), None) if field else None
        if current is None:
            return None
    return dict(current.model_fields)


def _names_beside(of: type[BaseModel], where: Key) -> list[str]:
    return list(_fields(of, where[:-1]) or ())


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _classes(inner)]


def mapping(raw: Mapping[str, Any], at: Key, problems: Problems) -> dict[str, Any]:
    """The mapping under the last key of `at`; an empty one where it is missing or something else stands there."""
    value = raw.get(str(at[-1]))
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.add(at, f"a mapping was expected, found {found(value)}")
        return {}
    return value


def scalar(raw: Mapping[str, Any], at: Key, kind: type[Scalar], default: Scalar, problems: Problems) -> Scalar:
    """The text or the whole number under the last key of `at`, or the default."""
    value = raw.get(str(at[-1]))
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "a whole number" if kind is int else "text"
        problems.add(at, f"{expected} was expected, found {found(value)}")
        return default
    return value


def found(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
