"""The loss against values worked out by hand, and the loop: its batches, its rate, its normalisation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from reward.fit import Objective, Schedule, batch_loss, group_batches, group_loss, learning_rate_at
from reward.model import Card
from tests.train.tiny import make_model


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_of_one_pair_is_bradley_terrys_with_margin_and_centering() -> None:
    """r = 2 and 1, margin 0.5: -log sigmoid(0.5) = softplus(-0.5) = 0.4741; 0.01 * 3² = 0.09."""
    loss = group_loss(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 0.5, 0.01)
    assert float(loss) == pytest.approx(softplus(-0.5) + 0.09)


def test_a_group_counts_once_however_many_pairs_it_has() -> None:
    """Group 0: right 1 against wrong 0 and 2: softplus(-1), softplus(1). Group 1: right 3 and 1 against wrong 1.

    Sum over groups of the means: (softplus(-1) + softplus(1)) / 2 + (softplus(-2) + softplus(0)) / 2.
    """
    rewards = torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0, 1.0])
    values = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = (softplus(-1) + softplus(1)) / 2 + (softplus(-2) + softplus(0)) / 2
    assert float(group_loss(rewards, values, groups, 0.0, 0.0)) == pytest.approx(expected)


def test_graded_values_pair_every_better_with_every_worse() -> None:
    """Values 3 > 2 > 1 with rewards 0, 0, 0: three pairs, each log 2; equal values are no pair."""
    zeros = torch.zeros(3)
    groups = torch.zeros(3, dtype=torch.long)
    assert float(group_loss(zeros, torch.tensor([3.0, 2.0, 1.0]), groups, 0.0, 0.0)) == pytest.approx(math.log(2))
    rewards = torch.tensor([5.0, 0.0, 0.0])
    assert float(group_loss(rewards, torch.tensor([1.0, 1.0, 0.0]), groups, 0.0, 0.0)) == pytest.approx(
        (softplus(-5) + math.log(2)) / 2
    )


def a_group(lengths: list[int], values: list[float], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(5, 200, 4).tolist()
    ends = [rng.integers(5, 200, n).tolist() for n in lengths]
    return {
        "family": "math",
        "values": values,
        "counts": [1] * len(values),
        "ids": [prompt + end for end in ends],
        "labels": [[-100] * 4 + end for end in ends],
    }


GROUPS = [a_group([3, 9], [1.0, 0.0], 1), a_group([5, 2, 7], [0.0, 1.0, 1.0], 2), a_group([4, 4], [0.0, 1.0], 3)]


@pytest.mark.parametrize("objective", [Objective(margin=0.5), Objective(centering=0.01, nll=0.7)])
def test_groups_together_have_the_gradient_of_groups_apart(objective: Objective) -> None:
    """Padding and batching change nothing: three groups in one pass, and one by one, summed."""
    card = Card("logprob", 0.3)
    gradients = []
    for parts in ([GROUPS], [[group] for group in GROUPS]):
        model = make_model("qwen2")
        for part in parts:
            batch_loss(objective, Rewards(model, card.head, card.coef), part, "cpu").loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4)
    assert gradients[0].norm() > 0.1


def test_the_nll_term_is_the_better_completions_mean_loss_per_token() -> None:
    """One group, right completion of 3 tokens: nll adds 2 * its mean negative log-probability, nothing of the wrong."""
    model, card, group = make_model("qwen2").eval(), Card("logprob", 0.3), GROUPS[0]
    with torch.no_grad():
        plain = batch_loss(Objective(), model, card, [group], "cpu")
        with_nll = batch_loss(Objective(nll=2.0), model, card, [group], "cpu")
        logps = model(torch.tensor([group["ids"][0]])).logits[0].log_softmax(-1)
    nll = -sum(float(logps[3 + i, token]) for i, token in enumerate(group["labels"][0][4:])) / 3
    assert float(with_nll - plain) == pytest.approx(2 * nll, abs=1e-4)


def test_every_batch_is_full_and_every_group_comes_each_pass() -> None:
    """10 groups, 2 passes, batches of 4: 20 places in 5 batches, each group twice; 1.5 passes: 4 batches."""
    lengths = np.arange(10) + 5
    batches = group_batches(lengths, 2.0, 4, seed=1)
    assert [len(batch) for batch in batches] == [4] * 5
    assert np.bincount(np.concatenate(batches)).tolist() == [2] * 10
    assert len(group_batches(lengths, 1.5, 4, seed=1)) == 4
    assert [len(batch) for batch in group_batches(lengths, 1.0, 64, seed=1)] == [10]
    again = group_batches(lengths, 2.0, 4, seed=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert np.concatenate(group_batches(lengths, 2.0, 4, seed=2)).tolist() != np.concatenate(batches).tolist()


def test_groups_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 640)
    spread = np.mean([np.ptp(lengths[batch]) for batch in group_batches(lengths, 1.0, 16, seed=1)])
    assert spread < 25, "a random batch of 16 spreads over nearly all of the 90"


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    """10 steps, 2 of warm-up at 1.0: 0.5, 1.0, then half a cosine over the other 8."""
    schedule = Schedule(1.0, 1.0, 1, 0.2, 0.0, 1.0, 1, 1)
    rates = [learning_rate_at(step, 10, schedule) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
