"""How much memory a training will take, from a model's config and the settings, and how much is there.

What autograd keeps of one layer for one token, in numbers (counted in transformers' Qwen2 and Llama, held by a test):

    6 d + 2 q + 2 k + 4 f + h + 2        d hidden, q queries, k keys, f of the MLP, h heads

An attention that keeps a square of the length is not meant: neither torch's own nor FlashAttention does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHUNK_ELEMENTS = 2**26
"""Most logits that the head (align/train/head.py) holds at a time, 256 MiB in fp32. It holds about four such tables:
logits, log-probabilities, their exponentials, and a gradient or product."""

MERGED_AT_ONCE = 2**24
"""Numbers that the Online Merging Optimizer merges at once, at most, where one parameter alone has not more."""


def memory_needed(
    config: Any,
    tokens: int,
    labelled: int,
    *,
    lora_rank: int = 0,
    lora_targets: str | Sequence[str] = "all-linear",
    quantization: str = "none",
    precision: str = "fp32",
    checkpointing: bool = False,
    reference: bool = False,
    merging: float | None = None,
) -> dict[str, int]:
    """Bytes that one process needs at its peak, by part; their sum is the estimate.

    Upwards of what is used where there is no accumulation: gradients and activations are then never whole at once.

    Args:
        config: the model's, of transformers.
        tokens: that go through the model at once.
        labelled: those of them that the language-model head scores; 0 for a scalar head.
        lora_rank: of the adapters; 0 trains all weights.
        lora_targets: names of modules, or all-linear.
        quantization: none or nf4.
        precision: fp32, or bf16 (fp32 weights and bf16 arithmetic; bf16 weights where they are frozen).
        checkpointing: whether activations are computed twice.
        reference: whether a second, frozen model is held.
        merging: bytes a trained parameter that the Online Merging Optimizer holds beyond AdamW's moments and its
            buffer; None: the optimizer is AdamW.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations`, `logits`, and `reference` where there is one.
    """
    text = config.get_text_config()
    model = _without_weights(config, head=labelled > 0)
    linear, others, adapters = _count(model, lora_rank, lora_targets)
    low = precision == "bf16"
    frozen = lora_rank > 0
    size = 2 if frozen and low else 4
    weights = others * size + int(linear * (0.52 if quantization == "nf4" else size))
    trained = adapters if frozen else linear + others
    if low and not frozen:
        weights += 2 * linear  # autocast keeps what it has rounded until the backward pass is done
    layers = int(text.num_hidden_layers)
    normed = any(name.endswith("q_norm") for name, _ in model.named_modules())
    of_layer, kept = _of_layer(text, low, normed), text.hidden_size * (2 if low else 4)
    of_token = layers * kept + of_layer if checkpointing else layers * of_layer
    needed = {
        "weights": weights + 4 * (adapters if frozen else 0),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": tokens * (of_token + 3 * 4 * text.hidden_size),
        "logits": 4 * 4 * min(labelled * int(text.vocab_size), CHUNK_ELEMENTS),
    }
    if merging is not None:
        largest = max(p.numel() for p in model.parameters())
        needed["optimizer"] += int(merging * trained) + 4 * min(trained, max(largest, MERGED_AT_ONCE))
    if reference:
        needed["reference"] = (linear + others) * size
    return needed


def memory_of(
    model: Any, tokens: int, labelled: int, *, device: str = "cpu", also: Sequence[Any] = (), **training: Any
) -> dict[str, Any]:
    """What a training tells of its memory before it starts.

    Args:
        model: that is trained and loaded already, wrapped or not.
        tokens: see `memory_needed`.
        labelled: see there.
        device: cpu or cuda.
        also: other models that are counted and loaded already, such as a reference.
        training: what else `memory_needed` takes.

    Returns:
        `memory`, bytes by part; and `memory_there`, bytes that there are for it: those that are free, and those that
        the models have taken already.
    """
    from align.core.engines.decoder import bare_model

    needed = memory_needed(bare_model(model).config, tokens, labelled, **training)
    taken = sum(_held(each, device) for each in (model, *also))
    return {"memory": needed, "memory_there": memory_there(device) + taken}


def _held(model: Any, device: str) -> int:
    """Bytes of a model's weights on a device, in the precision that they have there."""
    kind = device.partition(":")[0]
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == kind)


def memory_there(device: str) -> int:
    """Bytes that are free: of the GPU, or of this machine's memory within the limit of its container."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil  # comes with accelerate

    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # another system, or "max"
        return None


def _without_weights(config: Any, head: bool) -> Any:
    """The model's modules and shapes; with its language-model head, or without one."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        return (AutoModelForCausalLM if head else AutoModel).from_config(config)


def _count(model: Any, rank: int, targets: str | Sequence[str]) -> tuple[int, int, int]:
    """Weights of linear layers, all other weights (embeddings and head among them), weights of the adapters."""
    from torch import nn

    top = model.get_output_embeddings()
    names = [targets] if isinstance(targets, str) else list(targets)
    linear = adapters = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not top:
            linear += module.weight.numel()
            if names == ["all-linear"] or name.rsplit(".", 1)[-1] in names:
                adapters += rank * (module.in_features + module.out_features)
    return linear, sum(p.numel() for p in model.parameters()) - linear, adapters


def _of_layer(text: Any, low: bool, normed: bool) -> int:
    """Bytes that autograd keeps of a layer for one token; more where queries and keys have a norm each."""
    d, heads = int(text.hidden_size), int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or d // heads)
    q, k = heads * width, int(getattr(text, "num_key_value_heads", None) or heads) * width
    f = int(getattr(text, "intermediate_size", None) or 4 * d)
    if experts := getattr(text, "num_experts_per_tok", None):
        f = experts * int(getattr(text, "moe_intermediate_size", None) or f)
        f += int(getattr(text, "shared_expert_intermediate_size", None) or 0)
    norms = 4 * (2 * q + 2 * k + (q + k) // width) if normed else 0
    if low:  # the norms are computed in fp32
        return 26 * d + 4 * q + 4 * k + 8 * f + 4 * (heads + 2) + norms
    return 4 * (6 * d + 2 * q + 2 * k + 4 * f + heads + 2) + norms
