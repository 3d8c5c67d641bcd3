"""The recipes that users copy, run with the shipped tiny model by overrides on the command line, as their heads say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from align.core.errors import RecipeError
from align.core.manifest import Manifest
from align.core.records import COLUMNS, Kind
from align.core.store import SHIPPED
from align.recipe import load_recipe
from reward.loading import template_hash
from reward.model import Card
from tests.e2e.command import align, jsonl, manifest, refused, rows

RECIPES = Path(__file__).parents[2] / "recipes"
QUESTIONS = [f"What is {a} plus {7 - a}?" for a in range(8)]
QUICK = "global_batch_size=4", "max_length=128"


def run(recipe: str, out: Path, *overrides: str) -> dict[str, Manifest]:
    """Runs a shipped recipe and gives its steps' manifests."""
    align("run", RECIPES / f"{recipe}.yaml", *overrides, "--out", out)
    return {step: manifest(out / step) for step in load_recipe(RECIPES / f"{recipe}.yaml", overrides, out).steps}


def with_settings(step: str, *settings: str) -> list[str]:
    return [f"steps.{step}.with.{setting}" for setting in settings]


def pairs(folder: Path) -> Path:
    return jsonl(folder / "pairs.jsonl", [{"prompt": q, "chosen": "It is 7.", "rejected": "No."} for q in QUESTIONS])


def test_sft_yaml_takes_any_model_and_data(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", [{"instruction": q, "output": "It is 7."} for q in QUESTIONS])
    done = run("sft", tmp_path / "run", "steps.sft.in.model=tiny", f"steps.sft.in.demonstrations={data}",
               *with_settings("sft", *QUICK, "lora_rank=4"))  # fmt: skip
    assert done["sft"].summary["steps"] == 4  # 8 rows in batches of 4, 2 epochs
    assert done["sft"].settings["learning_rate"] == 7e-6
    assert done["sft"].inputs["model"].name == "tiny"


def test_dpo_yaml_takes_any_policy_and_preferences(tmp_path: Path) -> None:
    done = run("dpo", tmp_path / "run", "steps.dpo.in.policy=tiny", f"steps.dpo.in.preferences={pairs(tmp_path)}",
               *with_settings("dpo", *QUICK))  # fmt: skip
    assert done["dpo"].summary["steps"] == 2


def test_the_recipes_follow_each_other_from_sft_by_a_reward_model_to_online_dpo(tmp_path: Path) -> None:
    """The SFT policy gives two answers, so that its samples differ and there is something to prefer."""
    both = [{"prompt": q, "completion": answer} for q in QUESTIONS for answer in ("It is 7.", "No.")]
    run("sft", tmp_path / "a", "steps.sft.in.model=tiny",
        f"steps.sft.in.demonstrations={jsonl(tmp_path / 'd.jsonl', both)}",
        *with_settings("sft", *QUICK, "learning_rate=1e-3", "epochs=8"))  # fmt: skip
    policy = tmp_path / "a" / "sft"
    run("reward", tmp_path / "b", f"steps.reward.in.model={policy}",
        f"steps.reward.in.completions={pairs(tmp_path)}",
        *with_settings("reward", *QUICK, "held_out_share=0.25", "learning_rate=1e-4"))  # fmt: skip
    asked = jsonl(tmp_path / "q.jsonl", [{"question": q, "answer": "It is 7.\n#### 7"} for q in QUESTIONS])
    done = run("online_dpo", tmp_path / "c", f"engines.policy={policy}", f"steps.prompts.with.source={asked}",
               "steps.prompts.with.dev=0", "steps.prompts.with.test=0",
               f"steps.online.in.reward_model={tmp_path / 'b' / 'reward'}",
               *with_settings("online", *QUICK, "episodes=1", "samples_per_prompt=4", "max_tokens=16",
                              "scorer=reward_model", "probe_prompts=0"),
               *with_settings("before", "split=all", "max_tokens=8"),
               *with_settings("after", "split=all", "max_tokens=8"))  # fmt: skip
    assert done["online"].summary["steps"] >= 1
    assert done["after"].engines["policy"].name == "online"


@pytest.mark.slow
def test_qwen2_online_yaml_runs_from_its_prompts_to_the_evaluation_with_tiny_models(tmp_path: Path) -> None:
    """Every setting of the recipe but the sizes; the merging optimizer and the second reward model with it."""
    for name, coef in (("first", 0.3), ("second", 0.1)):  # the policy's own likelihood stands for a reward model
        shutil.copytree(SHIPPED["tiny"], tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        Card("logprob", coef, None, "tiny", template_hash(tokenizer)).write(tmp_path / name)
    kinds = {"math": "math", "code": "code", "general": "format", "benign": "benign", "harmful": "harmful"}
    sources = [
        f"steps.{step}.with.source={json.dumps({'tiny': {'families': {family: 12}, 'seed': 41, 'answers': True}})}"
        for step, family in kinds.items()
    ]
    held_out = {"tiny": {"families": {"math": 4}, "split": "test", "seed": 42}}
    none = jsonl(tmp_path / "none.jsonl", [{"prompt": "Copy these words: sun, sea."}])
    done = run("qwen2_online", tmp_path / "run", "engines.policy=tiny", *sources,
               *(f"steps.{step}.with.reference_from=null" for step in ("math", "code", "heldout")),
               *(f"steps.{step}.with.dev=0.3" for step in kinds), *with_settings("general", "deduplicate=exact"),
               f"steps.heldout.with.source={json.dumps(held_out)}", f'steps.clean.with.against=["{none}"]',
               f"steps.online.in.reward_model={tmp_path / 'first'}", "steps.online.in.base=tiny-writer",
               f"steps.online.in.second_reward_model={tmp_path / 'second'}", "steps.after.engines.policy=step:online",
               *with_settings("online", *QUICK, "max_length=256", "episodes=1", "prompts_per_episode=8",
                              "samples_per_prompt=4", "max_tokens=32", "probe_prompts=12"),
               *with_settings("before", "max_tokens=16"), *with_settings("after", "max_tokens=16"))  # fmt: skip
    probe = done["online"].summary["episodes"][0]["probe"]
    assert {"score", "benign", "harmful", "reward", "second_reward", "length", "kl", "gap"} <= set(probe)
    assert done["online"].settings["merging"] == "ondare"
    assert done["after"].engines["policy"].name == "online"


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_gsm8k_yaml_runs_on_a_slice_of_the_real_training_file_with_the_tiny_model(tmp_path: Path) -> None:
    """The tiny model solves none of the problems, so all that is learned from are the reference solutions."""
    real = Path(os.environ["ALIGN_TEST_DATA"], "gsm8k", "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    data = jsonl(tmp_path / "train.jsonl", [json.loads(line) for line in real])
    short = [f"steps.{step}.with.max_tokens=32" for step in ("before", "after_sft", "after_dpo", "tag", "reject")]
    done = run("gsm8k", tmp_path / "run", "engines.model=tiny", f"steps.prompts.with.source={data}", *short,
               *with_settings("tag", "attempts=2", "max_error_share=1"),
               *with_settings("ontology", "min_count=1", "min_support=2"),
               *with_settings("select", "count=40"), *with_settings("reject", "samples=4"),
               *with_settings("sft", "global_batch_size=1"), *with_settings("dpo", "global_batch_size=1"))  # fmt: skip
    assert list(done) == [
        "prompts", "before", "tag", "ontology", "select", "reject", "demonstrate", "sft", "pair", "dpo",
        "after_sft", "after_dpo",
    ]  # fmt: skip
    kinds = {
        "prompts": Kind.PROMPTS, "tag": Kind.PROMPTS, "ontology": Kind.ONTOLOGY, "select": Kind.PROMPTS,
        "reject": Kind.COMPLETIONS, "demonstrate": Kind.DEMONSTRATIONS, "pair": Kind.PREFERENCES,
        "after_dpo": Kind.COMPLETIONS,
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {step: rows(tmp_path / "run" / step) for step in kinds}
    for step, kind in kinds.items():
        assert set(COLUMNS[kind]) <= set(found[step][0]), step
        assert done[step].rows == len(found[step]), step

    gold = {json.loads(line)["question"]: json.loads(line)["answer"] for line in real}
    assert [row["prompt"][0]["content"] for row in found["prompts"]] == list(gold)
    train = {row["prompt_id"] for row in found["prompts"] if row["split"] == "train"}
    assert 40 < len(train) < 60 and len(found["tag"]) == 60
    tagged = {row["prompt_id"] for row in found["tag"] if row["tags"]}
    assert {row["prompt_id"] for row in found["select"]} <= train & tagged
    assert len(found["reject"]) == 4 * len(found["select"])

    right = sum(row["verdict"] == "passed" and row["kept"] for row in found["reject"])
    answers = [row for row in found["demonstrate"] if row["generator"] == "answer"]
    assert len(answers) == len(found["select"]) and len(found["demonstrate"]) == len(answers) + right
    assert all(row["completion"][0]["content"] == gold[row["prompt"][0]["content"]] for row in answers)
    assert found["pair"] and all(row["margin"] > 0 for row in found["pair"])
    assert {row["chosen"][0]["content"] for row in found["pair"] if row["generator"] == "answer"} <= set(gold.values())
    assert done["sft"].summary["steps"] >= 2
    assert done["dpo"].inputs["policy"].fingerprint and (tmp_path / "run" / "dpo" / "model" / "config.json").is_file()
    assert {row["prompt_id"] for row in found["after_dpo"]}.isdisjoint(train)
    assert done["after_dpo"].engines["policy"].name == "dpo"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_model_is_named_once_where_inputs_name_the_engine(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "gsm8k.yaml", ["engines.model=tiny"])
    assert recipe.steps["sft"].inputs["model"][0].spec == "tiny"
    assert recipe.steps["reject"].engines["sampler"].model.spec == "tiny"

    file = tmp_path / "r.yaml"
    file.write_text(
        "engines:\n  served: {kind: 'tests.fakes:SCRIPTED', model: gpt}\n"
        "steps:\n  sft: {stage: sft, in: {model: served, demonstrations: owner/name}}\n"
    )
    with pytest.raises(RecipeError, match=r"steps\.sft\.in\.model: the engine 'served' asks a server"):
        load_recipe(file)


def test_a_shipped_recipe_whose_hub_model_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = jsonl(tmp_path / "d.jsonl", [{"instruction": q, "output": "It is 7."} for q in QUESTIONS])
    said = refused("run", RECIPES / "sft.yaml", "steps.sft.in.model=nobody/nothing-here",
                   f"steps.sft.in.demonstrations={data}", "--out", tmp_path / "run")  # fmt: skip
    assert "nobody/nothing-here" in said
