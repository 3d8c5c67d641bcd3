"""From a recipe's engine settings to an engine; the heavy imports happen here, at first use."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from align.core.engines.base import Engine
from align.core.engines.openai_settings import OpenAISettings


class RaySettings(BaseModel):
    """Workers of a Ray cluster that sample in this process's place; where a sample is made changes nothing in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    address: str = Field(
        "auto", description="host:port of a running cluster's head; auto is the one that this machine belongs to."
    )
    workers: int = Field(1, ge=1, description="How many workers; each loads the model.")
    cpus: float = Field(1.0, ge=0, description="CPU cores that Ray reserves for one worker.")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray gives to one worker; with 0 it sees none.")
    block: int = Field(
        64, ge=1, description="Prompts that a worker is handed at a time; it has one block more waiting."
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="Seconds until at least one worker must have loaded its model."
    )

    @field_validator("address")
    @classmethod
    def _names_a_head(cls, address: str) -> str:
        if not re.fullmatch(r"auto|[\w.-]+:\d+|\[[0-9a-f:.]+\]:\d+", address):
            raise ValueError(f"found {address!r}, expected auto or host:port, such as 10.0.0.5:6379")
        return address


class EngineSettings(BaseModel):
    """One entry under `engines:` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    speed_only: ClassVar[frozenset[str]] = frozenset({"device", "slots", "ray"})
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
    ray: RaySettings | None = Field(None, description="Workers of a Ray cluster that sample; this process by default.")


class VllmSettings(BaseModel):
    """The same for vLLM in this process."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    speed_only: ClassVar[frozenset[str]] = frozenset(
        {"tensor_parallel", "gpu_memory", "max_in_flight", "enforce_eager", "sleep_mode", "ray"}
    )
    """See `EngineSettings`."""

    kind: Literal["vllm"] = Field(description="What runs the model.")
    model: str = Field(description="A model folder, a Hub id, or step:NAME for the model that a step makes.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision; auto is vLLM's choice: the checkpoint's own, but half for a float32 one."
    )
    quantization: str | None = Field(
        None, description="How vLLM quantises the weights, for example fp8; by default as the checkpoint says."
    )
    max_context: int | None = Field(
        None, ge=2, description="Most tokens of prompt and completion together; the model's own limit by default."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of this machine that share the model.")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM may take.")
    max_in_flight: int = Field(2048, ge=1, description="Most samples that vLLM is given at once; the rest wait here.")
    enforce_eager: bool = Field(False, description="Leave out CUDA graphs: a quicker start, a slower run.")
    sleep_mode: bool = Field(
        False, description="Give the GPU's memory back while the policy trains; for online-dpo's sampler."
    )
    ray: RaySettings | None = Field(None, description="Workers of a Ray cluster that sample; this process by default.")


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


def build_vllm(settings: VllmSettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    """Starts vLLM with the model that the settings name; arguments as for `build_engine`.

    Raises:
        ModelError: there is no such model.
        EngineError: vLLM isn't installed, or can't start.
    """
    from align.core.engines.vllm_engine import VllmEngine

    return VllmEngine(
        settings.model,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_context=settings.max_context,
        tensor_parallel=settings.tensor_parallel,
        gpu_memory=settings.gpu_memory,
        max_in_flight=settings.max_in_flight,
        enforce_eager=settings.enforce_eager,
        sleep_mode=settings.sleep_mode,
        generator=generator,
        fingerprint=fingerprint,
    )


def build_openai(settings: OpenAISettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    """The engine for a server; nothing is asked of it yet.

    Args:
        settings: where it is and how to ask.
        generator: the name written with every row; the model's name by default.
        fingerprint: not used, since a server's weights can't be seen.

    Raises:
        EngineError: the client isn't installed, or the key that was named isn't there.
    """
    from align.core.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(settings, generator=generator)
