"""From a recipe's engine settings to an engine; the heavy imports happen here, at first use."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.core.engines.base import Engine


class EngineSettings(BaseModel):
    """One entry under `engines:` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    speed_only: ClassVar[frozenset[str]] = frozenset({"device", "slots"})
    """Settings that change how fast but not what is sampled; they stay out of fingerprints."""

    kind: Literal["transformers"] = Field("transformers", description="What runs the model.")
    model: str = Field(description="A model folder, a Hub id, or step:NAME for the model that a step makes.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision; auto is float32 on a CPU and the checkpoint's own on a GPU."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto is a CUDA device where there is one.")
    slots: int = Field(256, ge=1, description="Most samples in flight; fewer need less memory.")
    max_context: int | None = Field(
        None, ge=2, description="Most tokens of prompt and completion together; the model's own limit by default."
    )


def build_engine(settings: EngineSettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    """Loads the model that the settings name.

    Args:
        settings: `model` must be a folder or a Hub id by now (the pipeline replaces step:NAME).
        generator: the name written with every row.
        fingerprint: of the model's content; computed from its weights where none is given.

    Raises:
        ModelError: there is no such model, or it is no causal language model.
        EngineError: the device isn't there.
    """
    from align.core.engines.transformers_engine import TransformersEngine

    return TransformersEngine(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        slots=settings.slots,
        generator=generator,
        fingerprint=fingerprint,
        max_context=settings.max_context,
    )
