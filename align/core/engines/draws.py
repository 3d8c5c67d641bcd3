"""Choosing the next token: each sample's randomness is its own, whatever else is in the batch.

A sample's key is a hash of (seed, prompt ids, sample index); the uniform for its i-th token is the i-th output of
SplitMix64 started at that key. So a completion is a function of seed, prompt, index and model alone: it is the same in
another batch, on another number of slots, or after a resumed run.

What else is in a batch still changes logits by float rounding. A draw that lies so near to the border between two
tokens that this might decide is called close; the slot loop then asks for the logits of that text computed alone,
which no batch changes, and draws from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from align.core.engines.base import SamplingParams

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def sample_key(seed: int, prompt: Sequence[int], index: int) -> int:
    """64-bit key of one sample's stream, the same in every process and on every machine."""
    hasher = hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=8, key=b"align sample")
    hasher.update(f"{seed}/{index}".encode())
    return int.from_bytes(hasher.digest(), "little")


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) for each (key, position), 24 bits of SplitMix64's output (Steele, Lea and Flood 2014)."""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA
    state = (state ^ (state >> np.uint64(30))) * _MIX1
    state = (state ^ (state >> np.uint64(27))) * _MIX2
    state ^= state >> np.uint64(31)
    out: NDArray[np.float32] = (state >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return out


CLOSE_LOGITS = 2e-4
"""Greedy: so near to each other that rounding may tell which of two logits is the larger."""

CLOSE_MASS = 2e-5
"""Sampled: so near to a border, as a share of the probability, that rounding may decide. In float32 another batch
moves a border by some 1e-7, and by 1.4e-6 at the most that was seen with the shipped model. About one draw in a
thousand is close, so that the texts computed alone cost next to nothing."""


class Choice(NamedTuple):
    """What was drawn for each row.

    Attributes:
        token: token ids, (B,).
        usable: whether the row's logits were numbers, (B,).
        close: whether rounding might have decided, (B,).
    """

    token: torch.Tensor
    usable: torch.Tensor
    close: torch.Tensor


def choose(logits: torch.Tensor, u: torch.Tensor, params: SamplingParams) -> Choice:
    """Next tokens by inverse transform sampling; temperature, top-k, top-p, min-p in this order, as in transformers.

    Args:
        logits: next-token logits, (B, V); -inf for what may not come.
        u: one uniform per row in [0, 1), (B,); not read when greedy.
        params: temperature, top_k, top_p and min_p are read.
    """
    if params.temperature == 0:
        two = logits.topk(2, -1)
        best = two.values[:, 0]
        return Choice(two.indices[:, 0], best.isfinite(), best - two.values[:, 1] < CLOSE_LOGITS)
    probs = torch.softmax(logits.float() / params.temperature, -1)
    close = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
    if 0 < params.top_k < probs.shape[-1]:
        likeliest = probs.topk(params.top_k + 1, -1).values
        least, next_one = likeliest[:, -2:-1], likeliest[:, -1:]
        close |= (least - next_one < CLOSE_MASS * least)[:, 0] & (next_one[:, 0] > 0)
        probs = probs.masked_fill(probs < least, 0.0)
    if params.top_p < 1:
        # The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; the likeliest is always in it.
        ordered = probs.sort(-1, descending=True).values
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        close |= (((before - params.top_p * total).abs() < CLOSE_MASS * total) & (ordered > 0)).any(-1)
        last = (before < params.top_p * total).sum(-1, keepdim=True) - 1
        probs = probs.masked_fill(probs < ordered.gather(-1, last.clamp_min(0)), 0.0)
    if params.min_p > 0:
        least = params.min_p * probs.max(-1, keepdim=True).values
        close |= ((probs - least).abs() < CLOSE_MASS * least).any(-1)
        probs = probs.masked_fill(probs < least, 0.0)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the token found always has a probability above zero.
    most = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u[:, None] * total, most)
    margin = CLOSE_MASS * total
    around = torch.cat((target, (target - margin).clamp_min(0), torch.minimum(target + margin, most)), -1)
    token, low, high = torch.searchsorted(cdf, around, right=True).clamp_max(logits.shape[-1] - 1).unbind(-1)
    return Choice(token, total[:, 0].isfinite(), close | (low != high))


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the chosen tokens at temperature 1, nats, (B,); logits (B, V), tokens (B,)."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
