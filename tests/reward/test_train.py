"""The stage from rows to a folder, with tiny random models: what it learns, keeps, saves and refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from align.core.errors import DataError, ModelError, RecipeError, RunError
from align.core.stage import Tools
from reward.fit import Speed, judge_groups
from reward.model import Card, load_reward_model
from reward.train import STAGE, Config, _check_parallel, check_saved, new_reward_model
from tests.train.kills import assert_survives_kills
from tests.train.ranks import assert_same_gradient, first_gradient, in_ranks
from tests.train.steps import Silent, curves, policy, run, table, weights
from tests.train.tiny import make_model, make_tokenizer, save_model

FAST = {"learning_rate": 1e-2, "epochs": 4.0, "global_batch_size": 8, "warmup_ratio": 0.0, "evaluations": 4}


def completions(prompts: int = 42) -> list[dict[str, Any]]:
    """Sums with one right and two wrong answers, something that a random model of two layers can learn to tell."""
    rows = []
    for i in range(prompts):
        said = [(f"The answer is {i % 7}.", "passed"), (f"hello world {i % 5}", "failed"), ("hello", "failed")]
        rows += [
            {
                "prompt_id": f"p{i}",
                "prompt": [{"role": "user", "content": f"What is {i % 7} plus 0?"}],
                "split": "dev" if i % 2 == 0 else "train",
                "family": "sums",
                "completion": [{"role": "assistant", "content": text}],
                "verdict": verdict,
                "reward": float(verdict == "passed"),
                "finish_reason": "stop",
                "sample_index": index,
            }
            for index, (text, verdict) in enumerate(said)
        ]
    return rows


def train(
    folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy").exists():
        save_model(folder / "policy")
    inputs = {"model": policy(folder / "policy"), "completions": table(folder / "rows.parquet", rows or completions())}
    summary, _ = run(STAGE, folder, inputs, FAST | settings, **more)
    return summary


@pytest.mark.parametrize("head", ["scalar", "logprob"])
def test_it_learns_to_prefer_right_completions_and_is_the_same_when_loaded(tmp_path: Path, head: str) -> None:
    """A random model likes short completions best, which the log-prob head takes more steps to unlearn."""
    summary = train(tmp_path, {"head": head, "epochs": 4.0 if head == "scalar" else 8.0})
    assert summary["overall"]["best_of_n"] == 1.0
    assert summary["overall"]["sampled"] == pytest.approx(1 / 3)
    assert summary["overall"]["oracle"] == 1.0
    assert summary["prompts"] == 21
    assert summary["held_out_prompts"] == 21
    judge = load_reward_model(tmp_path / "model")
    assert judge.card.head == head
    asked: Any = [{"role": "user", "content": "What is 3 plus 0?"}]
    texts = ["The answer is 3.", "hello world 3", "hello"]
    scores = judge.score_many([(asked, [{"role": "assistant", "content": text}]) for text in texts])
    assert max(scores) == scores[0]
    assert judge.judge_group("sums", scores) is not None, "well above and below its thresholds"
    assert judge.judge_group("another family", scores) is None
    lines = curves(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert [line["best_of_n"] for line in lines if "best_of_n" in line] == [
        one["best_of_n"] for one in summary["evaluations"]
    ]


def test_training_stops_when_best_of_n_no_longer_gets_better(tmp_path: Path) -> None:
    """Best-of-n can't pass 1: after reaching it two more evaluations are stale."""
    summary = train(tmp_path, {"head": "logprob", "epochs": 16.0, "evaluations": 8, "patience": 2})
    scores = [one["best_of_n"] for one in summary["evaluations"]]
    assert max(scores) == 1.0
    assert len(scores) == scores.index(1.0) + 3
    assert summary["overall"]["best_of_n"] == 1.0


def test_the_weights_of_the_best_evaluation_are_kept_and_of_equals_the_last(tmp_path: Path) -> None:
    """Evaluations of 0.5, 0.7, 0.7 and 0.6, the weights counting up: the third's are kept."""
    from accelerate import Accelerator

    from reward.checkpoint import State

    (tmp_path / "work").mkdir()
    tools = Tools(seed=0, engines={}, progress=Silent(), work=tmp_path / "work", out=tmp_path)
    model = torch.nn.Linear(1, 1, bias=False)
    state = State(tools, model, torch.optim.AdamW(model.parameters()))
    stale = []
    for step, score in enumerate([0.5, 0.7, 0.7, 0.6]):
        torch.nn.init.constant_(model.weight, step)
        state.step = step
        state.note(score, Accelerator(cpu=True))
        stale.append(state.stale)
    state.restore_best()
    assert float(model.weight) == 2.0
    assert stale == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"head": "scalar"}),
        ("qwen2", {"head": "logprob", "nll": 0.7, "margin": 0.5}),
        ("qwen2_moe", {"router_loss_weight": 0.3}),
    ],
)
def test_a_global_batch_has_one_gradient_however_it_is_split(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """8 prompts at once; 3, 3 and 2; one by one; and 2 at a time in two gloo ranks of 4: the same to 1e-6."""

    def gradient(name: str, micro: int) -> list[torch.Tensor]:
        if not (tmp_path / name).exists():
            save_model(tmp_path / name / "policy", family)
        given = settings | {"max_grad_norm": 0.0}
        return first_gradient(lambda: train(tmp_path / name, given, speed={"micro_batch_size": micro}))

    whole = gradient("whole", 8)
    for micro in (3, 1):
        assert_same_gradient(gradient(str(micro), micro), whole)
    save_model(tmp_path / "ranks" / "policy", family)
    table(tmp_path / "ranks" / "rows.parquet", completions())
    for of_rank in in_ranks(lambda: gradient("ranks", 2), tmp_path / "said"):
        assert_same_gradient(of_rank, whole)


def test_two_processes_make_the_weights_of_one(tmp_path: Path) -> None:
    """Two steps, shared by two gloo ranks; one of them writes the model and each line of the curves once."""
    settings = {"epochs": 0.7, "evaluations": 1}
    train(tmp_path / "one", settings)
    save_model(tmp_path / "two" / "policy")
    table(tmp_path / "two" / "rows.parquet", completions())
    in_ranks(lambda: train(tmp_path / "two", settings), tmp_path / "said")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert [line["step"] for line in curves(tmp_path / "two")] == [0, 1, 2, 2]
    for ours, theirs in zip(curves(tmp_path / "one"), curves(tmp_path / "two"), strict=True):
        for figure in ("loss", "accuracy", "reward_better"):
            assert theirs.get(figure, 0.0) == pytest.approx(ours.get(figure, 0.0), abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """With LoRA too, where a frozen base would else cut the gradient off."""
    found = []
    for name, on in (("plain", False), ("saved", True)):
        settings = {"epochs": 0.4, "evaluations": 1, "lora_rank": 2}
        train(tmp_path / name, settings, speed={"gradient_checkpointing": on})
        found.append(weights(tmp_path / name))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Killed at step 1, when there is no checkpoint but the start's, and at 3 and 4, after the one of step 2."""
    save_model(tmp_path / "policy")
    inputs = {"model": policy(tmp_path / "policy"), "completions": table(tmp_path / "rows.parquet", completions())}
    settings = FAST | {"epochs": 2.0, "evaluations": 1}
    summary = assert_survives_kills(STAGE, tmp_path, inputs, settings, at=(1, 3, 4), speed={"save_every": 2})
    assert [one["step"] for one in summary["evaluations"]] == [0, 6]


def preferences(margins: list[float | None]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": f"What is {i % 7} plus 0?"}],
            "split": "train",
            "chosen": [{"role": "assistant", "content": f"The answer is {i % 7}."}],
            "rejected": [{"role": "assistant", "content": f"hello world {i}"}],
            "margin": margin,
        }
        for i, margin in enumerate(margins)
    ]


def test_a_preferences_margin_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    """At r = 0 on both sides a pair of margin 4 costs softplus(4) instead of log 2; one of margin 0 is left out."""
    rows = preferences([4.0] * 39 + [0.0])
    settings = {"held_out_share": 0.3, "epochs": 0.1, "evaluations": 1, "learning_rate": 1e-9, "centering": 0.0}
    losses = []
    for name, used in (("plain", False), ("margins", True)):
        summary = train(tmp_path / name, settings | {"use_margins": used}, rows)
        losses.append(curves(tmp_path / name)[1]["loss"])
        assert summary["left_out"].get("preferences without a margin above 0", 0) == used
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    assert losses[1] == pytest.approx(math.log1p(math.exp(4)), abs=0.3)
    with pytest.raises(DataError, match="column `margin`"):
        train(
            tmp_path / "none", {"use_margins": True}, [{k: v for k, v in row.items() if k != "margin"} for row in rows]
        )


def test_every_step_tells_its_loss_its_accuracy_and_both_sides_rewards(tmp_path: Path) -> None:
    train(tmp_path, {"epochs": 1.0, "evaluations": 1})
    lines = [line for line in curves(tmp_path) if "loss" in line]
    names = {"accuracy", "reward_better", "reward_worse", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(names < line.keys() for line in lines)
    assert lines[-1]["accuracy"] > 0.5
    assert lines[-1]["reward_better"] > lines[-1]["reward_worse"]


def test_a_rehearsal_tells_everything_and_trains_nothing(tmp_path: Path) -> None:
    """21 train prompts in 11 steps of 8: 4 epochs are 84 places. The first two groups of the first step are shown."""
    folder = tmp_path / "run"
    save_model(folder / "policy")
    (folder / "work").mkdir()
    inputs = {"model": policy(folder / "policy"), "completions": table(folder / "rows.parquet", completions())}
    silent = Silent()
    tools = Tools(
        seed=3, engines={}, progress=silent, work=folder / "work", out=folder, speed={"device": "cpu"}, rehearse=True
    )
    summary = STAGE.run(Config(**FAST), inputs, tools).summary
    assert set(summary) == {"start"}
    assert summary["start"]["steps"] == 11
    assert summary["start"]["kept"] == 21
    assert summary["start"]["layout"].startswith("flat")
    assert "The answer is" in silent.said[0]
    assert not (folder / "model").exists()
    assert not (folder / "metrics.jsonl").exists()


def test_plain_preferences_train_a_model_without_gates(tmp_path: Path) -> None:
    rows = preferences([1.0] * 40)
    summary = train(tmp_path, {"held_out_share": 0.3}, rows)
    assert summary["overall"]["pair_accuracy"] == 1.0
    judge = load_reward_model(tmp_path / "model")
    assert judge.card.gates is None
    assert judge.judge_group("anything", [0.0, 0.1]) == (1, 0)


@pytest.mark.parametrize("merged", [True, False])
def test_lora_trains_and_keeps_the_head(tmp_path: Path, merged: bool) -> None:
    """The reload check inside the stage would stop it if the head were lost; here its file is looked at too."""
    from safetensors.torch import load_file

    summary = train(tmp_path, {"lora_rank": 4, "save_merged": merged})
    assert summary["overall"]["best_of_n"] == 1.0
    file = tmp_path / "model" / ("model.safetensors" if merged else "adapter_model.safetensors")
    assert any("score" in name for name in load_file(file))
    base = make_model()
    if merged:
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.allclose(load_file(file)[name], base.state_dict()[name])


def test_a_policy_given_as_adapters_is_merged_under_the_head(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_model(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    judge = new_reward_model(Config(head="scalar"), policy(tmp_path / "policy"), 0)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        hidden = judge.model.model(ids).last_hidden_state
        expected = model.base_model.model.model(ids).last_hidden_state
    assert torch.allclose(hidden, expected, atol=1e-4)


def test_a_new_scalar_head_is_small_seeded_and_without_dropout(tmp_path: Path) -> None:
    """Standard deviation 1/sqrt(33) = 0.174 for 32 hidden units."""
    from transformers import AutoModelForCausalLM

    save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path)
    one, two, other = (new_reward_model(Config(), policy(tmp_path), seed) for seed in (1, 1, 2))
    weight = one.model.score.weight.data
    assert 0.1 < float(weight.std()) < 0.26
    assert torch.equal(weight, two.model.score.weight.data)
    assert not torch.equal(weight, other.model.score.weight.data)
    one.model.train()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(one.model(input_ids=ids).logits, one.model(input_ids=ids).logits)


def test_a_head_lost_on_saving_stops_the_stage(tmp_path: Path) -> None:
    train(tmp_path, {"epochs": 0.2, "evaluations": 1})
    judge = load_reward_model(tmp_path / "model")
    probe = judge.encode([([{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}])])
    scores = judge.score_encoded(probe)
    check_saved(tmp_path / "model", probe, scores, "cpu")
    with pytest.raises(ModelError, match="loaded again"):
        check_saved(tmp_path / "model", probe, [scores[0] + 0.01], "cpu")
    shutil.copytree(tmp_path / "model", tmp_path / "lost")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "lost" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "score.weight"}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight"):
        check_saved(tmp_path / "lost", probe, scores, "cpu")


def test_the_card_says_how_to_read_it(tmp_path: Path) -> None:
    summary = train(tmp_path, {"head": "logprob", "coef": 0.2, "epochs": 0.4, "evaluations": 1})
    card = Card.read(tmp_path / "model" / "reward_model.json")
    assert card.coef == 0.2
    assert card.base == "policy"
    assert card.gates is not None
    assert summary["by_family"]["sums"]["gate"]["best_above"] == card.gates["sums"].best_above
    assert json.dumps(summary), "a summary goes into the manifest"


def test_gold_answers_need_their_column_and_settings_their_head(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column `answer`"):
        train(tmp_path, {"answers": True})
    with pytest.raises(ValidationError, match="logprob"):
        Config(head="scalar", nll=1.0)
    with pytest.raises(ValidationError, match="lora_rank"):
        Config(save_merged=False)


def test_a_device_and_a_precision_that_it_doesnt_know_are_refused() -> None:
    for speed, problem in (
        ({"device": "cpu", "precision": "fp16"}, "precision: fp16; known: auto, fp32, bf16"),
        ({"device": "cuda:1"}, "device: cuda:1; a training stage takes auto, cpu or cuda.*CUDA_VISIBLE_DEVICES"),
    ):
        with pytest.raises(RecipeError, match=problem):
            Speed.of(speed)
    assert not Speed.of({"device": "cpu"}).bf16
    assert Speed.of({"device": "cpu", "precision": "bf16"}).bf16


def test_rows_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    """Its rows are of some 30 tokens."""
    save_model(tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(ModelError, match=r"policy: the longest .* the model can tell 16 positions.*max_length=16"):
        train(tmp_path, {})


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_model_in_pieces_is_refused(kind: str) -> None:
    from accelerate import DistributedType

    with pytest.raises(RunError, match=f"under {kind}.*plain data parallel.*lora_rank"):
        _check_parallel(SimpleNamespace(distributed_type=DistributedType(kind)))


def test_judged_groups_keep_their_order_and_count_completion_tokens(tmp_path: Path) -> None:
    save_model(tmp_path)
    judge = new_reward_model(Config(head="logprob"), policy(tmp_path), 0)
    rows = [
        {"family": f"f{i}", "values": [1.0, 0.0], "counts": [1, 2], "ids": [[5, 6, 7 + i], [5, 6, 7, 8]],
         "labels": [[-100, -100, 7 + i], [-100, -100, 7, 8]]}
        for i in range(5)
    ]  # fmt: skip
    judged = judge_groups(judge, rows, at_once=2)
    assert [group.family for group in judged] == [f"f{i}" for i in range(5)]
    assert judged[0].lengths == [1, 2]
    alone = judge.score_encoded([(rows[3]["ids"][0], rows[3]["labels"][0])])
    assert judged[3].scores[0] == pytest.approx(alone[0], abs=1e-4)


@pytest.mark.parametrize(("weight", "told"), [(None, True), (0.0, False)])
def test_a_mixture_of_experts_trains_with_its_router_loss_or_without(
    tmp_path: Path, weight: float | None, told: bool
) -> None:
    """None takes the weight in the model's config; two experts of four a token, so a balanced router's loss is 2."""
    save_model(tmp_path / "policy", "qwen2_moe")
    train(tmp_path, {"router_loss_weight": weight, "epochs": 0.3, "evaluations": 1})
    lines = [line for line in curves(tmp_path) if "loss" in line]
    assert ("router_loss" in lines[0]) == told
    if told:
        assert lines[0]["router_loss"] == pytest.approx(2.0, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head"), [("llama", "scalar"), ("mistral", "logprob"), ("gemma", "scalar"), ("qwen2_moe", "logprob")]
)
def test_other_architectures_train_save_and_load(tmp_path: Path, family: str, head: str) -> None:
    """One optimizer step each; the stage itself requires the saved model to score as before."""
    save_model(tmp_path / "policy", family)
    summary = train(tmp_path, {"head": head, "epochs": 0.3, "evaluations": 1})
    assert summary["held_out_prompts"] == 21
    assert load_reward_model(tmp_path / "model").card.head == head
