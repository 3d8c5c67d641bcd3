"""Which models the quick decoder can run, and their weights laid out for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.core.engines.decoder import bare_model


class QuickWeights:
    """The weights of a Qwen2-like model laid out for decoding: q, k, v in one matrix, gate and up in another.

    The fused matrices are copies, as all matrices are where `dtype` isn't the model's; everything else refers to the
    model's own tensors.

    Args:
        model: may be wrapped by peft.
        dtype: of the matrices and of the keys and values; under autocast, where it isn't the model's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        base = bare_model(model)
        config = base.config
        self.layers = len(base.model.layers)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the model's current weights."""
        base = bare_model(self.model)
        self.embed: Tensor = base.model.embed_tokens.weight.detach()
        self.norm: Tensor = base.model.norm.weight.detach()
        self.head, self.head_bias = _in(self.dtype, *_weight_and_bias(base.lm_head))
        self.rotary: nn.Module = base.model.rotary_emb
        self.blocks = [_Block(layer, self.dtype) for layer in base.model.layers]

    def release(self) -> None:
        """Lets the copies go, until `refresh`."""
        self.blocks = []
        self.head = self.embed


class _Block:
    """One layer's tensors."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm1: Tensor = layer.input_layernorm.weight.detach()
        self.norm2: Tensor = layer.post_attention_layernorm.weight.detach()
        self.qkv, self.qkv_bias = _in(dtype, *_fused(attention.q_proj, attention.k_proj, attention.v_proj))
        self.out, self.out_bias = _in(dtype, *_weight_and_bias(attention.o_proj))
        self.gate_up, self.gate_up_bias = _in(dtype, *_fused(mlp.gate_proj, mlp.up_proj))
        self.down, self.down_bias = _in(dtype, *_weight_and_bias(mlp.down_proj))
        # Qwen3 normalises queries and keys per head.
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.q_norm: Tensor | None = None if q_norm is None else q_norm.weight.detach()
        self.k_norm: Tensor | None = None if k_norm is None else k_norm.weight.detach()


def _in(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight with its active LoRA adapters added, and its bias."""
    plain = getattr(linear, "base_layer", linear)
    weight = plain.weight.detach()
    if plain is not linear and not linear.merged and not linear.disable_adapters:
        for adapter in linear.active_adapters:
            if adapter in linear.lora_A:
                weight = weight + linear.get_delta_weight(adapter).detach().to(weight.dtype)
    return weight, None if plain.bias is None else plain.bias.detach()


def _fused(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Several linear layers of the same input as one."""
    weights, biases = zip(*(_weight_and_bias(linear) for linear in linears), strict=True)
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    return torch.cat(weights), torch.cat(
        [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )


def is_quick(model: Any) -> bool:
    """Whether `QuickDecoder` computes exactly what this model's own forward does."""
    base = bare_model(model)
    config = base.config
    if config.model_type not in ("qwen2", "qwen3", "llama", "mistral"):
        return False
    if not hasattr(base, "lm_head") or config.hidden_act != "silu":
        return False
    kinds = getattr(config, "layer_types", None)
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None
    if any(kind != "full_attention" for kind in kinds) if kinds else windowed:
        return False
    rope = getattr(base.model.rotary_emb, "rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):  # the others' tables depend on the length reached
        return False
    linears = [m for layer in base.model.layers for m in (*_projections(layer.self_attn), *_projections(layer.mlp))]
    return all(_is_plain(linear) for linear in [*linears, base.lm_head])


def _projections(module: Any) -> list[Any]:
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def _is_plain(linear: Any) -> bool:
    """A plain linear layer, or one with plain LoRA on it (not quantised, no DoRA, no other kind of adapter)."""
    if type(linear) is nn.Linear:
        return True
    if type(getattr(linear, "base_layer", None)) is not nn.Linear or not hasattr(linear, "lora_A"):
        return False
    return not any(getattr(linear, "use_dora", {}).values()) and not getattr(linear, "lora_variant", {})
