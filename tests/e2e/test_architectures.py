"""Every training stage on small random models of other families, from files as people have them, and sampling after it.

Each family comes with its own chat template and with demonstrations in another of the known forms. What is learned is
as small as the models: to answer 7, first as `#### 7`, then as `7` alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from align.core.records import Messages
from reward.model import load_reward_model
from tests.e2e.command import align, jsonl, manifest, refused, rows
from tests.train.tiny import FAMILIES, save_model

QUESTIONS = [f"What is {a} plus {7 - a}?" for a in range(8)]
FORMS = {
    "llama": lambda q, a: {"instruction": q, "input": "", "output": a},  # Alpaca
    "mistral": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},  # ShareGPT
    "gemma": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "qwen2_moe": lambda q, a: {"prompt": q, "completion": a},
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "Gemma2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}
pytestmark = pytest.mark.slow


@dataclass
class World:
    """A family's files and its fine-tuned model."""

    family: str
    folder: Path
    base: str

    @property
    def questions(self) -> Path:
        return jsonl(self.folder / "questions.jsonl", [{"question": q, "answer": "#### 7"} for q in QUESTIONS])

    @property
    def pairs(self) -> Path:
        return jsonl(
            self.folder / "pairs.jsonl", [{"prompt": q, "chosen": "7", "rejected": "#### 7"} for q in QUESTIONS]
        )

    def demonstrations(self, answer: str) -> Path:
        form: Any = FORMS[self.family]
        return jsonl(self.folder / f"{len(answer)}.jsonl", [form(question, answer) for question in QUESTIONS])

    def answers(self, policy: Path) -> list[str]:
        """What a policy answers greedily, by `align evaluate`."""
        out = self.folder / f"eval-{policy.name}"
        align("evaluate", f"prompts={self.questions}", f"policy={policy}", "split=all", "samples=0", "max_tokens=8",
              f"out={out}")  # fmt: skip
        found = rows(out)
        assert len(found) == len(QUESTIONS)
        assert all(row["finish_reason"] in ("stop", "length") and row["generator"] == policy.name for row in found)
        return [row["completion"][0]["content"].strip() for row in found if row["finish_reason"] == "stop"]


@pytest.fixture(scope="module", params=FORMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The family's random model, fine-tuned to answer `#### 7`."""
    folder = tmp_path_factory.mktemp(request.param)
    world = World(request.param, folder, save_model(folder / "base", request.param))
    align("sft", f"model={world.base}", f"demonstrations={world.demonstrations('#### 7')}", f"out={folder / 'sft'}",
          "learning_rate=1e-2", "epochs=60", "global_batch_size=8", "weight_decay=0", "warmup_ratio=0.1")  # fmt: skip
    return world


def curve(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_sft_learns_the_answer_and_where_it_ends_in_the_familys_own_template(world: World) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = world.folder / "sft"
    assert manifest(out).summary["steps"] == 60
    assert world.answers(out) == ["#### 7"] * len(QUESTIONS), "each one stopped at the end-of-turn token"
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert type(model).__name__ == CLASSES[world.family]
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(FAMILIES[world.family][5]) in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("merged", ["true", "false"])
def test_lora_teaches_another_answer_and_the_result_is_sampled_from_merged_or_as_adapters(
    world: World, merged: str
) -> None:
    out = world.folder / f"lora-{merged}"
    align("sft", f"model={world.folder / 'sft'}", f"demonstrations={world.demonstrations('7')}", "lora_rank=8",
          f"save_merged={merged}", "learning_rate=1e-2", "epochs=40", "global_batch_size=8", f"out={out}")  # fmt: skip
    assert (out / "model" / "adapter_config.json").exists() == (merged == "false")
    losses = curve(out, "loss")
    assert losses[-1] < losses[0] / 3
    assert world.answers(out) == ["7"] * len(QUESTIONS)


@pytest.mark.parametrize("rank", [0, 8])
def test_dpo_starts_at_its_reference_and_comes_to_prefer_the_chosen(world: World, rank: int) -> None:
    out = world.folder / f"dpo-{rank}"
    align("dpo", f"policy={world.folder / 'sft'}", f"preferences={world.pairs}", f"lora_rank={rank}",
          "learning_rate=1e-2", "epochs=12", "global_batch_size=8", "nll_weight=1", f"out={out}")  # fmt: skip
    margins = curve(out, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 1
    assert world.answers(out) == ["7"] * len(QUESTIONS)


@pytest.mark.parametrize(("head", "rank"), [("scalar", 0), ("scalar", 4), ("logprob", 0), ("logprob", 4)])
def test_a_reward_model_scores_the_chosen_higher_and_is_refused_as_a_policy(world: World, head: str, rank: int) -> None:
    out = world.folder / f"reward-{head}-{rank}"
    align("reward", f"model={world.folder / 'sft'}", f"completions={world.pairs}", f"head={head}", f"lora_rank={rank}",
          "learning_rate=1e-2", "epochs=8", "global_batch_size=4", "held_out_share=0.25", f"out={out}")  # fmt: skip
    model = load_reward_model(out / "model")
    question: Messages = [{"role": "user", "content": QUESTIONS[0]}]
    answers: list[Messages] = [[{"role": "assistant", "content": text}] for text in ("7", "#### 7")]
    chosen, rejected = model.score_many([(question, answer) for answer in answers])
    assert math.isfinite(chosen) and chosen > rejected
    said = refused("evaluate", f"prompts={world.questions}", f"policy={out}", f"out={world.folder / 'no'}")
    assert "is a reward model, a policy was expected" in said


def test_online_dpo_follows_the_reward_model(world: World) -> None:
    """Its reward model is that of pairs that prefer `7`; samples at a high temperature give it something to compare."""
    judge, out = world.folder / "judge", world.folder / "online"
    align("reward", f"model={world.folder / 'sft'}", f"completions={world.pairs}", "learning_rate=1e-2", "epochs=8",
          "global_batch_size=4", "held_out_share=0.25", f"out={judge}")  # fmt: skip
    align("online-dpo", f"policy={world.folder / 'sft'}", f"prompts={world.questions}", f"reward_model={judge}",
          "scorer=reward_model", "episodes=2", "samples_per_prompt=4", "temperature=1.5", "max_tokens=8",
          "learning_rate=1e-3", "global_batch_size=4", "probe_prompts=0", f"out={out}")  # fmt: skip
    assert manifest(out).summary["steps"] >= 1
    world.answers(out)
