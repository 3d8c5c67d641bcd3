"""The loss against values worked out by hand and against TRL's, and the loop: its batches, rate, normalisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import RecipeError
from align.core.records import Kind
from align.core.store import ModelRef
from reward.batches import Rewards
from reward.fit import Schedule, group_batches, learning_rate_at
from reward.loss import Objective, batch_loss, group_loss
from reward.train import Config, new_reward_model
from tests.train.tiny import make_model, save_model


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def loss_of(rewards: list[float], values: list[float], groups: list[int], **objective: Any) -> float:
    found, _ = group_loss(torch.tensor(rewards), torch.tensor(values), torch.tensor(groups), Objective(**objective))
    return float(found)


def test_the_loss_of_one_pair_is_bradley_terrys_with_margin_and_centering() -> None:
    """r = 2 and 1, margin 0.5: -log sigmoid(0.5) = softplus(-0.5) = 0.4741; 0.01 * 3² = 0.09."""
    found = loss_of([2.0, 1.0], [1.0, 0.0], [0, 0], margin=0.5, centering=0.01)
    assert found == pytest.approx(softplus(-0.5) + 0.09)


def test_margins_of_the_data_are_added_to_that_of_all_pairs() -> None:
    """r = 2 and 1, worth 0.7 and 0, margin 0.2: softplus(-(1 - 0.2 - 0.7)) = softplus(-0.1)."""
    found = loss_of([2.0, 1.0], [0.7, 0.0], [0, 0], margin=0.2, use_margins=True)
    assert found == pytest.approx(softplus(-0.1))


def test_a_group_counts_once_however_many_pairs_it_has() -> None:
    """Group 0: right 1 against wrong 0 and 2: softplus(-1), softplus(1). Group 1: right 3 and 1 against wrong 1.

    Sum over groups of the means: (softplus(-1) + softplus(1)) / 2 + (softplus(-2) + softplus(0)) / 2.
    """
    found = loss_of([1.0, 0.0, 2.0, 3.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 1, 1, 1])
    assert found == pytest.approx((softplus(-1) + softplus(1)) / 2 + (softplus(-2) + softplus(0)) / 2)


def test_graded_values_pair_every_better_with_every_worse() -> None:
    """Values 3 > 2 > 1 with rewards 0, 0, 0: three pairs, each log 2; equal values are no pair."""
    assert loss_of([0.0] * 3, [3.0, 2.0, 1.0], [0] * 3) == pytest.approx(math.log(2))
    found = loss_of([5.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0] * 3)
    assert found == pytest.approx((softplus(-5) + math.log(2)) / 2)


def test_the_figures_of_a_step_are_means_over_its_groups() -> None:
    """Group 0: 1 against 0 and 2: half its pairs right, better 1, worse 1. Group 1: 3 against 1, right."""
    _, figures = group_loss(
        torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]),
        torch.tensor([0, 0, 0, 1, 1]), Objective(),
    )  # fmt: skip
    assert figures.tolist() == pytest.approx([1.5, 4.0, 2.0])


def test_the_loss_of_plain_pairs_is_that_of_trls_reward_trainer(tmp_path: Path) -> None:
    """Its collator, its padded rows, its loss, with a margin and centering, on the same classifier."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    save_model(tmp_path)
    judge = new_reward_model(Config(), ModelRef(str(tmp_path), Kind.MODEL, "policy", "0"), seed=1)
    judge.model.score.weight.data *= 5
    pairs = [a_group([3 + i, 9 - i], [1.0, 0.0], i) for i in range(6)]
    rows = [{"chosen_ids": one["ids"][0], "rejected_ids": one["ids"][1], "margin": 0.4} for one in pairs]
    arguments = RewardConfig(
        str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=None,
        center_rewards_coefficient=0.03, per_device_train_batch_size=6,
    )  # fmt: skip
    trainer = RewardTrainer(
        judge.model, arguments, train_dataset=Dataset.from_list(rows), processing_class=judge.tokenizer
    )
    theirs = trainer.compute_loss(judge.model, trainer.data_collator(rows))
    objective = Objective(margin=0.4, centering=0.03)
    ours = batch_loss(objective, Rewards(judge.model, "scalar", 1.0), pairs, "cpu").loss / 6
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)


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


def test_the_nll_term_is_the_better_completions_mean_loss_per_token() -> None:
    """One group, right completion of 3 tokens: nll adds 2 * its mean negative log-probability, nothing of the wrong."""
    model, group = make_model("qwen2").eval(), a_group([3, 9], [1.0, 0.0], 1)
    with torch.no_grad():
        plain = batch_loss(Objective(), Rewards(model, "logprob", 0.3), [group], "cpu").loss
        with_nll = batch_loss(Objective(nll=2.0), Rewards(model, "logprob", 0.3), [group], "cpu").loss
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


def test_a_batch_that_processes_cant_share_is_refused_with_what_to_do() -> None:
    """5 prompts for 2 processes; 64 for 2 of which there are 10 − 1; one prompt for 2."""
    for lengths, size, remedy in (
        (10, 5, "global_batch_size: 5 prompts can't be shared equally by 2 processes; use a multiple of 2, or"),
        (9, 64, "64 prompts, but there are 9 to train on, which can't .* 2 processes; set it to 8, or processes=1"),
        (1, 64, "there are 1 to train on.*give more prompts, or processes=1"),
    ):
        with pytest.raises(RecipeError, match=remedy):
            group_batches(np.arange(lengths), 1.0, size, seed=1, processes=2)


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
