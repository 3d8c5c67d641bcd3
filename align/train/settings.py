"""Settings that the training stages share, and what `tools.speed` means to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.core.errors import RecipeError
from align.core.records import Kind
from align.core.stage import Need, StageConfig

LOSS_OVER = "pairs of the global batch, all processes"
"""What the preference losses are averaged over, for the manifest: no split of a global batch changes it."""


class TrainSettings(StageConfig):
    """Names as in transformers and TRL, flat."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    epochs: float = Field(gt=0, description="passes over the data")
    global_batch_size: int = Field(
        128, ge=1, description="rows of one optimizer step, over all processes; accumulation follows from it"
    )
    max_length: int = Field(ge=8, description="longest row in tokens, prompt and completion together")
    too_long: Literal["drop", "error"] = Field(
        "drop", description="what becomes of a longer row: dropped and counted, or the run stops; never cut"
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the learning rate falls")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="where it ends, as a share of learning_rate")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps in which it rises from 0")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices only")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient to this norm; 0 is off")
    lora_rank: int = Field(0, ge=0, description="rank of the LoRA adapters; 0 trains all weights")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA's scale: an adapter counts alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters")
    lora_targets: str | list[str] = Field("all-linear", description="module names that get adapters, or 'all-linear'")
    save_merged: bool = Field(True, description="write full weights; false writes the LoRA adapters alone")
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: the frozen base in 4 bits under LoRA adapters (QLoRA); needs CUDA and bitsandbytes"
    )
    router_loss_weight: float | None = Field(
        None, ge=0, description="of a mixture-of-experts' load-balancing loss; the model's own where not given, 0: off"
    )
    merging: Literal["none", "ondare", "onties"] = Field(
        "none",
        description="each step of AdamW is merged with what SFT has changed (Online Merging Optimizer); needs base",
    )
    merging_alpha: float = Field(
        1e-7, ge=0, lt=1, description="weight of what SFT has changed; 0: none, the step is thinned alone"
    )
    merging_keep: float = Field(0.01, gt=0, le=1, description="share of the coordinates that a step keeps")
    merging_as_in: Literal["code", "paper"] = Field(
        "code", description="whose variant, where the paper's equations and its authors' code differ"
    )
    merging_every: int = Field(1, ge=1, description="merge what AdamW's steps have gathered, every so many of them")
    merging_warn_drift: float = Field(
        0.02, gt=0, description="warn when all merges together add more than this share of what SFT has changed"
    )
    rope_scaling: Literal["none", "yarn"] = Field(
        "none", description="yarn: stretch rotary positions beyond the length that the model was trained on"
    )
    rope_factor: float | None = Field(
        None, gt=1, description="by how much yarn stretches; max_length over the trained length where not given"
    )

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Self:
        if not self.lora_rank and not self.save_merged:
            raise ValueError("save_merged: false writes LoRA adapters, and there are none; set lora_rank, or leave it")
        if not self.lora_rank and self.lora_dropout:
            raise ValueError("lora_dropout has no effect without LoRA adapters; set lora_rank, or leave it")
        if not self.lora_rank and self.quantization != "none":
            raise ValueError(
                f"quantization: {self.quantization} freezes the weights in 4 bits, so without LoRA adapters nothing "
                "would be trained; set lora_rank, such as 16"
            )
        if self.rope_factor is not None and self.rope_scaling == "none":
            raise ValueError("rope_factor has no effect without rope_scaling; set rope_scaling to yarn, or leave it")
        if self.rope_scaling != "none" and not self.save_merged:
            raise ValueError(
                "save_merged: false keeps adapters alone, and the stretched positions stand in the model's config; "
                "set save_merged to true"
            )
        return self

    @model_validator(mode="after")
    def _merging_fits(self) -> Self:
        if self.merging == "none":
            deaf = [
                name
                for name, field in TrainSettings.model_fields.items()
                if name.startswith("merging_") and getattr(self, name) != field.default
            ]
            if deaf:
                raise ValueError(
                    f"{deaf[0]} has no effect without merging; set merging to ondare or onties, or leave it"
                )
            return self
        usual = TrainSettings.model_fields["merging_warn_drift"].default
        if not self.merging_alpha and self.merging_warn_drift != usual:
            raise ValueError("merging_warn_drift has no effect with merging_alpha 0, which adds nothing; leave it")
        if not self.merging_alpha and self.merging == "onties" and self.merging_as_in == "paper":
            raise ValueError(
                "merging_as_in: paper has no effect with merging_alpha 0: OnTIES's variants differ in signs alone, and "
                "there is nothing to conflict with; leave it"
            )
        if self.quantization != "none":
            raise ValueError(
                f"merging: {self.merging} moves the weights themselves, and quantization: {self.quantization} keeps "
                "them in 4 bits; set merging or quantization to none"
            )
        if self.lora_rank and self.merging_alpha:
            raise ValueError(
                f"merging: {self.merging} steers by a difference of weights (SFT - base), and with lora_rank adapters "
                "are trained, in which that difference has no place: A and B may be scaled against each other at will; "
                "set lora_rank to 0, or merging_alpha to 0 to thin the adapters' steps alone (an SFT that was made by "
                "LoRA is no hindrance: give its adapter folder as sft)"
            )
        return self


MERGING_NEEDS = {
    "base": Need(Kind.MODEL, "for merging: the model that SFT started from", optional=True),
    "sft": Need(Kind.MODEL, "for merging: what SFT made of it; the model to start from where not given", optional=True),
}
"""Inputs of the stages that can merge."""

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
]  # fmt: skip
"""TRL's names; each is a function of align/train/losses.py."""

_SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"}


class DPOSettings(TrainSettings):
    """What offline and online DPO share."""

    beta: float = Field(0.1, gt=0, description="how far the policy may go from the reference: smaller is farther")
    losses: list[Loss] = Field(["sigmoid"], min_length=1, description="TRL's names; sigmoid is DPO itself")
    loss_weights: list[float] | None = Field(None, description="one a loss; 1.0 each where not given")
    nll_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the chosen's negative log-likelihood per token (RPO): holds its probability up",
    )
    length_normalised: bool = Field(
        False, description="log-probabilities are means over a completion's tokens, in every loss; wants a larger beta"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs believed to be the wrong way round (cDPO, robust, exo_pair, aot)"
    )
    discopop_tau: float = Field(0.05, gt=0, description="how sharply discopop goes from one of its parts to the other")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.losses)} losses")
        if self.loss_weights is not None and min(self.loss_weights) <= 0:
            raise ValueError(f"loss_weights has {min(self.loss_weights):g}; weights are above 0: leave that loss out")
        if len(set(self.losses)) < len(self.losses):
            raise ValueError("losses names a loss twice; name it once and give it a weight in loss_weights")
        if self.lora_dropout:
            raise ValueError("lora_dropout has no effect here: DPO is computed without dropout; set it to 0")
        deaf = sorted(set(self.losses) - _SMOOTHED - {"sft"})
        if self.label_smoothing and (deaf or self.losses == ["sft"]):
            raise ValueError(
                f"label_smoothing has no effect on the loss {', '.join(deaf) or 'sft'}; use sigmoid, sigmoid_norm, "
                "robust, exo_pair or aot, or set it to 0"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("the loss exo_pair needs label_smoothing above 0; its paper takes 0.001")
        return self


@dataclass(frozen=True, slots=True)
class Speed:
    """What changes how fast a training stage is, and not what it makes (save by rounding).

    Attributes:
        device: cpu, cuda, or auto: cuda where there is one.
        precision: fp32, bf16 (weights stay fp32, the computation is bf16), or auto: bf16 on a GPU, fp32 on a CPU.
        micro_batch_size: rows at once in one process; 0: the largest divisor up to 32 on a CPU and 8 on a GPU.
        gradient_checkpointing: less memory for 20-29% more time.
        save_every: optimizer steps between checkpoints.
    """

    device: str = "auto"
    precision: str = "auto"
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 500

    @staticmethod
    def of(speed: Mapping[str, Any]) -> Speed:
        """From a recipe's words, the machine's answer put in place of "auto". Other stages' words are left alone."""
        import torch

        known = {name: speed[name] for name in Speed.__slots__ if speed.get(name) is not None}
        chosen = Speed(**known)
        device = chosen.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise RecipeError(
                f"device: {device}; a training stage takes auto, cpu or cuda, and of several GPUs the first that it "
                "sees (choose another with CUDA_VISIBLE_DEVICES; use several with processes)"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError(f"device: {device}, but there is no CUDA device here; use cpu or auto")
        precision = chosen.precision
        if precision == "auto":
            precision = "fp32" if device == "cpu" else "bf16"
        if precision not in ("fp32", "bf16"):
            raise RecipeError(f"precision: {precision}; known: auto, fp32, bf16")
        return Speed(device, precision, chosen.micro_batch_size, chosen.gradient_checkpointing, chosen.save_every)

    def split(self, global_batch_size: int, processes: int) -> tuple[int, int]:
        """Rows at once and accumulation steps of one process, whose product over all processes is the global batch.

        Raises:
            RecipeError: they don't divide.
        """
        share, rest = divmod(global_batch_size, processes)
        if rest or not share:
            raise RecipeError(
                f"global_batch_size: {global_batch_size} rows can't be shared by {processes} processes; "
                f"use a multiple of {processes}"
            )
        most = 32 if self.device == "cpu" else 8
        micro = self.micro_batch_size or max(n for n in range(1, min(share, most) + 1) if share % n == 0)
        micro = min(micro, share)
        if share % micro:
            raise RecipeError(
                f"micro_batch_size: {micro} doesn't divide the {share} rows that one process has of "
                f"global_batch_size {global_batch_size}; use one of "
                f"{', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}"
            )
        return micro, share // micro
