from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align.core.chat import encode_pairs
from align.core.errors import DataError, RecipeError, RunError
from align.core.stage import Tools
from align.core.store import ModelRef, Table
from align.train import preference
from align.train.dpo import STAGE, Config
from align.train.preference import DPO, collate_pairs, dpo_arguments
from align.train.settings import Speed
from align.train.trainer import set_batches
from tests.train import steps
from tests.train.kills import assert_survives_kills
from tests.train.ranks import assert_same_gradient, first_gradient, in_ranks
from tests.train.tiny import demonstrations, make_model, make_tokenizer, preferences, save_model

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
    assert "⟦The answer is 0.<|im_end|>⟧" in progress.said[0]
    assert "flat, without padding, a prompt once for both completions" in progress.said[0]
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
    ("losses", "weights"), [(["sigmoid"], None), (["apo_zero", "sigmoid_norm", "sft"], [0.5, 2.0, 0.1])]
)
def test_our_first_step_is_trl_s_on_the_same_text(tmp_path: Path, losses: list[str], weights: Any) -> None:
    """Llama's template ends at the end-of-turn token, so TRL's own tokenisation of the text gives our ids."""
    given = inputs(tmp_path, 8, "llama") | {"reference": other(tmp_path, "llama")}
    more = {"loss_weights": weights, "max_grad_norm": 0.0}
    steps.run(STAGE, tmp_path / "dpo", given, QUICK | {"epochs": 1.0, "losses": losses} | more)
    ours = steps.curves(tmp_path / "dpo")[0]
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type=losses,
        beta=0.1,
        per_device_train_batch_size=8,
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
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    for name in ("grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


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


def test_a_global_batch_gives_the_same_gradient_however_it_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over micro batches, flat or padded rows, and two processes; every term that could depend on it is in the loss."""
    given = inputs(tmp_path, 8) | {"reference": other(tmp_path)}
    settings = QUICK | {"epochs": 1.0, "losses": ["sigmoid", "sft"], "nll_weight": 1.0, "max_grad_norm": 0.0}

    def gradient(name: str, micro: int) -> list[torch.Tensor]:
        speed = {"micro_batch_size": micro}
        return first_gradient(lambda: steps.run(STAGE, tmp_path / name, given, settings, speed))

    whole = gradient("whole", 8)
    assert_same_gradient(gradient("one", 1), whole)
    for both in in_ranks(lambda: gradient("two", 2), tmp_path / "ranks"):
        assert_same_gradient(both, whole)
    monkeypatch.setattr(preference, "can_be_flat", lambda *_: False)
    assert_same_gradient(gradient("padded", 4), whole)


def test_the_balance_of_experts_too_is_asked_for_over_the_whole_global_batch(tmp_path: Path) -> None:
    given = inputs(tmp_path, 8, "qwen2_moe")
    settings = QUICK | {"epochs": 1.0, "max_grad_norm": 0.0}

    def gradient(micro: int, weight: float) -> list[torch.Tensor]:
        chosen, speed = settings | {"router_loss_weight": weight}, {"micro_batch_size": micro}
        return first_gradient(lambda: steps.run(STAGE, tmp_path / f"{micro}-{weight}", given, chosen, speed))

    whole = gradient(8, 0.5)
    assert_same_gradient(gradient(2, 0.5), whole)
    with pytest.raises(AssertionError, match="of their length apart"):
        assert_same_gradient(gradient(8, 0.0), whole)


def test_flat_pairs_have_the_log_probabilities_of_padded_rows_and_of_trl_s_batch(tmp_path: Path) -> None:
    """Per token within 1e-5 nats. TRL's collator and TRL's head, at the other end, on the same ids."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    dpo = make_trainer(tmp_path, Config(**QUICK), 4, make_model())
    pairs = list(dpo.train_dataset)
    flat = dpo.policy_logps(pairs)
    dpo.flat = False
    padded = dpo.policy_logps(pairs)
    plain = make_model().eval()
    add_fused_lm_head(plain)
    batch = DataCollatorForPreference(0)(pairs)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        out = plain(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
    trl = out.log_probs.sum(1).view(2, -1).T.numpy()
    tokens = np.array([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs])
    assert np.abs((flat - trl) / tokens).max() < 1e-5
    assert np.abs((flat - padded) / tokens).max() < 1e-5


def test_a_pair_is_one_prompt_with_two_branches() -> None:
    """Prompt 1 2, completions 3 4 and 5: the model reads 1 | 2 3 | 2 and predicts 3 4 | 5."""
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    batch = collate_pairs([row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}], flat=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 2]]
    assert batch["shift_labels"].tolist() == [[-100, 3, 4, 5]]
    assert (batch["tokens"].tolist(), batch["reference"].tolist(), batch["read"].item()) == ([[2, 1]], [[-1, -2]], 4)
    padded = collate_pairs([row], flat=False)
    assert (padded["read"].item(), "reference" in padded) == (5, False)  # 1 2 3 | 1 2


def test_no_dropout_is_left_on_neither_the_layers_nor_the_attention_s(tmp_path: Path) -> None:
    """TRL turns modules off alone; with half of the attention dropped a first step would not have the loss log 2."""
    model = make_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    dpo = make_trainer(tmp_path, Config(**QUICK), 8, model)
    dpo.starts_at_reference = True
    dpo.train()
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_reference_log_probabilities_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    config = Config(**QUICK)
    by_one = make_trainer(tmp_path, config, 1, make_model())
    by_eight = make_trainer(tmp_path, config, 8, make_model())
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(by_one.train_dataset[name], by_eight.train_dataset[name], atol=1e-4)


def test_a_reference_that_was_computed_otherwise_stops_the_run_at_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPO, "reference_logps", lambda self, pairs, _: np.full((len(pairs), 2), -50.0, np.float32))
    with pytest.raises(RunError, match="differ from the reference's by"):
        steps.run(STAGE, tmp_path / "dpo", inputs(tmp_path), QUICK)


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
        ({"label_smoothing": 0.1, "losses": ["sigmoid", "ipo"]}, "no effect on the loss ipo; use sigmoid"),
        ({"label_smoothing": 0.1, "losses": ["sft"]}, "no effect on the loss sft"),
        ({"losses": ["exo_pair"]}, "needs label_smoothing above 0"),
        ({"loss_weights": [1.0, 2.0]}, "2 numbers for 1 losses"),
        ({"lora_rank": 8, "lora_dropout": 0.1}, "DPO is computed without dropout"),
        ({"losses": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"losses": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}, "weights are above 0"),
        ({"losses": ["dpo"]}, "sigmoid"),
    ],
)
def test_settings_that_would_be_ignored_or_misread_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(settings)


def test_losses_that_sort_are_refused_where_the_global_batch_is_in_parts(tmp_path: Path) -> None:
    given = inputs(tmp_path, 8)
    settings = QUICK | {"epochs": 1.0, "losses": ["aot"]}
    with pytest.raises(RecipeError, match=r"aot sorts the pairs of the global batch.*set micro_batch_size=8"):
        steps.run(STAGE, tmp_path / "parts", given, settings, {"micro_batch_size": 4})
    steps.run(STAGE, tmp_path / "whole", given, settings, {"micro_batch_size": 8})
    assert steps.curves(tmp_path / "whole")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_step_tells_of_both_completions_and_of_the_distance_from_the_reference(tmp_path: Path) -> None:
    """Of the first step, whose policy is not the reference, from the log-probabilities of its 8 pairs."""
    given = inputs(tmp_path, 8) | {"reference": other(tmp_path)}
    steps.run(STAGE, tmp_path / "dpo", given, QUICK | {"epochs": 1.0, "nll_weight": 0.5, "losses": ["hinge", "ipo"]})
    line = steps.curves(tmp_path / "dpo")[0]
    pairs = list(encode_pairs(make_tokenizer(), preferences(8)))
    logps = {}
    for name in ("sft", "other"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        logps[name] = np.array([[sum(completion_logps(model, p, side)) for side in (c, r)] for p, c, r in pairs])
    tokens = np.array([[len(c), len(r)] for _, c, r in pairs])
    change = (logps["sft"] - logps["other"]).mean(0)
    each = logps["sft"] / tokens
    expected = {
        "logps/chosen": logps["sft"].mean(0)[0],
        "logps/rejected": logps["sft"].mean(0)[1],
        "logps/chosen_per_token": each.mean(0)[0],
        "logps/rejected_per_token": each.mean(0)[1],
        "logps/chosen_change": change[0],
        "logps/rejected_change": change[1],
        "kl": -change.mean(),
        "rewards/margins": 0.1 * (change[0] - change[1]),
        "length/chosen": tokens.mean(0)[0],
        "length/rejected": tokens.mean(0)[1],
        "nll": -each.mean(0)[0],
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-4), name
    assert line["loss"] == pytest.approx(line["loss/hinge"] + line["loss/ipo"] + 0.5 * line["nll"], rel=1e-5)
    assert line["tokens"] == sum(len(p) - 1 + len(c) + len(r) for p, c, r in pairs)  # a prompt once for both
    assert line["tokens_per_second"] > 0


# --- the reference's log-probabilities, kept for other runs -----------------------------------------------------------


def run_with(
    folder: Path, given: dict[str, Any], settings: dict[str, Any], speed: dict[str, Any] | None = None, **more: Any
) -> tuple[dict[str, Any], list[str]]:
    """The stage with a cache that the runs of a test share; gives its summary, and what was said."""
    progress = steps.Silent()
    tools = Tools(3, {}, progress, folder / "work", folder, {"device": "cpu"} | (speed or {}), folder.parent / "cache")
    tools.work.mkdir(parents=True, exist_ok=True)
    result = STAGE.run(Config(**settings), given, replace(tools, **more))
    return result.summary, progress.said


def test_runs_that_change_what_changes_no_figure_find_the_reference_s_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    once = QUICK | {"epochs": 1.0, "global_batch_size": 24}
    first, said = run_with(tmp_path / "first", given, once)
    assert first["reference_logps"] == {"computed": 24, "from_cache": 0}
    assert any(f"24 pairs computed, 0 found in {tmp_path / 'cache' / 'reference'} (0.0 MB)" in line for line in said)

    def never(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(DPO, "reference_logps", never)
    harmless: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"learning_rate": 1e-4, "beta": 0.3, "lr_scheduler": "linear", "warmup_ratio": 0.0, "weight_decay": 0.1}, {}),
        ({"epochs": 1.5, "global_batch_size": 12, "losses": ["ipo"], "nll_weight": 1.0}, {"micro_batch_size": 2}),
        ({"lora_rank": 2, "max_grad_norm": 0.0}, {"gradient_checkpointing": True}),
    ]
    for number, (settings, speed) in enumerate(harmless):
        summary, _ = run_with(tmp_path / f"run-{number}", given, once | settings, speed)
        assert summary["reference_logps"] == {"computed": 0, "from_cache": 24}
    short, _ = run_with(tmp_path / "short", given, once | {"max_length": 45})
    assert 0 < short["reference_logps"]["from_cache"] < 24  # fewer pairs, and of those every one


def test_runs_that_change_what_matters_compute_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(tmp_path)
    settings = QUICK | {"epochs": 1.0, "global_batch_size": 24}
    run_with(tmp_path / "first", given, settings)
    template = make_tokenizer().chat_template.replace("\\n", " ")
    save_model(tmp_path / "template")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "template")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "template")
    matters: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "another template": ({"policy": steps.policy(tmp_path / "template")}, {}),
        "other weights under the same name": ({"policy": replace(other(tmp_path), fingerprint="0")}, {}),
        "another reference": ({"reference": other(tmp_path)}, {}),
        "stretched positions": ({}, {"rope_scaling": "yarn", "rope_factor": 2.0}),
    }
    for number, (what, (changed, more)) in enumerate(matters.items()):
        summary, _ = run_with(tmp_path / f"run-{number}", given | changed, settings | more)
        expected = 0 if what == "another reference" else 24  # which is the run's before it
        assert summary["reference_logps"]["computed"] == expected, what
    monkeypatch.setattr(preference, "can_be_flat", lambda *_: False)
    summary, _ = run_with(tmp_path / "padded", given, settings)
    assert summary["reference_logps"]["computed"] == 24


# --- health -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def near_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table | ModelRef]:
    """A model that has learned the chosen completions, and rejected ones that differ from them in one digit.

    What lowers a rejected one lowers its chosen one too, where nothing holds that up.
    """
    from align.train.sft import STAGE as SFT

    folder = tmp_path_factory.mktemp("near")
    save_model(folder / "base")
    learned = {
        "model": steps.policy(folder / "base"),
        "demonstrations": steps.table(folder / "d.parquet", demonstrations(24)),
    }
    steps.run(SFT, folder / "sft", learned, QUICK | {"learning_rate": 1e-2, "epochs": 10.0, "min_lr_ratio": 0.3})
    rows = preferences(24)
    for i, row in enumerate(rows):
        text = row["chosen"][0]["content"]
        row["rejected"] = [{"role": "assistant", "content": f"{text[:-1]}{i % 10}."}]
    return {
        "policy": steps.policy(folder / "sft" / "model"),
        "preferences": steps.table(folder / "near.parquet", rows),
    }


FALLING = QUICK | {"learning_rate": 1e-3, "beta": 0.03, "epochs": 8.0, "warmup_ratio": 0.0, "min_lr_ratio": 1.0}
"""The learning rate and the beta at which DPO without an NLL term was seen to displace the chosen."""


def test_a_run_that_displaces_the_chosen_is_stopped_and_its_last_good_weights_are_kept(
    tmp_path: Path, near_pairs: dict[str, Table | ModelRef]
) -> None:
    """Weights are kept every second step of 24; of accuracy alone the run would look well."""
    settings = FALLING | {"stop_at_chosen_drop": 4.0, "warn_chosen_drop": 2.0}
    summary, said = run_with(tmp_path / "dpo", near_pairs, settings)
    lines = steps.curves(tmp_path / "dpo")
    changes = [line["logps/chosen_change"] for line in lines]
    stopped, kept = summary["stopped_at"], summary["kept_step"]
    assert stopped == len(lines) < 24
    assert np.mean(changes[-5:]) < -4 <= np.mean(changes[-6:-1])
    assert kept == (stopped - 1) // 2 * 2
    assert lines[-1]["rewards/accuracies"] >= 0.75
    good = torch.load(tmp_path / "dpo" / "work" / "good.pt", weights_only=True)
    written = steps.weights(tmp_path / "dpo")
    assert good["step"] == kept
    assert all(torch.equal(good["weights"][name], written[name]) for name in written)
    assert sum(line.startswith("warning: step") and "(likelihood displacement)" in line for line in said) == 1
    assert said[-1] == f"warning: {summary['warnings'][0]}"
    assert f"stopped at step {stopped}: the chosen completions lost more than stop_at_chosen_drop (4 nats)" in said[-1]
    assert f"the weights of step {kept} are kept" in said[-1]


def test_the_same_run_with_an_nll_term_is_healthy_and_goes_on_to_its_end(
    tmp_path: Path, near_pairs: dict[str, Table | ModelRef]
) -> None:
    summary, said = run_with(tmp_path / "dpo", near_pairs, FALLING | {"nll_weight": 1.0, "stop_at_chosen_drop": 4.0})
    assert summary["steps"] == 24
    assert "stopped_at" not in summary and "warnings" not in summary
    assert summary["chosen_logp_change"] > 0
    assert not any(line.startswith("warning") for line in said)


def test_held_out_prompts_are_answered_at_the_start_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    from tests.train.test_online_dpo import prompts

    given = inputs(tmp_path) | {"prompts": steps.table(tmp_path / "prompts.parquet", prompts(20, dev=6))}
    settings = QUICK | {"evaluate_every": 0.5, "probe_prompts": 4, "max_tokens": 8}
    summary, said = run_with(tmp_path / "dpo", given, settings)
    looks = summary["heldout"]
    assert [look["step"] for look in looks] == [0, 3, 6]
    assert {"heldout/score", "heldout/length", "heldout/kl", "heldout/gap"} <= set(looks[0])
    assert looks[0]["heldout/kl"] == pytest.approx(0, abs=1e-4)  # of the very reference
    assert looks[2]["heldout/kl"] != 0
    assert sum("held-out score" in line for line in said) == 3
    lines = steps.curves(tmp_path / "dpo")
    run_with(tmp_path / "plain", inputs(tmp_path), QUICK)  # is not disturbed by it
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in steps.curves(tmp_path / "plain")
    ]
    given["prompts"] = steps.table(tmp_path / "train.parquet", prompts(20, dev=0))
    with pytest.raises(DataError, match="no prompt of the dev split that has a task"):
        run_with(tmp_path / "none", given, settings)


def test_a_rehearsal_tells_the_start_and_takes_no_step(tmp_path: Path) -> None:
    summary, said = run_with(tmp_path / "dpo", inputs(tmp_path), QUICK | {"nll_weight": 0.2}, rehearse=True)
    assert (summary["start"]["kept"], summary["start"]["steps"]) == (24, 6)
    assert "sigmoid (beta 0.1) + 0.2 × NLL of the chosen" in said[0]
    assert not (tmp_path / "dpo" / "model").exists() and not (tmp_path / "cache").exists()


def test_a_killed_run_goes_on_to_the_same_weights_and_curves(tmp_path: Path) -> None:
    settings = QUICK | {"epochs": 2.0, "losses": ["sigmoid", "sft"], "stop_at_chosen_drop": 50.0}
    assert_survives_kills(STAGE, tmp_path, inputs(tmp_path), settings, at=(1, 4))
