"""A reward model saved, loaded again and merged gives the same scores; one whose head was never trained is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.errors import ModelError
from align.core.records import Kind
from align.core.store import ModelRef
from reward.members import EnsembleCard, Member, load_judge
from reward.model import Card, load_reward_model
from reward.train import Config, _save, new_reward_model
from tests.reward.test_model import ITEMS
from tests.train.steps import policy
from tests.train.tiny import make_model, make_tokenizer, save_model


def shaken(judge: Any) -> Any:
    """The model with all that is trained moved a little, as a training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in judge.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    judge.model.eval()
    return judge


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "scalar"},
        {"head": "logprob"},
        {"head": "scalar", "lora_rank": 2},
        {"head": "scalar", "lora_rank": 2, "save_merged": False},
        {"head": "logprob", "lora_rank": 2, "save_merged": False},
    ],
    ids=["scalar", "logprob", "merged", "adapters", "logprob adapters"],
)
def test_a_saved_model_scores_as_before_by_itself_and_in_an_ensemble(tmp_path: Path, settings: dict[str, Any]) -> None:
    """An ensemble of a model and itself has the mean of equal scores."""
    save_model(tmp_path / "policy")
    config = Config(**settings)
    judge = shaken(new_reward_model(config, policy(tmp_path / "policy"), 0))
    before = judge.score_many(ITEMS)
    _save(config, judge, tmp_path / "rm")
    assert load_reward_model(tmp_path / "rm").score_many(ITEMS) == pytest.approx(before, abs=1e-4)
    member = Member(str(tmp_path / "rm"), "rm")
    EnsembleCard((member, member)).write(tmp_path / "both")
    ref = ModelRef.open(tmp_path / "both", Kind.REWARD_MODEL)
    assert load_judge(ref).score_many(ITEMS) == pytest.approx(before, abs=1e-4)


def test_a_head_that_was_never_trained_is_refused_under_adapters_and_in_an_ensemble(tmp_path: Path) -> None:
    """A policy, a policy's adapters, and adapters of a reward model that lost their head."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    save_model(tmp_path / "policy")
    tuned = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "policy")
    tuned.save_pretrained(tmp_path / "adapters")
    make_tokenizer().save_pretrained(tmp_path / "adapters")

    config = Config(lora_rank=2, save_merged=False)
    _save(config, shaken(new_reward_model(config, policy(tmp_path / "policy"), 0)), tmp_path / "lost")
    file = tmp_path / "lost" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file, {"format": "pt"})

    for name in ("policy", "adapters", "lost"):
        with pytest.raises(ModelError, match=r"score\.weight.*random"):
            load_reward_model(tmp_path / name)
        EnsembleCard((Member(str(tmp_path / name), name),)).write(tmp_path / f"of-{name}")
        with pytest.raises(ModelError, match=r"score\.weight.*random"):
            load_judge(tmp_path / f"of-{name}")


def test_a_card_is_of_one_model_or_of_several(tmp_path: Path) -> None:
    Card().write(tmp_path)
    assert EnsembleCard.read(tmp_path / "reward_model.json") is None
    (tmp_path / "reward_model.json").write_text(json.dumps({"members": [{"path": "x"}], "gates": None}))
    with pytest.raises(ModelError, match="not an ensemble's card"):
        EnsembleCard.read(tmp_path / "reward_model.json")
