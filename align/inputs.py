"""Opening what a step takes: tables, models and engines, from other steps or from outside; and where each came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.backends import backend
from align.core.engines.base import Engine
from align.core.engines.cache import CachedEngine
from align.core.errors import DataError
from align.core.manifest import Origin
from align.core.records import Kind
from align.core.sources import open_source
from align.core.stage import numbered
from align.core.store import ModelRef, Table
from align.fingerprints import step_seed
from align.outside import open_model
from align.plan import EngineSpec, Recipe, Source, Step
from align.progress import Asked
from align.settings import wants_model


class Engines(Mapping[str, Engine]):
    """A step's engines by role, each behind its completion cache; built at first use, closed at the end."""

    def __init__(self, recipe: Recipe, step: Step, work: Path, rank: int = 0) -> None:
        self._recipe = recipe
        self._step = step
        self._work = work
        self._suffix = f"-{rank}" if rank else ""
        self._plain: list[tuple[EngineSpec, Engine]] = []
        self._cached: dict[str, CachedEngine] = {}

    def __getitem__(self, role: str) -> Engine:
        if role not in self._cached:
            engine = self._build(self._step.engines[role])
            self._cached[role] = CachedEngine(engine, self._work / f"completions-{role}{self._suffix}")
        return self._cached[role]

    def __contains__(self, role: object) -> bool:
        return role in self._step.engines

    def __iter__(self) -> Iterator[str]:
        return iter(self._step.engines)

    def __len__(self) -> int:
        return len(self._step.engines)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._cached.values():
            engine.close()

    def counts(self) -> dict[str, dict[str, Any]]:
        """By role: completions sampled in this attempt and reused from an earlier one's cache, failures, tokens of all.

        `damaged` counts records of the cache that the disk had spoilt; they were sampled again. An engine that tells
        what it used (a method `usage` that gives a mapping: requests, tokens, cost) has that beside them; roles that
        share the engine tell it once.
        """
        counts: dict[str, dict[str, Any]] = {}
        told: set[int] = set()
        for role, each in self._cached.items():
            counts[role] = {
                "sampled": each.misses - each.failures,
                "reused": each.hits,
                "failed": each.failures,
                "tokens": each.tokens,
            }
            if each.file.damaged:
                counts[role]["damaged"] = each.file.damaged
            if hasattr(each.engine, "usage") and id(each.engine) not in told:
                told.add(id(each.engine))
                counts[role]["usage"] = dict(each.engine.usage())
        return counts

    def asked(self) -> Asked:
        """What all roles together were asked for so far, for the progress line."""
        engines = self._cached.values()
        return Asked(
            sampled=sum(each.misses - each.failures for each in engines),
            reused=sum(each.hits for each in engines),
            failed=sum(each.failures for each in engines),
            tokens=sum(each.sampled_tokens for each in engines),
        )

    def usage_lines(self) -> list[str]:
        """What each engine used, for a person: `sampler: requests 120, asked again 3 (status 429 3), cost $0.0210`."""
        return [f"{role}: {_usage_line(found['usage'])}" for role, found in self.counts().items() if "usage" in found]

    def _build(self, spec: EngineSpec) -> Engine:
        """Roles that ask for the same engine share it: a model is in memory once."""
        for known, engine in self._plain:
            if (known.kind, known.model.step, known.model.spec, known.settings) == (
                spec.kind, spec.model.step, spec.model.spec, spec.settings,
            ):  # fmt: skip
                return engine
        chosen = backend(spec.kind)
        settings = spec.settings
        device = self._step.speed.get("device")
        if device and "device" in type(settings).model_fields and "device" not in settings.model_fields_set:
            settings = settings.model_copy(update={"device": device})
        name, fingerprint = str(spec.model.spec), None
        if chosen.local:
            model = _model(self._recipe, spec.model, Kind.MODEL)
            settings = settings.model_copy(update={"model": "@".join(filter(None, (model.path, model.revision)))})
            name, fingerprint = model.name, model.fingerprint
        engine = chosen.engine(settings, generator=name, fingerprint=fingerprint)
        self._plain.append((spec, engine))
        return engine


def _usage_line(usage: Mapping[str, Any]) -> str:
    """A mapping of figures as a line; what is zero or empty is left out."""
    parts = []
    for name, value in usage.items():
        if isinstance(value, Mapping) and value:
            inner = ", ".join(f"{key} {count:,}" for key, count in value.items())
            parts.append(f"{name.replace('_', ' ')} {sum(value.values()):,} ({inner})")
        elif value and name.endswith("_usd"):
            parts.append(f"{name.removesuffix('_usd').replace('_', ' ')} ${value:,.4f}")
        elif value:
            parts.append(f"{name.replace('_', ' ')} {value:,}")
    return ", ".join(parts) or "nothing"


def _model(recipe: Recipe, source: Source, kind: Kind | tuple[Kind | None, ...] | None) -> ModelRef:
    if source.step is None:
        return open_model(source.spec, kind)
    return ModelRef.open(recipe.folder(source.step), recipe.steps[source.step].stage.gives, name=source.step)


def open_inputs(recipe: Recipe, step: Step, cache: Path) -> dict[str, Table | ModelRef]:
    """What the stage is handed: models, and rows of the kind that it needs, converted where they come from outside."""
    opened: dict[str, Table | ModelRef] = {}
    for name, sources in step.inputs.items():
        need = step.stage.needs[name]
        if wants_model(need):
            for number, source in enumerate(sources, start=1):
                opened[numbered(name, number)] = _model(recipe, source, need.kind)
            continue
        label = " + ".join(_label(source) for source in sources)
        if all(source.step and source.spec is None for source in sources):
            table = Table.open(*(recipe.folder(str(source.step)) for source in sources), name=label)
        else:
            spec = [_spec(recipe, source) for source in sources]
            seed = step_seed(recipe.seed, f"{step.name}/{name}")
            table = open_source(spec if len(spec) > 1 else spec[0], need.kind, cache, seed=seed, name=label)
        if missing := [column for column in need.columns if column not in table.columns]:
            raise DataError(f"in.{name}: {label} has no column {', '.join(missing)}, which {step.stage.name} reads")
        opened[name] = table
    return opened


def _label(source: Source) -> str:
    if source.step:
        return source.step
    path = source.spec.get("path") if isinstance(source.spec, Mapping) else source.spec
    return Path(str(path)).name or str(path)


def _spec(recipe: Recipe, source: Source) -> Any:
    """A source as `open_source` takes it: a step's folder in the place of its name."""
    if source.step is None:
        return source.spec
    return {"path": str(recipe.folder(source.step)), **(source.spec or {})}


def origins(recipe: Recipe, step: Step, inputs: Mapping[str, Table | ModelRef]) -> dict[str, Origin]:
    """Where each input came from, for the manifest; the parts of a list are told apart as `name[0]`, `name[1]`."""
    found = {}
    for name, sources in step.inputs.items():
        opened = inputs[name]
        for number, source in enumerate(sources):
            opened = inputs.get(numbered(name, number + 1), opened)  # several models, each by itself
            outside = opened.path if isinstance(opened, ModelRef) else _path(source)
            found[name if len(sources) == 1 else f"{name}[{number}]"] = Origin(
                name=_label(source), path=source.step or str(outside), fingerprint=opened.fingerprint, step=source.step
            )
    return found


def engine_origins(recipe: Recipe, step: Step, counts: Mapping[str, Mapping[str, Any]]) -> dict[str, Origin]:
    """The model of each engine, what decided its samples, and how many there were, for the manifest."""
    found = {}
    for role, spec in step.engines.items():
        chosen = backend(spec.kind)
        about: dict[str, Any] = chosen.fixed(spec.settings)
        if chosen.local:
            model = _model(recipe, spec.model, Kind.MODEL)
            about |= {"name": model.name, "path": spec.model.step or model.path, "fingerprint": model.fingerprint}
        else:
            about |= {"name": str(spec.model.spec), "path": str(spec.model.spec)}
        about |= counts.get(role, {})
        found[role] = Origin(step=spec.model.step, **about)
    return found


def _path(source: Source) -> Any:
    return source.spec.get("path") if isinstance(source.spec, Mapping) else source.spec
