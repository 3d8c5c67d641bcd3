"""The quick decoder: an own forward for Qwen2-like models, made for many rows of one new token each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.engines.decoder import memory_budget
from align.core.engines.quick_weights import QuickWeights


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
        self.most_segments = 3 if self.device.type == "cpu" else 2  # on a GPU a launch costs more than some padding
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.cos = self.sin = torch.empty(0)
        self.token_bytes = 2 * weights.layers * weights.kv_heads * weights.head_dim * weights.dtype.itemsize
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
        cache = w.embed.new_empty(w.layers, 2, len(source), w.kv_heads, columns, w.head_dim, dtype=w.dtype)
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

    def alone(self, ids: list[int]) -> Tensor:
        """See `Decoder`."""
        self._tabulate(len(ids))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        x = F.embedding(torch.tensor(ids, device=self.device), self.w.embed)
        x = self._layers(x, self.cos[: len(ids), None], self.sin[: len(ids), None], attend)
        return self._logits(x[-1:])[0]

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
