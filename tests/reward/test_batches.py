"""Rewards of many completions at once: the flat layout against padded rows and against one completion alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.chat import IGNORED
from align.core.records import Kind
from align.core.store import ModelRef
from reward import batches
from reward.batches import Encoded, batch_rewards, batches_to_score, reads_flat
from reward.loading import Head
from reward.model import RewardModel
from reward.train import Config, new_reward_model
from tests.train.tiny import save_model


def encoded(prompts: int = 4, completions: int = 3) -> list[Encoded]:
    """Random ids: prompts of 2-9 tokens, completions of 1-8, out of order."""
    rng = random.Random(0)
    found: list[Encoded] = []
    for _ in range(prompts):
        prompt = [rng.randrange(5, 300) for _ in range(rng.randrange(2, 10))]
        for _ in range(completions):
            own = [rng.randrange(5, 300) for _ in range(rng.randrange(1, 9))]
            found.append((prompt + own, [IGNORED] * len(prompt) + own))
    rng.shuffle(found)
    return found


def judge(folder: Path, head: Head, family: str = "qwen2", rank: int = 0) -> RewardModel:
    save_model(folder, family)
    ref = ModelRef(str(folder), Kind.MODEL, "policy", "0")
    return new_reward_model(Config(head=head, lora_rank=rank), ref, seed=1)


def rewards(of: RewardModel, pairs: list[Encoded]) -> torch.Tensor:
    return batch_rewards(of.model, of.card.head, of.card.coef, pairs)


@pytest.mark.parametrize(
    ("head", "family", "rank"),
    [("scalar", "qwen2", 0), ("logprob", "qwen2", 0), ("scalar", "llama", 4), ("logprob", "qwen2_moe", 4)],
)
def test_flat_rewards_and_their_gradient_equal_those_of_padded_rows(
    tmp_path: Path, head: Head, family: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, with adapters too, and in the order in which the completions were given."""
    reward_model, pairs = judge(tmp_path, head, family, rank), encoded()
    assert reads_flat(reward_model.model)
    weights = torch.linspace(-1, 1, len(pairs))
    found, gradients = [], []
    for flat in (True, False):
        monkeypatch.setattr(batches, "reads_flat", lambda _, flat=flat: flat)
        reward_model.model.zero_grad()
        found.append(rewards(reward_model, pairs))
        (found[-1] @ weights).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in reward_model.model.parameters() if p.grad is not None]).clone()
        )
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert float(found[0].detach().std()) > 1e-3
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("flat", [True, False])
def test_a_scalar_reward_is_float32_whatever_the_model_is_computed_in(
    tmp_path: Path, rank: int, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards of 200 and more, where bfloat16 has whole numbers alone: none is one that bfloat16 has."""
    reward_model, pairs = judge(tmp_path, "scalar", rank=rank), encoded()
    monkeypatch.setattr(batches, "reads_flat", lambda _: flat)
    with torch.no_grad():
        scale = 200 / float(rewards(reward_model, pairs).abs().min())
        for name, weight in reward_model.model.named_parameters():
            if "score" in name:
                weight *= scale
        with torch.autocast("cpu", torch.bfloat16):
            found = [rewards(reward_model, pairs)]
        reward_model.model.to(torch.bfloat16)
        found.append(rewards(reward_model, pairs))
    for each in found:
        assert each.dtype == torch.float32
        assert float(each.abs().min()) > 128
        assert (each != each.bfloat16().float()).all()


@pytest.mark.parametrize("head", ["scalar", "logprob"])
def test_a_completion_scores_the_same_alone_and_among_others(tmp_path: Path, head: Head) -> None:
    reward_model, pairs = judge(tmp_path, head), encoded()
    together = reward_model.score_encoded(pairs)
    assert together == pytest.approx([reward_model.score_encoded([one])[0] for one in pairs], abs=1e-5, rel=1e-5)


def test_rows_padded_on_the_left_score_as_ours(tmp_path: Path) -> None:
    """Given to the model itself by hand: padding before the prompt, masked, positions counted from the first token."""
    reward_model, pairs = judge(tmp_path, "scalar"), encoded()
    longest, pad = max(len(ids) for ids, _ in pairs), reward_model.model.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one, _ in pairs])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one, _ in pairs])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        left = reward_model.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    assert reward_model.score_encoded(pairs) == pytest.approx(left.tolist(), abs=1e-5)


def test_a_sequence_without_labels_is_read_at_its_last_token(tmp_path: Path) -> None:
    reward_model = judge(tmp_path, "scalar")
    ids = [5, 17, 99, 30]
    with torch.no_grad():
        hidden = reward_model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = float(reward_model.model.score.weight[0] @ hidden)
    assert reward_model.score_encoded([(ids, [IGNORED] * 4)]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_batches_hold_every_completion_once_and_keep_their_bounds(
    tmp_path: Path, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 60 tokens: a prompt once where rows are flat, every row as long as its longest where they are not."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 60)
    monkeypatch.setattr(batches, "reads_flat", lambda _: flat)
    pairs = encoded(10, 3)
    found = list(batches_to_score(judge(tmp_path, "scalar").model, "scalar", pairs))
    assert sorted(place for places in found for place in places) == list(range(30))
    for places in found:
        if flat:
            prompts = {tuple(pairs[p][0][: pairs[p][1].count(IGNORED)]) for p in places}
            tokens = sum(map(len, prompts)) + sum(len(pairs[p][0]) - pairs[p][1].count(IGNORED) for p in places)
        else:
            tokens = len(places) * max(len(pairs[p][0]) for p in places)
        assert tokens <= 60
    assert len(found) < 20, "several prompts share a batch"


def test_a_model_saved_after_reading_flat_rows_loads_with_its_usual_attention(tmp_path: Path) -> None:
    reward_model: Any = judge(tmp_path / "policy", "scalar")
    assert reads_flat(reward_model.model)
    reward_model.model.save_pretrained(tmp_path / "saved")
    assert "align" not in (tmp_path / "saved" / "config.json").read_text()
