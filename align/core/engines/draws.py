"""Choosing the next token: each sample's randomness is its own, whatever else is in the batch.

A sample's key is a hash of (seed, prompt ids, sample index); the uniform for its i-th token is the i-th output of
SplitMix64 started at that key. So a completion is a function of seed, prompt, index and model alone: up to float
rounding it is the same in another batch, on another number of slots, or after a resumed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def choose(logits: torch.Tensor, u: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens by inverse transform sampling, in the order temperature, top-k, top-p (as transformers has it).

    Args:
        logits: next-token logits, (B, V).
        u: one uniform per row in [0, 1), (B,); not read when greedy.
        params: temperature, top_k and top_p are read.

    Returns:
        Token ids, (B,), and whether the row's logits were usable (no NaN), (B,).
    """
    if params.temperature == 0:
        best, token = logits.max(-1)
        return token, best.isfinite()
    probs = torch.softmax(logits.float() / params.temperature, -1)
    if 0 < params.top_k < probs.shape[-1]:
        least = probs.topk(params.top_k, -1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if params.top_p < 1:
        # The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; the likeliest is always in it.
        ordered = probs.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        last = (before < params.top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True) - 1
        probs = probs.masked_fill(probs < ordered.gather(-1, last.clamp_min(0)), 0.0)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the token found always has a probability above zero.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return token.clamp_max(logits.shape[-1] - 1), total.squeeze(-1).isfinite()


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the chosen tokens at temperature 1, nats, (B,); logits (B, V), tokens (B,)."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
