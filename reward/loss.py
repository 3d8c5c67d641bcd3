"""What a reward model minimises: Bradley-Terry over all better-worse pairs of each prompt's completions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.chat import IGNORED
from align.core.records import Row
from reward.batches import Encoded, Rewards, in_order, reward_batch


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised; see `group_loss`.

    Attributes:
        margin: by how much a better completion should score higher, at least.
        centering: weight of the squared sum of a pair's rewards.
        nll: weight of the better completions' mean negative log-probability per token (log-prob head only).
        use_margins: whether the difference of a pair's values is added to its margin.
        router: weight of the load-balancing loss of a mixture of experts; None: the model's own.
    """

    margin: float = 0.0
    centering: float = 0.0
    nll: float = 0.0
    use_margins: bool = False
    router: float | None = None


class BatchLoss(NamedTuple):
    """Of some groups.

    Attributes:
        loss: summed over the groups.
        figures: sums over the groups of the share of pairs in the right order, and of the mean reward of a pair's
            better and worse completion; and the tokens that were computed, (4,).
        mask: which positions are tokens where rows are padded, (R, T); None in the flat layout.
    """

    loss: Tensor
    figures: Tensor
    mask: Tensor | None


def group_loss(rewards: Tensor, values: Tensor, groups: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Bradley-Terry averaged over each group's better-worse pairs, summed over groups.

    Of a pair: −log σ(r_w − r_l − m) + centering · (r_w + r_l)², with m the margin, and with `use_margins` v_w − v_l
    more (as Llama 2 has it, arXiv:2307.09288, 3.2.2). Averaging over all pairs of a prompt makes every prompt count the
    same and lets each completion be computed once; centering is that of arXiv:2312.09244.

    Args:
        rewards: of completions, (B,).
        values: what they are worth; a pair is any two of one group with unequal values, (B,).
        groups: number of each completion's group, from 0, (B,).
        objective: see there; its `nll` and `router` are not looked at.

    Returns:
        The loss, and the first three figures of `BatchLoss`, (3,).
    """
    pair = (groups[:, None] == groups[None, :]) & (values[:, None] > values[None, :])
    better, worse = pair.nonzero(as_tuple=True)
    of_group = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    weight = 1 / of_group[groups[better]]
    high, low = rewards[better], rewards[worse]
    margin: Tensor | float = objective.margin
    if objective.use_margins:
        margin = margin + values[better] - values[worse]
    loss = -F.logsigmoid(high - low - margin) + objective.centering * (high + low) ** 2
    with torch.no_grad():
        figures = torch.stack([((high > low) * weight).sum(), (high * weight).sum(), (low * weight).sum()])
    return (loss * weight).sum(), figures


def batch_loss(objective: Objective, model: Any, rows: list[Row], device: Any) -> BatchLoss:
    """The loss of some groups.

    Args:
        objective: see there.
        model: a `Rewards`, or what a distributed training wraps around it.
        rows: groups on disk, see `reward.comparisons`.
        device: where the rewards are.
    """
    encoded = [pair for row in rows for pair in encoded_pairs(row)]
    values = torch.tensor([value for row in rows for value in row["values"]], dtype=torch.float32, device=device)
    groups = torch.tensor([number for number, row in enumerate(rows) for _ in row["values"]], device=device)
    plain: Rewards = getattr(model, "module", model)
    # group by group, even where two have one prompt: what is computed doesn't depend on which groups meet
    ends = np.cumsum([len(row["values"]) for row in rows]).tolist()
    places = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    batch, order = reward_batch(plain.model, plain.head, encoded, places)
    rewards = in_order(model(batch), order)
    loss, figures = group_loss(rewards, values, groups, objective)
    if objective.nll:
        tokens = [sum(label != IGNORED for label in labels) for _, labels in encoded]
        per_token = -rewards / plain.coef / torch.tensor(tokens, device=device)
        worst = torch.full((len(rows),), math.inf, device=device).scatter_reduce(0, groups, values, "amin")
        better = values > worst[groups]
        of_group = torch.bincount(groups[better], minlength=len(rows))
        loss = loss + objective.nll * (per_token[better] / of_group[groups[better]]).sum()
    mask = None if "segments" in batch else batch["attention_mask"].bool().to(device)
    computed = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return BatchLoss(loss, torch.cat([figures, figures.new_tensor([computed])]), mask)


def encoded_pairs(row: Row) -> list[Encoded]:
    """The completions of a group on disk, each with its prompt."""
    return list(zip(row["ids"], row["labels"], strict=True))
