"""Two ways to run a causal language model token by token over many rows: a quick one and one for every model.

Both keep a list of rows; `admit` prefills prompts and adds rows at the end (each distinct prompt is computed once,
however many samples it gets), `step` feeds one token to every row, `drop` takes finished rows out.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.core.errors import EngineError


class Decoder(Protocol):
    """What the slot loop needs of a model; one decoder serves one call of `sample`."""

    refills: bool
    """Whether rows may be added while others run; otherwise only when there are none."""

    pads: bool
    """Whether prompts of different lengths may be prefilled together."""

    def fits(self, rows: int, length: int) -> bool:
        """Whether so many rows of so many tokens fit the memory that this engine may use."""
        ...

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """Adds `copies[i]` rows for `prompts[i]`, in order; gives the logits after each prompt, (P, V)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds one token to each row, (B,); gives the logits of the next, (B, V)."""
        ...

    def drop(self, finished: list[int]) -> list[int]:
        """Takes rows out. Returns what is left in its new order: row i was row `order[i]`."""
        ...


def memory_budget(device: torch.device) -> int:
    """Bytes that a cache of keys and values may take: half of a GPU's free memory, a quarter of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class QuickWeights:
    """The weights of a Qwen2-like model laid out for decoding: q, k, v in one matrix, gate and up in another.

    The fused matrices are copies; everything else refers to the model's own tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        base = _bare(model)
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
        base = _bare(self.model)
        self.embed: Tensor = base.model.embed_tokens.weight.detach()
        self.norm: Tensor = base.model.norm.weight.detach()
        self.head, self.head_bias = _weight_and_bias(base.lm_head)
        self.rotary: nn.Module = base.model.rotary_emb
        self.blocks = [_Block(layer) for layer in base.model.layers]


class _Block:
    """One layer's tensors."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm1: Tensor = layer.input_layernorm.weight.detach()
        self.norm2: Tensor = layer.post_attention_layernorm.weight.detach()
        self.qkv, self.qkv_bias = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.out_bias = _weight_and_bias(attention.o_proj)
        self.gate_up, self.gate_up_bias = _fused(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = _weight_and_bias(mlp.down_proj)
        # Qwen3 normalises queries and keys per head.
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.q_norm: Tensor | None = None if q_norm is None else q_norm.weight.detach()
        self.k_norm: Tensor | None = None if k_norm is None else k_norm.weight.detach()


def _bare(model: Any) -> Any:
    """The transformers model inside a peft or accelerate wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    base = _bare(model)
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


class _Segment:
    """Rows that were admitted together and so have the same age: their new tokens lie in the same columns.

    A row's prompt begins at column 0; between a shorter prompt and the first new token is a gap, which is masked.

    Attributes:
        rows: how many of the first rows of `cache` are in use.
        span: columns in use.
        cache: (layers, 2, rows, kv_heads, columns, head_dim), keys and values.
        gaps: 0, and -inf where a row has a gap, (rows, 1, 1, columns).
    """

    def __init__(self, rows: int, span: int, cache: Tensor, gaps: Tensor) -> None:
        self.rows, self.span, self.cache, self.gaps = rows, span, cache, gaps

    def widen(self) -> None:
        """Makes room for more columns."""
        more = max(32, self.cache.shape[4] // 4)
        self.cache = F.pad(self.cache, (0, 0, 0, more))
        self.gaps = F.pad(self.gaps, (0, more))

    def drop(self, finished: list[int]) -> list[int]:
        """Takes rows out, closing gaps from the end; returns what is left: row i was row order[i]."""
        order = list(range(self.rows))
        self.rows -= len(finished)
        gone = set(finished)
        tail = (row for row in range(self.rows, len(order)) if row not in gone)
        for target in (row for row in finished if row < self.rows):
            source = next(tail)
            self.cache[:, :, target, :, : self.span] = self.cache[:, :, source, :, : self.span]
            self.gaps[target] = self.gaps[source]
            order[target] = source
        if self.rows * 2 < self.cache.shape[2]:
            self.cache, self.gaps = self.cache[:, :, : self.rows].clone(), self.gaps[: self.rows].clone()
        return order[: self.rows]

    def take_in(self, other: _Segment) -> None:
        """Appends another segment's rows; whichever has fewer columns gets a gap up to the new tokens to come."""
        columns = max(self.cache.shape[4], other.cache.shape[4])
        span = max(self.span, other.span)
        parts, gaps = [], []
        for segment in (self, other):
            more = columns - segment.cache.shape[4]
            # Padded with zeros: what is masked is still multiplied by 0, and so must be a number.
            parts.append(F.pad(segment.cache[:, :, : segment.rows], (0, 0, 0, more)))
            gaps.append(F.pad(segment.gaps[: segment.rows], (0, more)))
            parts[-1][:, :, :, :, segment.span : span] = 0
            gaps[-1][..., segment.span : span] = float("-inf")
        self.rows, self.span = self.rows + other.rows, span
        self.cache, self.gaps = torch.cat(parts, 2), torch.cat(gaps)


class QuickDecoder:
    """Own forward of Qwen2-like models (RMSNorm, rotary positions, grouped-query attention, gated SiLU).

    All rows go through the matrices together; attention runs by segments of rows of one age, each over its own
    length, so that one long completion doesn't make every other row as long.
    """

    refills = True
    pads = True

    def __init__(self, weights: QuickWeights) -> None:
        self.w = weights
        self.device = weights.embed.device
        self.segments: list[_Segment] = []
        self.most_segments = 8 if self.device.type == "cpu" else 2  # on a GPU a launch costs more than some padding
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.cos = self.sin = torch.empty(0)
        self.token_bytes = 2 * weights.layers * weights.kv_heads * weights.head_dim * weights.embed.element_size()
        self.budget = memory_budget(self.device)

    def fits(self, rows: int, length: int) -> bool:
        """See `Decoder`."""
        return rows * length * self.token_bytes <= self.budget

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """See `Decoder`."""
        w, device = self.w, self.device
        longest = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        source = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(copies, device=device))
        columns = longest + 32
        cache = w.embed.new_empty(w.layers, 2, len(source), w.kv_heads, columns, w.head_dim)
        gap = torch.arange(columns, device=device) >= lengths[source, None]
        gap[:, longest:] = False
        gaps = torch.zeros(gap.shape, dtype=cache.dtype, device=device).masked_fill_(gap, float("-inf"))
        self._tabulate(longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            cache[layer, 0, :, :, :longest] = k[source]
            cache[layer, 1, :, :, :longest] = v[source]
            # Padding is on the right, so causality alone hides it from every real position.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        x = self._layers(F.embedding(ids, w.embed), self.cos[:longest, None], self.sin[:longest, None], attend)
        self.segments.append(_Segment(len(source), longest, cache, gaps[:, None, None]))
        self.lengths = torch.cat((self.lengths, lengths[source]))
        return self._logits(x[torch.arange(len(prompts), device=device), lengths - 1])

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        w = self.w
        group = w.heads // w.kv_heads
        self._tabulate(max(segment.span for segment in self.segments) + 1)
        views = []
        start = 0
        for segment in self.segments:
            if segment.span == segment.cache.shape[4]:
                segment.widen()
            segment.span += 1
            layers = segment.cache[:, :, : segment.rows, :, : segment.span].unbind(0)
            mask = segment.gaps[: segment.rows, ..., : segment.span]
            views.append((slice(start, start + segment.rows), layers, mask))
            start += segment.rows

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The query heads that share a key head stand in for query positions: no key is repeated.
            q = q.view(-1, w.kv_heads, group, w.head_dim)
            mixed = []
            for rows, layers, mask in views:
                keys, values = layers[layer].unbind(0)
                keys[:, :, -1] = k[rows]
                values[:, :, -1] = v[rows]
                mixed.append(F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=mask))
            return torch.cat(mixed)

        cos, sin = self.cos[self.lengths][:, None], self.sin[self.lengths][:, None]
        x = self._layers(F.embedding(tokens, w.embed), cos, sin, attend)
        self.lengths += 1
        return self._logits(x)

    def drop(self, finished: list[int]) -> list[int]:
        """See `Decoder`."""
        left: list[tuple[_Segment, list[int]]] = []
        start = 0
        for segment in self.segments:
            end = start + segment.rows
            order = segment.drop([row - start for row in finished if start <= row < end])
            if order:
                left.append((segment, [start + row for row in order]))
            start = end
        while len(left) > self.most_segments:
            (small, its), (smallest, others) = sorted(left, key=lambda pair: -pair[0].rows)[-2:]
            left = [pair for pair in left if pair[0] not in (small, smallest)]
            small.take_in(smallest)
            left.append((small, its + others))
        self.segments = [segment for segment, _ in left]
        order = [row for _, rows in left for row in rows]
        self.lengths = self.lengths[order]
        return order

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """Runs all layers on hidden states (..., hidden); `attend(layer, q, k, v)` stores and attends."""
        w = self.w
        q_heads, both, size = w.heads, w.heads + w.kv_heads, w.head_dim
        for layer, block in enumerate(w.blocks):
            h = F.rms_norm(x, x.shape[-1:], block.norm1, w.eps)
            qkv = F.linear(h, block.qkv, block.qkv_bias).view(*x.shape[:-1], -1, size)
            qk, v = qkv[..., :both, :], qkv[..., both:, :]
            if block.q_norm is not None and block.k_norm is not None:
                q = F.rms_norm(qk[..., :q_heads, :], (size,), block.q_norm, w.eps)
                k = F.rms_norm(qk[..., q_heads:, :], (size,), block.k_norm, w.eps)
                qk = torch.cat((q, k), -2)
            low, high = qk.chunk(2, -1)
            qk = qk * cos + torch.cat((-high, low), -1) * sin
            mixed = attend(layer, qk[..., :q_heads, :], qk[..., q_heads:, :], v)
            x = x + F.linear(mixed.reshape(*x.shape[:-1], q_heads * size), block.out, block.out_bias)
            h = F.rms_norm(x, x.shape[-1:], block.norm2, w.eps)
            gate, up = F.linear(h, block.gate_up, block.gate_up_bias).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block.down, block.down_bias)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, x.shape[-1:], self.w.norm, self.w.eps), self.w.head, self.w.head_bias)

    def _tabulate(self, length: int) -> None:
        """Makes the tables of rotary positions at least `length` long."""
        if length > len(self.cos):
            positions = torch.arange(2 * length, device=self.device)
            cos, sin = self.w.rotary(self.w.embed, positions[None])
            self.cos, self.sin = cos[0], sin[0]


class GenericDecoder:
    """Any causal language model through its own forward and cache, prompts padded on the left.

    Rows are added only when there are none; finished rows leave the cache once they are a quarter of it.
    """

    refills = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        # Recurrent layers would read the padding.
        self.pads = not getattr(_bare(model), "_is_stateful", False)
        self.takes = set(inspect.signature(_bare(model).forward).parameters)
        self.cache: Any = None
        self.mask = self.index = torch.empty(0, dtype=torch.long, device=device)
        config = _bare(model).config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
        self.token_bytes: int = 2 * kept * model.get_input_embeddings().weight.element_size()
        self.budget = memory_budget(device) // 2  # the cache grows by copying

    def fits(self, rows: int, length: int) -> bool:
        """See `Decoder`."""
        return rows * length * self.token_bytes <= self.budget

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """See `Decoder`."""
        longest = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        self.cache = None
        logits = self._forward(ids, (self.mask.cumsum(-1) - 1).clamp_min(0))
        source = torch.arange(len(prompts), device=self.device).repeat_interleave(
            torch.tensor(copies, device=self.device)
        )
        self._select(source)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        ids = torch.zeros(len(self.mask), dtype=torch.long, device=self.device)
        ids[self.index] = tokens
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), -1)
        return self._forward(ids[:, None], self.mask.sum(-1, keepdim=True) - 1)[self.index]

    def drop(self, finished: list[int]) -> list[int]:
        """See `Decoder`."""
        gone = set(finished)
        order = [row for row in range(len(self.index)) if row not in gone]
        self.index = self.index[order]
        if 0 < len(order) < 0.75 * len(self.mask):
            self._select(self.index)
        return order

    def _select(self, rows: Tensor) -> None:
        """Keeps these rows of the cache (they may repeat); from then on row i lies at i."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.index = torch.arange(len(rows), device=self.device)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits at the last position; ids (B, T), the cache grows by T."""
        inputs = {"position_ids": positions, "logits_to_keep": 1}
        training = self.model.training
        self.model.eval()  # a live policy may be in training mode: no dropout while it samples
        try:
            out = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **{name: value for name, value in inputs.items() if name in self.takes},
            )
        finally:
            self.model.train(training)
        self.cache = getattr(out, "past_key_values", None)
        if not hasattr(self.cache, "reorder_cache"):
            kind = type(_bare(self.model)).__name__
            raise EngineError(f"{kind}: it keeps its state in a form this engine can't share between samples; use vLLM")
        logits: Tensor = out.logits[:, -1]
        return logits
