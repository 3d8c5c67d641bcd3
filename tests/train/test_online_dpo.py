from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import DataError, ModelError, RunError
from align.core.records import Kind
from align.core.store import ModelRef, Table
from align.train.episode_file import pairs_of
from align.train.online_dpo import STAGE
from align.train.sft import STAGE as SFT
from reward.loading import template_hash
from reward.model import Card, Gate
from tests.train import steps
from tests.train.tiny import demonstrations, save_model

QUICK: dict[str, Any] = {
    "scorer": "verifier",
    "episodes": 2,
    "prompts_per_episode": 8,
    "samples_per_prompt": 6,
    "max_tokens": 40,
    "max_length": 128,
    "learning_rate": 1e-3,
    "global_batch_size": 4,
    "probe_prompts": 6,
    "max_score_drop": 101.0,
    "max_family_drop": 101.0,
}


def prompts(count: int, dev: int = 6) -> list[dict[str, Any]]:
    """Sums with their answers; the last ones are of the dev split."""
    rows = []
    for i, row in enumerate(demonstrations(count)):
        a, b = i % 7, (3 * i) % 11
        asked = {name: row[name] for name in ("prompt_id", "prompt")}
        split = "dev" if i >= count - dev else "train"
        rest = {"split": split, "source": "test", "task": "math", "family": "odd" if a % 2 else "even"}
        rows.append(asked | rest | {"reference": json.dumps({"answer": str(a + b)})})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers sums in the right form and often wrongly, so that samples of one prompt differ."""
    folder = tmp_path_factory.mktemp("trained")
    save_model(folder / "base")
    given = {
        "model": steps.policy(folder / "base"),
        "demonstrations": steps.table(folder / "d.parquet", demonstrations(24)),
    }
    settings = {"learning_rate": 1e-2, "epochs": 20.0, "global_batch_size": 8, "max_length": 128, "min_lr_ratio": 0.3}
    steps.run(SFT, folder / "sft", given, settings)
    return folder / "sft" / "model"


@pytest.fixture
def inputs(trained: Path, tmp_path: Path) -> dict[str, Table | ModelRef]:
    return {"policy": steps.policy(trained), "prompts": steps.table(tmp_path / "prompts.parquet", prompts(30))}


def episodes(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of each episode; of those with a pair the first one's ids and figures beside them."""
    found = [pq.read_table(path).to_pylist() for path in sorted((folder / "episodes").glob("*.parquet"))]
    for row in (row for rows in found for row in rows if row["pairs"]):
        row |= row["pairs"][0] | pairs_of([row])[0]
    return found


def test_an_episode_pairs_the_best_with_the_worst_of_the_policy_s_own_samples(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    summary, progress = steps.run(STAGE, tmp_path / "online", inputs, QUICK)
    first, second = episodes(tmp_path / "online")
    assert [row["prompt_id"] for row in first] != [row["prompt_id"] for row in second]
    paired = [row for row in first + second if row["outcome"] == "paired"]
    assert len(paired) == summary["pairs"] > 0
    tokenizer = AutoTokenizer.from_pretrained(inputs["policy"].path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in paired:
        assert len(row["rewards"]) == 6
        rewards = row["rewards"]
        assert (rewards[row["chosen"]], rewards[row["rejected"]]) == (max(rewards), min(rewards)) == (1, 0)
        assert row["chosen_ids"][-1] == end
    assert {row["policy_step"] for row in first} == {0}
    assert {row["policy_step"] for row in second} == {summary["episodes"][0]["steps"]}
    lines = steps.curves(tmp_path / "online")
    looks = [line for line in lines if "heldout/score" in line]
    assert [line["episode"] for line in looks] == [0, 1, 2]
    assert {"heldout/score/even", "heldout/score/odd", "heldout/kl", "heldout/gap", "heldout/length"} <= set(looks[0])
    assert looks[0]["heldout/kl"] == pytest.approx(0, abs=1e-4)
    assert max(line["heldout/gap"] for line in looks) < 1e-4
    assert looks[2]["heldout/kl"] != 0
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, summary["steps"] + 1))
    assert any(line.startswith("episode 2: held-out score") for line in progress.said)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (inputs["policy"].path, tmp_path / "online/model")
    )
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_reference_log_probabilities_are_those_of_the_frozen_start_in_every_episode(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    steps.run(STAGE, tmp_path / "online", inputs, QUICK)
    row = next(row for row in episodes(tmp_path / "online")[1] if row["outcome"] == "paired")
    start = TransformersEngine(inputs["policy"].path, device="cpu")
    for side in ("chosen", "rejected"):
        by_engine = sum(start.score([row["prompt_ids"]], [row[f"{side}_ids"]])[0])
        assert row[f"ref_{side}_logps"] == pytest.approx(by_engine, abs=1e-3)


def test_with_adapters_the_reference_is_the_policy_without_them(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    settings = QUICK | {"lora_rank": 4, "learning_rate": 1e-2}
    steps.run(STAGE, tmp_path / "online", inputs, settings)
    row = next(row for row in episodes(tmp_path / "online")[1] if row["outcome"] == "paired")
    start = TransformersEngine(inputs["policy"].path, device="cpu")
    by_engine = sum(start.score([row["prompt_ids"]], [row["chosen_ids"]])[0])
    assert row["ref_chosen_logps"] == pytest.approx(by_engine, abs=1e-3)


def test_an_episode_after_which_a_guard_objects_leaves_no_trace_in_the_weights(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    """At this learning rate the model forgets all; the samples' length or the score tells, and the start comes back."""
    settings = QUICK | {"learning_rate": 1.0, "max_kl": 1.0, "max_score_drop": 5.0, "max_grad_norm": 0.0}
    summary, progress = steps.run(STAGE, tmp_path / "online", inputs, settings)
    assert summary["rolled_back"] == [1, 2]
    assert all(record["rolled_back"] for record in summary["episodes"])
    assert len(summary["warnings"]) == 2
    assert sum("rolled back" in line for line in progress.said) == 2
    before = AutoModelForCausalLM.from_pretrained(inputs["policy"].path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "online" / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_run_can_stop_at_the_first_roll_back(inputs: dict[str, Table | ModelRef], tmp_path: Path) -> None:
    settings = QUICK | {"learning_rate": 1.0, "max_kl": 1.0, "max_score_drop": 5.0, "after_rollback": "stop"}
    summary, _ = steps.run(STAGE, tmp_path / "online", inputs, settings | {"max_grad_norm": 0.0})
    assert (summary["rolled_back"], len(summary["episodes"])) == ([1], 1)


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="sampler and trainer disagree"):
        steps.run(STAGE, tmp_path / "online", inputs, QUICK | {"max_sampler_gap": 1e-12})


def test_no_pair_in_any_episode_is_an_error_that_says_what_became_of_the_prompts(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"no episode gave a pair.*8 none_chosen"):
        steps.run(STAGE, tmp_path / "online", inputs, QUICK | {"max_tokens": 2})  # every completion is cut off


def test_a_scorer_that_needs_a_reward_model_is_refused_without_one(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="scorer is mix and no reward_model was given"):
        steps.run(STAGE, tmp_path / "online", inputs, QUICK | {"scorer": "mix"})


def reward_model(trained: Path, folder: Path, gates: dict[str, Gate] | None = None) -> ModelRef:
    """The policy itself as a reward model: the log-probability of a completion."""
    AutoModelForCausalLM.from_pretrained(trained).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(folder)
    Card("logprob", 0.3, gates, "base", template_hash(tokenizer)).write(folder)
    return ModelRef(str(folder), Kind.REWARD_MODEL, "reward", "2")


def test_the_reward_model_picks_best_and_worst_and_its_gate_is_heard(
    inputs: dict[str, Table | ModelRef], trained: Path, tmp_path: Path
) -> None:
    gates = {"even": Gate(-1e9, 1e9, 0.0), "odd": Gate(None, None, 0.0, closed="too few")}
    given = inputs | {"reward_model": reward_model(trained, tmp_path / "reward", gates)}
    settings = QUICK | {"scorer": "reward_model", "episodes": 1}
    summary, _ = steps.run(STAGE, tmp_path / "online", given, settings)
    rows = episodes(tmp_path / "online")[0]
    assert {row["outcome"] for row in rows if row["family"] == "odd"} <= {"abstained", "none_chosen", "too_few"}
    paired = [row for row in rows if row["outcome"] == "paired"]
    assert {row["family"] for row in paired} == {"even"}
    start = TransformersEngine(str(trained), device="cpu")
    for row in paired:
        best = 0.3 * sum(start.score([row["prompt_ids"]], [row["chosen_ids"]])[0])
        worst = 0.3 * sum(start.score([row["prompt_ids"]], [row["rejected_ids"]])[0])
        assert row["margin"] == pytest.approx(best - worst, abs=1e-3)
        assert worst == pytest.approx(min(row["rewards"]), abs=1e-3)
    assert summary["episodes"][0]["probe"]["reward"] < 0


def test_under_mix_only_what_no_verifier_decides_goes_to_the_reward_model(
    inputs: dict[str, Table | ModelRef], trained: Path, tmp_path: Path
) -> None:
    rows = prompts(30)
    for row in rows[::2]:
        row["task"], row["reference"] = None, None
    given = inputs | {
        "reward_model": reward_model(trained, tmp_path / "reward"),
        "prompts": steps.table(tmp_path / "mixed.parquet", rows),
    }
    steps.run(STAGE, tmp_path / "online", given, QUICK | {"scorer": "mix", "episodes": 1, "prompts_per_episode": 24})
    numbers = {row["prompt_id"]: i for i, row in enumerate(rows)}
    for row in episodes(tmp_path / "online")[0]:
        assert row["scorer"] == ("verifier" if numbers[row["prompt_id"]] % 2 else "reward_model")


def test_prompts_without_a_right_answer_are_sampled_again(inputs: dict[str, Table | ModelRef], tmp_path: Path) -> None:
    settings = QUICK | {"samples_per_prompt": 2, "resample": 5, "episodes": 1}
    steps.run(STAGE, tmp_path / "online", inputs, settings)
    counts = set()
    for row in episodes(tmp_path / "online")[0]:
        first_two = max(row["rewards"][:2])
        assert len(row["rewards"]) == (2 if first_two == 1 else 7)
        counts.add(len(row["rewards"]))
    assert 7 in counts


def test_pairs_that_are_too_long_are_counted_or_refused(inputs: dict[str, Table | ModelRef], tmp_path: Path) -> None:
    settings = QUICK | {"episodes": 1, "max_length": 46, "prompts_per_episode": 24}
    summary, _ = steps.run(STAGE, tmp_path / "online", inputs, settings)
    assert summary["episodes"][0]["outcomes"]["too_long"] > 0
    with pytest.raises(DataError, match=r"its pair has \d+ tokens, max_length is 46"):
        steps.run(STAGE, tmp_path / "other", inputs, settings | {"too_long": "error"})


def test_without_a_dev_split_some_prompts_are_set_aside_and_never_trained_on(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    given = inputs | {"prompts": steps.table(tmp_path / "all_train.parquet", prompts(30, dev=0))}
    summary, _ = steps.run(STAGE, tmp_path / "online", given, QUICK | {"episodes": 1, "prompts_per_episode": 99})
    assert summary["probe_split"] == "train"
    assert len(episodes(tmp_path / "online")[0]) == 27  # 30 less the tenth set aside
