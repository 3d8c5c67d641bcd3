from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align.core.chat import encode_pairs
from align.core.errors import DataError, RunError
from align.core.stage import Tools
from align.core.store import ModelRef, Table
from align.train.dpo import STAGE, Config
from align.train.preference import DPO, dpo_arguments
from align.train.settings import Speed
from align.train.trainer import set_batches
from tests.train import steps
from tests.train.test_sft import Gradients
from tests.train.tiny import make_model, make_tokenizer, preferences, save_model

QUICK = {"learning_rate": 1e-3, "epochs": 2.0, "global_batch_size": 8, "max_length": 128}


def inputs(folder: Path, count: int = 24, family: str = "qwen2") -> dict[str, Table | ModelRef]:
    save_model(folder / "sft", family)
    return {
        "policy": steps.policy(folder / "sft"),
        "preferences": steps.table(folder / "pairs.parquet", preferences(count)),
    }


def other(folder: Path, family: str = "qwen2") -> ModelRef:
    """Another model, to be the reference."""
    return ModelRef(save_model(folder / "other", family, seed=1), steps.policy("x").kind, "other", "1")


def test_a_policy_learns_to_prefer_and_is_written_whole(tmp_path: Path) -> None:
    summary, progress = steps.run(STAGE, tmp_path / "dpo", inputs(tmp_path), QUICK | {"epochs": 6.0})
    lines = steps.curves(tmp_path / "dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # both log-ratios are 0: -log sigmoid(0)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["rewards/accuracies"] == 1.0
    assert lines[-1]["rewards/margins"] > 0.1
    assert {"logps/chosen", "logps/rejected"} <= set(lines[0])
    assert (summary["steps"], summary["rows"], summary["base"], summary["reference"]) == (18, 24, "sft", "sft")
    assert "chosen:   \x1b[32m⟦The answer is 0.<|im_end|>⟧" in progress.said[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "model")


def completion_logps(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Of each token of a completion, by one plain forward in float64."""
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return [logits[place, token].item() for place, token in zip(places, completion, strict=True)]


def test_the_first_loss_is_that_of_a_float64_computation_by_hand(tmp_path: Path) -> None:
    """Eight pairs in one step, reference another model: mean of -log sigmoid(0.3 (dc - dr)) + 0.5 NLL(c) / |c|."""
    given = inputs(tmp_path, 8) | {"reference": other(tmp_path)}
    settings = QUICK | {"epochs": 1.0, "beta": 0.3, "nll_weight": 0.5}
    steps.run(STAGE, tmp_path / "dpo", given, settings, {"micro_batch_size": 2})
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("sft", "other")
    )
    losses = []
    for prompt, chosen, rejected in encode_pairs(AutoTokenizer.from_pretrained(tmp_path / "sft"), preferences(8)):
        logps = completion_logps(policy, prompt, chosen)
        chosen_ratio = sum(logps) - sum(completion_logps(reference, prompt, chosen))
        rejected_ratio = sum(completion_logps(policy, prompt, rejected)) - sum(
            completion_logps(reference, prompt, rejected)
        )
        margin = 0.3 * (chosen_ratio - rejected_ratio)
        losses.append(math.log1p(math.exp(-margin)) - 0.5 * sum(logps) / len(logps))
    assert max(losses) - min(losses) > 0.1  # the pairs differ, and none has the loss of equal models
    assert steps.curves(tmp_path / "dpo")[0]["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "more"),
    [
        (["sigmoid"], {}),
        (["ipo"], {}),
        (["robust"], {"label_smoothing": 0.1}),
        (["apo_zero", "sigmoid_norm"], {"loss_weights": [0.5, 2.0]}),
    ],
)
def test_our_first_step_is_trl_s_on_the_same_text(tmp_path: Path, losses: list[str], more: dict[str, Any]) -> None:
    """Llama's template ends at the end-of-turn token, so TRL's own tokenisation of the text gives our ids."""
    given = inputs(tmp_path, 8, "llama") | {"reference": other(tmp_path, "llama")}
    settings = QUICK | {"epochs": 1.0, "losses": losses, "max_grad_norm": 0.0} | more
    steps.run(STAGE, tmp_path / "dpo", given, settings)
    ours = steps.curves(tmp_path / "dpo")[0]
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type=losses,
        beta=0.1,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        logging_steps=1,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )
    load = AutoModelForCausalLM.from_pretrained
    trl = DPOTrainer(
        load(tmp_path / "sft"),
        load(tmp_path / "other"),
        arguments,
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in preferences(8)]
        ),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "sft"),
    )
    trl.train()
    theirs = trl.state.log_history[0]
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def make_trainer(folder: Path, config: Config, micro: int, model: Any, peft_config: Any = None) -> DPO:
    """A trainer on eight pairs, reference log-probabilities under the model itself."""
    speed = Speed(device="cpu", precision="fp32", micro_batch_size=micro)
    tools = Tools(seed=3, engines={}, progress=steps.Silent(), work=folder / "work", out=folder / "out")
    tokenizer = make_tokenizer()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = Dataset.from_list([dict(zip(names, ids, strict=True)) for ids in encode_pairs(tokenizer, preferences(8))])
    arguments = dpo_arguments(config, speed, tools)
    set_batches(arguments, 8, 8, speed)
    dpo = DPO(config, tools, 8, model=model, args=arguments, processing_class=tokenizer, train_dataset=pairs,
              peft_config=peft_config)  # fmt: skip
    logps = dpo.reference_logps(pairs)
    dpo.train_dataset = pairs.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
    return dpo


def test_a_global_batch_gives_the_same_gradient_however_it_is_split(tmp_path: Path) -> None:
    config = Config(**QUICK, nll_weight=1.0, max_grad_norm=0.0)
    seen = []
    for micro in (8, 1, 2, 4):
        dpo = make_trainer(tmp_path, config, micro, make_model())
        gradients = Gradients()
        dpo.add_callback(gradients)
        dpo.train()
        seen.append(gradients.seen)
    for split in seen[1:]:
        for name in seen[0]:
            torch.testing.assert_close(split[name], seen[0][name], atol=1e-6, rtol=0)


def test_reference_log_probabilities_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    config = Config(**QUICK)
    by_one = make_trainer(tmp_path, config, 1, make_model())
    by_eight = make_trainer(tmp_path, config, 8, make_model())
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(by_one.train_dataset[name], by_eight.train_dataset[name], atol=1e-4)


def test_a_reference_that_was_computed_otherwise_stops_the_run_at_its_first_step(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    (tmp_path / "dpo" / "work").mkdir(parents=True)
    np.save(tmp_path / "dpo" / "work" / "reference-cpu-fp32.npy", np.full((24, 2), -50.0, np.float32))
    with pytest.raises(RunError, match="differ from the reference's by"):
        steps.run(STAGE, tmp_path / "dpo", given, QUICK)


def test_with_lora_the_reference_is_the_policy_that_was_given(tmp_path: Path) -> None:
    settings = QUICK | {"lora_rank": 4, "learning_rate": 1e-2}
    steps.run(STAGE, tmp_path / "dpo", inputs(tmp_path), settings)
    lines = steps.curves(tmp_path / "dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["rewards/margins"] > 0.05
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "model").state_dict()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_lora_after_lora_stays_near_the_first_adapters_and_not_the_base(tmp_path: Path) -> None:
    from align.train.sft import STAGE as SFT
    from tests.train.tiny import demonstrations

    given = inputs(tmp_path)
    sft = {"model": given["policy"], "demonstrations": steps.table(tmp_path / "d.parquet", demonstrations(24))}
    strong = QUICK | {"lora_rank": 4, "learning_rate": 3e-2, "save_merged": False}
    steps.run(SFT, tmp_path / "lora", sft, strong)
    adapters = steps.policy(tmp_path / "lora" / "model")
    steps.run(STAGE, tmp_path / "dpo", given | {"policy": adapters}, QUICK | {"lora_rank": 4})
    first = steps.curves(tmp_path / "dpo")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    untrained = make_trainer(tmp_path / "x", Config(**QUICK), 8, make_model())
    assert abs(first["logps/chosen"] - np.mean(untrained.train_dataset["ref_chosen_logps"])) > 1.0


@pytest.mark.parametrize(("loss", "falls"), [("apo_down", True), ("sigmoid", False)])
def test_a_fallen_log_probability_of_the_chosen_is_said(tmp_path: Path, loss: str, falls: bool) -> None:
    """APO-down lowers chosen and rejected; under DPO's own loss the chosen rise here, where pairs are so easy."""
    settings = QUICK | {"learning_rate": 5e-2, "epochs": 6.0, "beta": 0.01, "warn_chosen_drop": 0.5, "losses": [loss]}
    summary, progress = steps.run(STAGE, tmp_path / "dpo", inputs(tmp_path), settings)
    change = summary["chosen_logp_change"]
    logps = [line["rewards/chosen"] / 0.01 for line in steps.curves(tmp_path / "dpo")]
    assert change == pytest.approx(logps[-1], rel=1e-4)
    assert (change < -0.5) == falls
    assert summary["loss_over"] == "pairs of the global batch, all processes"
    assert [line for line in progress.said if line.startswith("warning: the chosen completions lost")] == (
        [f"warning: {text}" for text in summary["warnings"]] if falls else []
    )
    assert ("warnings" in summary) == falls


def test_pairs_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    rows = preferences(12)
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["split"] = "test"
    rows[2]["chosen"] = [{"role": "assistant", "content": "very " * 200}]
    save_model(tmp_path / "sft")
    given = {"policy": steps.policy(tmp_path / "sft"), "preferences": steps.table(tmp_path / "p.parquet", rows)}
    summary, _ = steps.run(STAGE, tmp_path / "dpo", given, QUICK)
    left_out = (summary["identical"], summary["split_test"], summary["too_long"])
    assert (*left_out, summary["rows"]) == (1, 1, 1, 9)
    with pytest.raises(DataError, match=r"pair 1 of the train split has \d+ tokens, max_length is 128"):
        steps.run(STAGE, tmp_path / "other", given, QUICK | {"too_long": "error"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "no effect on the loss sigmoid; use robust"),
        ({"losses": ["exo_pair"]}, "needs label_smoothing above 0"),
        ({"loss_weights": [1.0, 2.0]}, "2 numbers for 1 losses"),
        ({"lora_rank": 8, "lora_dropout": 0.1}, "DPO is computed without dropout"),
        ({"losses": ["aot"]}, "sigmoid"),
    ],
)
def test_settings_that_would_be_ignored_or_misread_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(settings)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_and_curves(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    speed = {"save_every": 4}
    steps.run(STAGE, tmp_path / "whole", given, QUICK | {"epochs": 4.0}, speed)
    assert steps.run_and_kill("dpo", tmp_path / "killed", given, QUICK | {"epochs": 4.0}, speed, at_step=7) == -9
    steps.run(STAGE, tmp_path / "killed", given, QUICK | {"epochs": 4.0}, speed)
    whole, resumed = steps.weights(tmp_path / "whole"), steps.weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[line["loss"] for line in steps.curves(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
