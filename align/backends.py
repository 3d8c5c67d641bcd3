"""Which kinds of engine there are: one literal table. Checking a recipe loads none of them.

A recipe may name a backend of your own as `package.module:NAME`, a `Backend`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel

from align.core.engines.base import Engine
from align.core.engines.build import EngineSettings, VllmSettings, build_engine, build_openai, build_vllm
from align.core.engines.openai_settings import OpenAISettings
from align.core.errors import RecipeError
from align.stages import nearest


@dataclass(frozen=True)
class Backend:
    """A kind of engine.

    Attributes:
        settings: what a recipe may set, `kind` and `model` among it; its `speed_only` names what stays out of
            fingerprints.
        build: makes the engine; called as `build(settings, generator=..., fingerprint=...)` at first use, with the
            model's folder or Hub id in the settings.
        local: whether the model is one that this machine reads (a folder, a Hub id) and no name on a server.
    """

    settings: type[BaseModel]
    build: Callable[..., Engine]
    local: bool = True

    def engine(self, settings: BaseModel, *, generator: str, fingerprint: str | None) -> Engine:
        """Makes the engine in this process, or on the workers of a Ray cluster where its settings have `ray`."""
        make = partial(self.build, generator=generator, fingerprint=fingerprint)
        cluster = getattr(settings, "ray", None)
        if cluster is None:
            return make(settings)
        from align.core.engines.ray_engine import RayEngine

        return RayEngine(make, settings.model_copy(update={"ray": None}), cluster, generator, fingerprint)

    def fixed(self, settings: BaseModel) -> dict[str, Any]:
        """The settings that decide what is sampled; the model counts by its content elsewhere."""
        left_out = {"model", *getattr(self.settings, "speed_only", ())}
        return settings.model_dump(mode="json", exclude=left_out)


BACKENDS: dict[str, Backend] = {
    "transformers": Backend(EngineSettings, build_engine),
    "vllm": Backend(VllmSettings, build_vllm),
    "openai": Backend(OpenAISettings, build_openai, local=False),
}


def backend(kind: str) -> Backend:
    """The backend of a kind, or of `package.module:NAME`.

    Raises:
        RecipeError: there is no such backend.
    """
    if kind in BACKENDS:
        return BACKENDS[kind]
    module, colon, name = kind.partition(":")
    if not colon:
        raise RecipeError(f"'{kind}': unknown kind of engine; {nearest(kind, list(BACKENDS))}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise RecipeError(f"'{kind}': {problem}; Python must find the package") from problem
    if not isinstance(found, Backend):
        raise RecipeError(f"'{kind}': it is a {type(found).__name__}, not a Backend (align.backends)")
    return found
