"""How much computing a training is, and how long this machine will take for it, before anything was trained.

The FLOP of a step follow from the model's shape (arXiv:2001.08361, section 2.1): 2 for each weight and token forward,
2 for the gradient of what the weight is applied to, 2 for that of the weight itself where it is trained. The speed is
that of a matrix product of the model's own size, measured in a moment. Python's share, which rules at tiny sizes, isn't
foreseen: the result is a guess, and says so.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

REACHED = {"cpu": 0.5, "cuda": 0.45}
"""Share of a bare matrix product's speed that a training comes to."""

MEASURED_S = 0.05
"""How long the product is measured."""

SMALL = 20_000_000
"""Weights used for a token, below which what a step costs is not its matrix products, so that nothing is foretold."""


class Shape(NamedTuple):
    """A model as numbers.

    Attributes:
        parameters: all weights.
        trained: those of them that are trained.
        active: weights that one token is multiplied with, the language-model head apart; of experts the chosen ones.
        head: weights of the language-model head.
        layers: blocks.
        hidden: width.
    """

    parameters: int
    trained: int
    active: int
    head: int
    layers: int
    hidden: int


class Seconds(NamedTuple):
    """How long something will take, and how that is known."""

    seconds: float
    why: str

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} ({self.why})"


def shape_of(model: Any) -> Shape:
    """The shape of a transformers model, with or without adapters of peft."""
    config = model.config.get_text_config()
    experts, chosen = (getattr(config, name, 0) or 0 for name in ("num_experts", "num_experts_per_tok"))
    parameters = trained = active = 0
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, weight in model.named_parameters():
        count = int(weight.numel())
        if type(weight).__name__ == "Params4bit":  # two weights lie in a byte
            count *= 2
        parameters += count
        trained += count if weight.requires_grad else 0
        if weight is embedding or weight is head:
            continue
        active += count * chosen // experts if experts and ".experts." in name else count
    return Shape(
        parameters, trained, active, int(head.numel()) if head is not None else 0,
        int(config.num_hidden_layers), int(config.hidden_size),
    )  # fmt: skip


def training_flops(
    shape: Shape, tokens: int, scored: int, mean_length: float, only_forward: int = 0, recomputed: bool = False
) -> float:
    """FLOP of a whole training.

    Args:
        shape: of the model.
        tokens: that are trained on, all epochs.
        scored: of them those for which the head is computed.
        mean_length: of what a token can look at, in tokens; half of a row's length.
        only_forward: further tokens that are computed without gradients, such as a reference's.
        recomputed: whether the forward pass is computed again on the way back (gradient checkpointing).
    """
    all_trained = shape.trained > shape.parameters / 2
    passes = 3 if all_trained else 2  # forward, gradient of activations, gradient of weights
    if recomputed:
        passes += 1
    attention = 2 * shape.layers * shape.hidden * mean_length  # scores and their sums over values, as if weights
    per_token = 2 * (shape.active + attention)
    return passes * (tokens * per_token + scored * 2 * shape.head) + only_forward * per_token


def training_seconds(flops: float, shape: Shape, device: str, precision: str) -> Seconds | None:
    """How long that takes on a device; None where the model is so small that nobody can tell.

    Args:
        flops: see `training_flops`.
        shape: of the model.
        device: cpu or cuda.
        precision: fp32 or bf16.
    """
    if shape.active < SMALL:
        return None
    speed = matmul_speed(shape.hidden, device, precision)
    share = REACHED[device.partition(":")[0]]
    return Seconds(flops / (share * speed), f"{flops:.2g} FLOP at {share:.0%} of the {speed:.2g}/s measured here")


def matmul_speed(hidden: int, device: str, precision: str) -> float:
    """FLOP a second of a product (1024, hidden) × (hidden, 4 · hidden), measured in a moment."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.ones(1024, hidden, dtype=dtype, device=device)
    right = torch.ones(hidden, 4 * hidden, dtype=dtype, device=device)

    def wait() -> None:
        if left.is_cuda:
            torch.cuda.synchronize()

    left @ right
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < MEASURED_S:
        for _ in range(10 if left.is_cuda else 1):
            left @ right
            done += 1
        wait()
    return 2 * 1024 * hidden * 4 * hidden * done / (time.perf_counter() - began)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `4.2 s`, `35 s`, `2 min 05 s`, `1 h 20 min`, `3 days 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"


def amount(size: float) -> str:
    """Bytes as a person says them: `512 MiB`, `1.4 GiB`."""
    for unit, sign in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            number = size / unit
            return f"{number:.1f} {sign}" if number < 10 and sign != "KiB" else f"{number:.0f} {sign}"
    return f"{size:.0f} B"
