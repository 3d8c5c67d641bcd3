"""Reading the steps and engines of a recipe; what is wrong is noted, and reading goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.backends import Backend, backend
from align.core.errors import RecipeError
from align.core.stage import Stage, numbered
from align.core.store import SHIPPED
from align.outside import is_there
from align.plan import EngineSpec, Source, Step
from align.settings import checked, found, mapping, scalar, speed_of, stage_keys, wants_model
from align.stages import TABLE, load, nearest
from align.yamlfile import Key, Problems

STEP_KEYS = ("stage", "in", "with", "engines", "speed", "processes")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".arrow", ".txt", ".yaml", ".yml")


class Reader:
    """Reads one recipe's steps and engines.

    Attributes:
        used: the names of the engines that a step uses.
    """

    def __init__(
        self, steps: Mapping[str, Any], engines: Mapping[str, Any], problems: Problems, folder: Path | None = None
    ) -> None:
        """`folder` is the recipe's own: a path that isn't in the current folder is looked for there."""
        self.folder = folder
        self.steps = steps
        self.engines = engines
        self.problems = problems
        self.used: set[str] = set()

    def step(self, name: str, raw: Any) -> Step | None:
        """One step; None where its stage isn't known."""
        at: Key = ("steps", name)
        if not isinstance(raw, dict):
            self.problems.add(at, f"a mapping with `stage` was expected, found {found(raw)}")
            return None
        verb = raw.get("stage")
        if not isinstance(verb, str):
            self.problems.add((*at, "stage"), f"missing; one of {', '.join(TABLE)}")
            return None
        try:
            stage = load(verb)
        except RecipeError as problem:
            self.problems.add((*at, "stage"), str(problem))
            return None
        for key in raw:
            if key not in STEP_KEYS:
                place = stage_keys(stage).get(key)
                self.problems.add(
                    (*at, key), f"unknown key; {f'write it under `{place}`' if place else nearest(key, STEP_KEYS)}"
                )
        processes = scalar(raw, (*at, "processes"), int, 1, self.problems)
        if processes < 1 or (processes > 1 and not stage.trains):
            what = "1 or more was expected" if processes < 1 else f"{stage.name} runs in one process only"
            self.problems.add((*at, "processes"), f"{what}, found {processes}")
        inner = {key: mapping(raw, (*at, key), self.problems) for key in ("in", "with", "engines", "speed")}
        if processes > 1 and inner["engines"]:
            left_out = ", ".join(f"engines.{role}" for role in inner["engines"])
            what = f"{processes} processes train, and an engine serves one; set it to 1, or leave out {left_out}"
            self.problems.add((*at, "processes"), what)
        for key in stage.reads:
            if key in inner["with"]:
                inner["with"] = {**inner["with"], key: self._located(inner["with"][key])}
        speed = checked(speed_of(stage), inner["speed"], (*at, "speed"), self.problems)
        return Step(
            name,
            verb,
            stage,
            config=checked(stage.config, inner["with"], (*at, "with"), self.problems),
            inputs=self._inputs(stage, inner["in"], (*at, "in")),
            engines=self._engines(stage, inner["engines"], (*at, "engines")),
            speed=speed.model_dump(exclude_unset=True),
            processes=processes,
        )

    def _inputs(self, stage: Stage, raw: Mapping[str, Any], at: Key) -> dict[str, tuple[Source, ...]]:
        for key in raw:
            if key not in stage.needs:
                place = stage_keys(stage).get(key)
                hint = f"it belongs under `{place}`" if place else nearest(key, list(stage.needs))
                self.problems.add((*at, key), f"{stage.name} has no such input; {hint}")
        inputs: dict[str, tuple[Source, ...]] = {}
        for name, need in stage.needs.items():
            value = raw.get(name)
            model = wants_model(need)
            if value is None:
                if not need.optional:
                    self.problems.add((*at, name), f"missing: {need.help}")
            elif isinstance(value, list) and ((model and not need.several) or not value):
                self.problems.add((*at, name), "one model was expected, found a list" if value else "the list is empty")
            elif isinstance(value, list):
                sources = [self._source(item, (*at, name, number), model) for number, item in enumerate(value)]
                inputs[name] = tuple(source for source in sources if source)
            elif model and isinstance(value, str) and value in self.engines and value not in self.steps:
                if source := self._model_of_engine(value, (*at, name)):
                    inputs[name] = (source,)
            elif source := self._source(value, (*at, name), model):
                inputs[name] = (source,)
        return inputs

    def _model_of_engine(self, name: str, at: Key) -> Source | None:
        """The model that an engine of the recipe samples from, so that a recipe names its model in one place."""
        self.used.add(name)
        engine = self.engine(self.engines[name], ("engines", name))
        if engine and not backend(engine.kind).local:
            self.problems.add(at, f"the engine '{name}' asks a server; a model that this machine can read was expected")
            return None
        return engine.model if engine else None

    def _engines(self, stage: Stage, raw: Mapping[str, Any], at: Key) -> dict[str, EngineSpec]:
        for role in raw:
            if role not in stage.engines:
                known = nearest(role, list(stage.engines)) if stage.engines else "it samples from none"
                self.problems.add((*at, role), f"{stage.name} has no such engine; {known}")
        engines: dict[str, EngineSpec | None] = {}
        for role, help_line in stage.engines.items():
            value = raw.get(role)
            if value is None:
                if role not in stage.optional_engines:
                    self.problems.add((*at, role), f"missing: {help_line}")
                continue
            if not isinstance(value, list):
                engines[role] = self._named(value, (*at, role))
            elif role not in stage.several or not value:
                what = "the list is empty" if role in stage.several else "one engine was expected, found a list"
                self.problems.add((*at, role), what)
            else:
                for number, item in enumerate(value):
                    engines[numbered(role, number + 1)] = self._named(item, (*at, role, number))
        return {key: engine for key, engine in engines.items() if engine}

    def _named(self, value: Any, at: Key) -> EngineSpec | None:
        """An engine as a step names it: one of the recipe's, or one of its own."""
        if isinstance(value, str) and value in self.engines:
            self.used.add(value)
            return self.engine(self.engines[value], ("engines", value))
        return self.engine(value, at)

    def engine(self, raw: Any, at: Key) -> EngineSpec | None:
        """An engine: a model, or a mapping with `kind`, `model` and the settings of that kind."""
        raw = {"model": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, dict) or not isinstance(raw.get("model"), str):
            self.problems.add(at, f"a model, or a mapping with `model`, was expected, found {found(raw)}")
            return None
        kind = str(raw.get("kind", "transformers"))
        try:
            chosen = backend(kind)
        except RecipeError as problem:
            self.problems.add((*at, "kind"), str(problem))
            return None
        settings = checked(chosen.settings, raw, at, self.problems)
        model = self._engine_model(raw["model"], at, chosen)
        return EngineSpec(kind, model, settings) if model else None

    def _engine_model(self, text: str, at: Key, chosen: Backend) -> Source | None:
        if not chosen.local and not text.startswith("step:"):
            return Source(None, text, at)
        if "/" in text or ":" in text or text in SHIPPED or Path(text).expanduser().exists():
            return self._source(text, at, model=True)
        if text in self.steps:
            self.problems.add(at, f"'{text}' is a step and no engine; write step:{text} for the model that it makes")
        else:
            names = [*self.engines, *(f"step:{step}" for step in self.steps), *SHIPPED]
            self.problems.add(at, f"'{text}': no engine or model folder of that name; {nearest(text, names)}")
        return None

    def _source(self, value: Any, at: Key, model: bool) -> Source | None:
        """One input: a step, or something on disk or on the Hub."""
        if isinstance(value, dict) and not model:
            step, path = value.get("step"), value.get("path")
            if isinstance(step, str) == isinstance(path, str):
                self.problems.add(at, f"a mapping with either `step` or `path` was expected, found {found(value)}")
                return None
            if isinstance(step, str):
                rest = {key: option for key, option in value.items() if key != "step"}
                return Source(step, rest or None, at) if self._is_step(step, at) else None
            return Source(None, self._located(value), at) if self._is_outside(str(path), at, model) else None
        if not isinstance(value, str) or not value:
            self.problems.add(at, f"the name of a step, a path or a Hub id was expected, found {found(value)}")
            return None
        if value in self.steps or value.startswith("step:"):
            step = value.removeprefix("step:")
            return Source(step, None, at) if self._is_step(step, at) else None
        return Source(None, self._located(value), at) if self._is_outside(value, at, model) else None

    def _located(self, value: Any) -> Any:
        """A path, or what holds paths, with those that lie beside the recipe written out."""
        if isinstance(value, list):
            return [self._located(item) for item in value]
        if isinstance(value, dict):
            return {key: self._located(item) if key in ("path", "source") else item for key, item in value.items()}
        if not isinstance(value, str) or not value or self.folder is None or is_there(value):
            return value
        beside = str(self.folder / value)
        return beside if is_there(beside) else value

    def _is_step(self, name: str, at: Key) -> bool:
        if name not in self.steps:
            self.problems.add(at, f"there is no step '{name}'; {nearest(name, list(self.steps))}")
        return name in self.steps

    def _is_outside(self, text: str, at: Key, model: bool) -> bool:
        """Whether a text can be a path or a Hub id, as far as can be told without opening it."""
        path = Path(self._located(text)).expanduser()
        if path.exists() or (text in SHIPPED if model else any(sign in text for sign in "*?[")):
            return True
        if _HUB_ID.fullmatch(text) and not path.parent.is_dir() and path.suffix not in _FILE_ENDINGS:
            return True
        names = [*self.steps, *(SHIPPED if model else [])]
        if "/" in text or path.suffix in _FILE_ENDINGS or not names:
            self.problems.add(at, f"'{text}': there is no such {'model folder' if model else 'file or folder'}")
        else:
            what = "model folder" if model else "file"
            hint = f"{nearest(text, names)} (a Hub id has the form owner/name)"
            self.problems.add(at, f"'{text}': no step and no {what} of that name; {hint}")
        return False
