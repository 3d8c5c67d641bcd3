"""LoRA adapters (arXiv:2106.09685): which are put on, what they lie on, and adapters that were trained upon others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core.errors import ModelError
from align.core.store import ModelRef
from align.train.settings import TrainSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "target_parameters": None,
}
"""What must be so in a configuration for its adapters to be the product of two matrices a layer, and no more."""


def adapter_of(model: ModelRef) -> Any:
    """The configuration of the adapters in a model's folder; None where it holds full weights, or is a Hub id."""
    if not (Path(model.path) / CONFIG).is_file():
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(model.path)


def lora_of(settings: TrainSettings, base: ModelRef) -> Any:
    """The configuration of new adapters, or None where all weights are trained."""
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    targets = settings.lora_targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=base.revision,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=[targets] if isinstance(targets, str) and targets != "all-linear" else targets,
    )


def check_stackable(policy: ModelRef, settings: TrainSettings) -> None:
    """Refuses, before anything is trained, what could not be saved as adapters at the end.

    Raises:
        ModelError: adapters are to be saved alone, and those of the policy are of a kind that none are laid upon.
    """
    below = adapter_of(policy)
    if below is None or settings.save_merged:
        return
    odd = [name for name, plain in _PLAIN.items() if (getattr(below, name, None) or plain) != plain]
    if type(below).__name__ != "LoraConfig" or odd:
        what = ", ".join(odd) or type(below).__name__
        raise ModelError(
            f"{policy.name}: its adapters are no plain LoRA ({what}), so new ones can't be saved on top of them; use "
            "save_merged=true"
        )


def lineage(policy: ModelRef, settings: TrainSettings) -> dict[str, Any]:
    """What was trained upon what, for the manifest and the model's card.

    `base` is the policy that the stage was given. Where that was adapters, `base_weights` are the full weights below
    them. `trained` says what was trained, `saved` what lies in the model's folder.
    """
    below = adapter_of(policy)
    weights = _name(str(below.base_model_name_or_path)) if below is not None else policy.name
    trained, saved = "all weights", "full weights"
    if settings.lora_rank:
        frozen = " on weights in 4 bits (nf4)" if settings.quantization == "nf4" else ""
        trained = f"LoRA adapters of rank {settings.lora_rank}{frozen}"
        if not settings.save_merged:
            both = f" (those of {policy.name} and the new ones as one)" if below is not None else ""
            saved = f"adapters of {weights}{both}"
    found = {"base": policy.name, "trained": trained, "saved": saved}
    return found if below is None else found | {"base_weights": weights}


def save_adapters(model: Any, folder: Path, policy: ModelRef) -> None:
    """Writes a peft model's adapters alone, so that their base is found from any folder.

    Where the policy was adapters itself, the new ones were trained upon their merged weights; both are written as one
    adapter of the same base, which any library loads: the sum of two products is one product of matrices laid side by
    side, B₁A₁ + B₂A₂ = [B₁ B₂] [A₁; A₂].
    """
    model.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    below = adapter_of(policy)
    if below is not None:
        lower = json.loads((Path(policy.path) / CONFIG).read_text())
        stacked = _stacked(_scaled(Path(policy.path), lower), _scaled(folder, config))
        rank = lower["r"] + config["r"]
        names = sorted({name.rsplit(".", 3)[-3] for name in stacked})
        config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": names}
        config |= {"base_model_name_or_path": lower["base_model_name_or_path"], "revision": lower.get("revision")}
        _write(stacked, folder / WEIGHTS)
    base = config["base_model_name_or_path"]
    if base and Path(base).is_dir():
        config["base_model_name_or_path"] = str(Path(base).resolve())
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _scaled(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The matrices of an adapter by name, its scale multiplied into the B ones."""
    from safetensors.torch import load_file

    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    found = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else torch.load(folder / "adapter_model.bin")
    return {name: tensor.float() * (scale if ".lora_B." in name else 1) for name, tensor in found.items()}


def _stacked(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two adapters as one; a layer that only one of them has gets zeros in the other's place."""
    ranks = [next(len(t) for name, t in side.items() if ".lora_A." in name) for side in (first, second)]
    stacked = {}
    for name in sorted(first.keys() | second.keys()):
        along = 0 if ".lora_A." in name else 1  # A (r, in), B (out, r)
        parts = []
        for side, rank in zip((first, second), ranks, strict=True):
            shape = list((first | second)[name].shape)
            shape[along] = rank
            parts.append(side[name] if name in side else torch.zeros(shape))
        stacked[name] = torch.cat(parts, along).contiguous()
    return stacked


def _write(weights: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, file, {"format": "pt"})


def _name(base: str) -> str:
    """How people know a model by its folder or id."""
    path = Path(base)
    return base if not path.is_dir() else path.parent.name if path.name == "model" else path.name
