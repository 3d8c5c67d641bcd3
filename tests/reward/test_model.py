"""Loading and scoring, with real (random, tiny) models of several architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.chat import prompt_ids
from align.core.errors import DataError, ModelError
from reward.loading import distinct_pad_id, template_hash
from reward.model import Card, Gate, RewardModel, load_reward_model
from tests.train.tiny import FAMILIES, make_model, make_tokenizer, save_model


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ITEMS: list[Any] = [
    (asked("What is 3 plus 4?"), said("The answer is 7.")),
    (asked("What?"), said("Yes.")),
    (asked("What is 3 plus 4? " * 3), said("The answer is 7. " * 4)),
    (asked("What is 3 plus 4?"), said("No")),
]


def save_scalar(folder: Path, family: str = "qwen2") -> Path:
    """A policy with a random scalar head and a card, as the stage writes one."""
    from transformers import AutoModelForSequenceClassification

    save_model(folder / "policy", family)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    tokenizer = make_tokenizer(family)
    model.config.pad_token_id = distinct_pad_id(tokenizer)
    model.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    Card("scalar", 1.0, None, "policy", template_hash(tokenizer)).write(folder / "rm")
    return folder / "rm"


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "gemma"])
def test_scalar_scores_are_read_off_the_end_of_turn_token_whatever_is_padded(tmp_path: Path, family: str) -> None:
    """The head's weight times the last hidden state, computed here one sequence at a time without padding."""
    judge = load_reward_model(save_scalar(tmp_path, family))
    end = judge.tokenizer.convert_tokens_to_ids(FAMILIES[family][-1])
    expected = []
    for ids, _ in judge.encode(ITEMS):
        assert ids[-1] == end
        with torch.no_grad():
            hidden = judge.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(float(judge.model.score.weight[0].detach() @ hidden))
    assert judge.score_many(ITEMS) == pytest.approx(expected, abs=1e-4)
    assert [judge.score_many([item])[0] for item in ITEMS] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_logprob_scores_are_the_completions_summed_log_probabilities(tmp_path: Path, family: str) -> None:
    """0.3 times the sum, computed here token by token from the full logits of one unpadded sequence."""
    save_model(tmp_path, family)
    tokenizer = make_tokenizer(family)
    Card("logprob", 0.3, None, "policy", template_hash(tokenizer)).write(tmp_path)
    judge = load_reward_model(tmp_path)
    policy = make_model(family).eval()
    expected = []
    for (prompt, _), (ids, _) in zip(ITEMS, judge.encode(ITEMS), strict=True):
        with torch.no_grad():
            logps = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(prompt_ids(judge.tokenizer, prompt))
        expected.append(0.3 * sum(float(logps[i - 1, ids[i]]) for i in range(start, len(ids))))
    assert judge.score_many(ITEMS) == pytest.approx(expected, abs=1e-3)


def test_ids_of_prompt_and_completion_score_as_the_messages_they_come_from(tmp_path: Path) -> None:
    judge = load_reward_model(save_scalar(tmp_path))
    as_ids: list[Any] = []
    for (prompt, _), (ids, _) in zip(ITEMS, judge.encode(ITEMS), strict=True):
        start = len(prompt_ids(judge.tokenizer, prompt))
        as_ids.append((ids[:start], ids[start:]))
    assert judge.score_many(as_ids) == pytest.approx(judge.score_many(ITEMS))
    cut = (as_ids[0][0], as_ids[0][1][:-1])
    assert judge.score_many([cut])[0] != pytest.approx(judge.score_many(ITEMS)[0], abs=1e-4)


def test_empty_and_half_encoded_pairs_are_refused(tmp_path: Path) -> None:
    judge = load_reward_model(save_scalar(tmp_path))
    with pytest.raises(DataError, match="pair 0 has an empty"):
        judge.score_many([(asked("x"), [])])
    with pytest.raises(DataError, match="half messages"):
        judge.score_many([(asked("x"), [1, 2])])


def test_a_policy_without_a_head_is_refused_instead_of_scoring_at_random(tmp_path: Path) -> None:
    save_model(tmp_path)
    with pytest.raises(ModelError, match=r"score\.weight.*random"):
        load_reward_model(tmp_path)


def test_a_missing_model_and_one_with_two_outputs_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(ModelError, match="can't be loaded"):
        load_reward_model(tmp_path / "nothing")
    save_model(tmp_path / "policy")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=2)
    model.save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="2 outputs"):
        load_reward_model(tmp_path / "two")


def test_a_changed_chat_template_and_a_broken_card_are_refused(tmp_path: Path) -> None:
    folder = save_scalar(tmp_path)
    tokenizer = make_tokenizer("llama")
    card = Card.read(folder / "reward_model.json")
    replace(card, template=template_hash(tokenizer)).write(folder)
    with pytest.raises(ModelError, match="chat template was changed"):
        load_reward_model(folder)
    (folder / "reward_model.json").write_text('{"head": "scalar"}')
    with pytest.raises(ModelError, match="not a reward model's card"):
        load_reward_model(folder)


def test_a_hub_reward_model_reads_its_own_template_to_its_very_end(tmp_path: Path) -> None:
    """Without a card the ids are those of the whole rendering, the newline after the turn included, and no gate."""
    folder = save_scalar(tmp_path)
    ours = load_reward_model(folder)
    (folder / "reward_model.json").unlink()
    theirs = load_reward_model(folder)
    text = theirs.tokenizer.apply_chat_template(ITEMS[0][0] + ITEMS[0][1], tokenize=False)
    ids = theirs.encode(ITEMS[:1])[0][0]
    assert text.endswith("<|im_end|>\n")
    assert ids == theirs.tokenizer(text)["input_ids"]
    assert theirs.score_many(ITEMS[:1]) != pytest.approx(ours.score_many(ITEMS[:1]), abs=1e-4)
    assert theirs.judge_group("anything", [0.0, 1.0]) == (1, 0)


def test_cards_come_back_as_they_were_written(tmp_path: Path) -> None:
    gates = {"math": Gate(1.25, -0.5, 0.5), "code": Gate(None, -1.0, 0.5, "too few")}
    card = Card("logprob", 0.3, gates, "sft", "abc")
    card.write(tmp_path)
    assert Card.read(tmp_path / "reward_model.json") == card


def judge_with(gates: dict[str, Gate] | None) -> RewardModel:
    return RewardModel(None, None, Card(gates=gates))


def test_the_gate_accepts_only_a_high_best_a_low_worst_and_a_wide_gap() -> None:
    judge = judge_with({"math": Gate(best_above=1.0, worst_below=0.0, gap=1.5)})
    assert judge.judge_group("math", [-1.0, 0.5, 2.0]) == (2, 0)
    assert judge.judge_group("math", [-1.0, 0.9]) is None, "the best is too low"
    assert judge.judge_group("math", [0.0, 2.0]) is None, "the worst is too high"
    assert judge.judge_group("math", [-0.4, 1.1]) is None, "the gap is too narrow"
    assert judge.judge_group("code", [-9.0, 9.0]) is None, "the family was never calibrated"
    assert judge.judge_group("math", [float("nan"), 2.0]) is None
    assert judge.n_judged["math"] == 5
    assert judge.n_abstain == {"math": 4, "code": 1}
    assert judge.accepts("math", 1.0)
    assert not judge.accepts("math", 0.99)
    assert not judge.accepts("code", 9.0)


def test_a_closed_gate_accepts_nothing_and_no_gate_all_but_ties() -> None:
    closed = judge_with({"math": Gate(1.0, 0.0, 0.5, closed="it does harm")})
    assert closed.judge_group("math", [-9.0, 9.0]) is None
    assert not closed.accepts("math", 9.0)
    free = judge_with(None)
    assert free.judge_group("math", [0.1, 0.2]) == (1, 0)
    assert free.judge_group("math", [0.2, 0.2]) is None
    assert free.judge_group("math", [0.2]) is None


def test_the_pad_token_is_never_the_end_token() -> None:
    tokenizer = make_tokenizer("qwen2")
    assert distinct_pad_id(tokenizer) == tokenizer.pad_token_id
    import copy

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert distinct_pad_id(same) != same.eos_token_id
