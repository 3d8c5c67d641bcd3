"""Rewards of many completions in few passes of a model, with or without gradient.

Two layouts give the same numbers. *Padded* is what every model reads: one completion a row, padded on the right, where
a causal model never looks. *Shared* puts the completions of one prompt behind it into one row, each seeing the prompt
and itself alone, so that the prompt is computed once: half the work for short completions (six samples a prompt of the
tiny model), and on a CPU work is time. It is used there, for models known to read such a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.chat import IGNORED
from reward.loading import Head

Encoded = tuple[list[int], list[int]]
"""Token ids of prompt and completion, and labels: the completion's ids at its places, IGNORED elsewhere."""

BATCH_TOKENS = 16_384
LOGITS_AT_ONCE = 2**27
"""Bounds of a batch when scoring: padded tokens, and (log-prob head) logits, half a gigabyte of float32."""

LONGEST_SHARED = 1024
"""Tokens of a row beyond which its mask and its attention cost more than the prompt that they save."""

SHARES = ("llama", "mistral", "qwen2", "qwen3")


def batch_rewards(model: Any, head: Head, coef: float, encoded: Sequence[Encoded]) -> Tensor:
    """Rewards of encoded completions, (B,), float32; logits only where a completion is predicted."""
    rows = _rows_by_prompt(encoded) if _can_share(model) else []
    if rows and max(_shared_length(encoded, row) for row in rows) <= LONGEST_SHARED and len(rows) < len(encoded):
        return _shared_rewards(model, head, coef, encoded, rows)
    return _padded_rewards(model, head, coef, encoded)


def batches_to_score(model: Any, head: Head, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
    """Places of the completions of each batch: like lengths together, and a prompt's completions."""
    budget = BATCH_TOKENS
    if head == "logprob":
        budget = min(budget, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    rows = _rows_by_prompt(encoded) if _can_share(model) else [[place] for place in range(len(encoded))]
    batch: list[list[int]] = []
    for row in sorted(rows, key=lambda row: _shared_length(encoded, row)):
        if batch and (len(batch) + 1) * _shared_length(encoded, row) > budget:
            yield [place for one in batch for place in one]
            batch = []
        batch.append(row)
    if batch:
        yield [place for one in batch for place in one]


def collate(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T), padded on the right."""
    longest = max(len(ids) for ids, _ in encoded)
    rows = [(ids, labels, longest - len(ids)) for ids, labels in encoded]
    return {
        "input_ids": torch.tensor([ids + [pad_id] * pad for ids, _, pad in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * pad for ids, _, pad in rows]),
        "labels": torch.tensor([labels + [IGNORED] * pad for _, labels, pad in rows]),
    }


def _padded_rewards(model: Any, head: Head, coef: float, encoded: Sequence[Encoded]) -> Tensor:
    device = next(model.parameters()).device
    pad_id = getattr(model, "module", model).config.pad_token_id  # a distributed model wraps its own
    batch = {name: tensor.to(device) for name, tensor in collate(encoded, pad_id or 0).items()}
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if head == "scalar":
        scores: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return scores[:, 0].float()
    first = int((labels != IGNORED).any(dim=0).int().argmax())  # a label, so at least 1: a prompt is never empty
    keep = torch.arange(first - 1, ids.shape[1] - 1, device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    targets = labels[:, first:]
    scored = targets != IGNORED
    return coef * _summed_logps(logits[scored], targets[scored], scored.nonzero()[:, 0], len(encoded))


def _shared_rewards(
    model: Any, head: Head, coef: float, encoded: Sequence[Encoded], rows: Sequence[Sequence[int]]
) -> Tensor:
    """A prompt and all its completions in one row; `rows` holds places in `encoded`."""
    longest = max(_shared_length(encoded, row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    part = torch.full((len(rows), longest), -1)  # 0: the prompt; 1, 2, ...: a completion; -1: padding
    predicted: list[tuple[int, int, int, int]] = []  # row, where it is predicted, the token, its completion
    ends: list[tuple[int, int, int]] = []  # row, last token, its completion
    for number, row in enumerate(rows):
        start = _start(encoded[row[0]])
        ids[number, :start] = torch.tensor(encoded[row[0]][0][:start])
        positions[number, :start] = torch.arange(start)
        part[number, :start] = 0
        at = start
        for which, place in enumerate(row):
            own, labels = encoded[place][0][start:], encoded[place][1][start:]
            ids[number, at : at + len(own)] = torch.tensor(own)
            positions[number, at : at + len(own)] = torch.arange(start, start + len(own))
            part[number, at : at + len(own)] = which + 1
            before = [start - 1, *range(at, at + len(own) - 1)]
            predicted += [(number, b, t, place) for b, t in zip(before, labels, strict=True) if t != IGNORED]
            at += len(own)
            ends.append((number, at - 1, place))
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if head == "scalar":
        row_of, end, place_of = torch.tensor(ends).T
        hidden = getattr(model, model.base_model_prefix)(**kwargs).last_hidden_state[row_of, end]
        return torch.zeros(len(encoded)).index_add(0, place_of, model.score(hidden)[:, 0])
    row_of, before_of, target, place_of = torch.tensor(predicted).T
    first = int(before_of.min())
    logits = model(**kwargs, logits_to_keep=torch.arange(first, longest)).logits
    return coef * _summed_logps(logits[row_of, before_of - first], target, place_of, len(encoded))


def _summed_logps(logits: Tensor, targets: Tensor, completion: Tensor, count: int) -> Tensor:
    """Log-probabilities of target tokens, (N,) given logits (N, V), summed by completion, (count,)."""
    logps = -F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.zeros(count, device=logits.device).index_add(0, completion, logps)


def _can_share(model: Any) -> bool:
    """Whether the shared layout may be used: on a CPU, for plain models that take a mask and positions as they are."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and model.device.type == "cpu"
        and model.config.model_type in SHARES
        and getattr(model.config, "sliding_window", None) is None
        and model.config._attn_implementation in ("sdpa", "eager")
    )


def _rows_by_prompt(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Places of the completions that have the same ids before their first label."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(encoded):
        rows.setdefault(tuple(one[0][: _start(one)]), []).append(place)
    return list(rows.values())


def _start(one: Encoded) -> int:
    """Where the completion begins; a sequence without labels is all prompt but for its last token."""
    return next((at for at, label in enumerate(one[1]) if label != IGNORED), len(one[0]) - 1)


def _shared_length(encoded: Sequence[Encoded], row: Sequence[int]) -> int:
    start = _start(encoded[row[0]])
    return start + sum(len(encoded[place][0]) - start for place in row)
