"""A prompt's tools are before a reward model when it scores as they were when it was trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from align.core.engines.base import Completion
from align.core.errors import DataError
from align.core.stage import Tools
from align.train import scoring as online
from data_synthesis.rankers import Group as Ranked
from data_synthesis.rankers import RewardRanker
from reward import ensemble
from reward.comparisons import Group, groups_on_disk
from reward.fit import judge_groups
from reward.loading import template_hash
from reward.model import Card, RewardModel, load_reward_model
from reward.scoring import scored
from tests.core.shapes import tokenizer_of
from tests.reward.test_classifiers import save_bert
from tests.reward.test_model import asked, said
from tests.train.steps import Silent

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TEXTS = ["It is warm.", "No"]


@pytest.fixture
def judge() -> RewardModel:
    """A random scalar reward model whose chat template shows tools and calls."""
    tokenizer = tokenizer_of("qwen2.5")
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return RewardModel(model, tokenizer, Card(template=template_hash(tokenizer)))


def test_rows_with_tools_score_in_every_stage_as_they_did_in_training(judge: RewardModel, tmp_path: Path) -> None:
    """Training reads `groups_on_disk`; `score` and `reward-bench`, `ensemble`, `rank` and online DPO read rows."""
    prompt, tools = asked("Is it warm?"), json.dumps([WEATHER])
    groups = [
        Group(prompt, "f", held_out, True, [said(text) for text in TEXTS], [1.0, 0.0], [1, 1], tools)
        for held_out in (False, True)
    ]
    _, held_out = groups_on_disk(tmp_path / "groups", iter(groups), judge.tokenizer, 3, 512, Counter())
    expected = pytest.approx(judge_groups(judge, held_out)[0].scores, abs=1e-5)
    assert judge.score_many([(prompt, said(text)) for text in TEXTS]) != expected, "the tools matter here"

    rows = [{"prompt": prompt, "completion": said(text), "tools": tools, "family": "f"} for text in TEXTS]
    given = Tools(seed=0, engines={}, progress=Silent(), work=tmp_path, out=tmp_path)
    assert [rewards[0] for _, rewards in scored(judge, rows, ["completion"], given, Counter())] == expected
    assert ensemble._scores(judge, groups[:1]) == expected
    ranked, ranker = Ranked.of(rows), RewardRanker(judge, "rm")
    ranker.rank([ranked])
    assert ranked.scores[ranker.name] == expected
    scorer: Any = SimpleNamespace(same_ids=False, reward_model=judge)
    sampled = online.Group(rows[0], [1], [Completion(text, (1,), "stop") for text in TEXTS])
    assert online.Scorer.rewards(scorer, [sampled])[0] == expected


def test_a_foreign_classifiers_template_is_given_tools_and_calls_as_objects(judge: RewardModel, tmp_path: Path) -> None:
    """A call's arguments are JSON text in OpenAI's files; the template would print such a text in quotes."""
    judge.card = Card()
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    answer: Any = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]
    ((ids, _),) = judge.encode([(asked("Is it warm?"), answer, [WEATHER])])
    text = judge.tokenizer.decode(ids)
    assert '<tools>\n{"type": "function"' in text
    assert '"arguments": {"city": "Bonn"}' in text
    with pytest.raises(DataError, match="this prompt has tools"):
        load_reward_model(save_bert(tmp_path)).score_many([(asked("what"), said("yes"), [WEATHER])])
