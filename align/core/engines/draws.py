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


CLOSE_LOGITS = 1e-5
"""Greedy: so near to each other, as a share of the largest logit, that rounding may tell which of two is the larger."""

CLOSE_MASS = 1e-6
"""Sampled: so near to a border, in probability for each unit of the largest logit, that rounding may decide: the error
of logits grows with their size. With the shipped model, whose logits reach 25, another batch moves a border by some
1e-7, and by 1.4e-6 at the most that was seen. About one draw in a thousand is close, which costs little."""


class Choice(NamedTuple):
    """What was drawn for each row.

    Attributes:
        token: token ids, (B,).
        usable: whether the row's logits were numbers, (B,).
        close: whether rounding might have decided, (B,); never in 16 bits.
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
    rounds = logits.dtype == torch.float32  # in a shorter format rounding is too coarse to be kept out
    if params.temperature == 0:
        two = logits.topk(2, -1)
        best, second = two.values.unbind(-1)
        return Choice(two.indices[:, 0], best.isfinite(), rounds & (best - second < CLOSE_LOGITS * _size(logits)))
    logits = logits.float() / params.temperature
    probs = torch.softmax(logits, -1)
    margin = (CLOSE_MASS * _size(logits))[:, None] if rounds else torch.zeros_like(probs[:, :1])
    close = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
    if 0 < params.top_k < probs.shape[-1]:
        likeliest = probs.topk(params.top_k + 1, -1).values
        least, next_one = likeliest[:, -2:-1], likeliest[:, -1:]
        close |= ((least - next_one < margin * least) & (next_one > 0))[:, 0]
        probs = probs.masked_fill(probs < least, 0.0)
    if params.top_p < 1:
        # The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; the likeliest is always in it.
        ordered = probs.sort(-1, descending=True).values
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        close |= (((before - params.top_p * total).abs() < margin * total) & (ordered > 0)).any(-1)
        last = (before < params.top_p * total).sum(-1, keepdim=True) - 1
        probs = probs.masked_fill(probs < ordered.gather(-1, last.clamp_min(0)), 0.0)
    if params.min_p > 0:
        least = params.min_p * probs.max(-1, keepdim=True).values
        close |= ((probs - least).abs() < margin * least).any(-1)
        probs = probs.masked_fill(probs < least, 0.0)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the token found always has a probability above zero.
    most = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u[:, None] * total, most)
    reach = margin * total
    around = torch.cat((target, (target - reach).clamp_min(0), torch.minimum(target + reach, most)), -1)
    token, low, high = torch.searchsorted(cdf, around, right=True).clamp_max(logits.shape[-1] - 1).unbind(-1)
    return Choice(token, total[:, 0].isfinite(), close | (low != high))


def _size(logits: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each row, (B,); what may not come (-inf) apart."""
    return logits.masked_fill(logits == float("-inf"), 0).abs().amax(-1)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the chosen tokens at temperature 1, nats, (B,); logits (B, V), tokens (B,)."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
