"""The fingerprint of each step: what its result depends on, known before it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from align.backends import backend
from align.core.fingerprint import fingerprint_of
from align.core.records import Kind
from align.core.sources import source_fingerprint
from align.outside import content, open_model
from align.plan import Recipe, Source, Step
from align.settings import wants_model


def step_seed(seed: int, step: str) -> int:
    """A step's own seed, the same on every machine; below 2^31, as numpy and torch want it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "big") >> 1


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Every step's fingerprint.

    It covers the stage's version, the settings, the seed, and the content of inputs, models and files that settings
    name. A step's output counts by that step's fingerprint, so a change flows down to all that follows from it.

    Raises:
        AlignError: an input or a model from outside can't be read.
    """
    known: dict[str, str] = {}
    for name, step in recipe.steps.items():
        known[name] = fingerprint_of(
            {
                "stage": step.stage.name,
                "version": step.stage.version,
                "settings": step.config.model_dump(mode="json", exclude=set(step.stage.reads)),
                "reads": {key: content(getattr(step.config, key)) for key in step.stage.reads},
                "inputs": {key: _input(step, key, sources, known) for key, sources in step.inputs.items()},
                "engines": {role: _engine(step, role, known) for role in step.engines},
                "seed": step_seed(recipe.seed, name),
            }
        )
    return known


def _input(step: Step, name: str, sources: tuple[Source, ...], known: Mapping[str, str]) -> list[Any]:
    need = step.stage.needs[name]
    if wants_model(need):
        return [known[s.step] if s.step else open_model(s.spec, need.kind).fingerprint for s in sources]
    return [[known[s.step], s.spec] if s.step else source_fingerprint(s.spec) for s in sources]


def _engine(step: Step, role: str, known: Mapping[str, str]) -> dict[str, Any]:
    engine = step.engines[role]
    chosen = backend(engine.kind)
    if engine.model.step:
        model = known[engine.model.step]
    else:
        model = open_model(engine.model.spec, Kind.MODEL).fingerprint if chosen.local else engine.model.spec
    return {"model": model, **chosen.fixed(engine.settings)}
