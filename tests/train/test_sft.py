from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig

from align.core.chat import encode_demonstrations
from align.core.errors import DataError, ModelError, RunError
from align.core.stage import Tools
from align.core.store import ModelRef, Table
from align.train import models, trainer
from align.train.settings import Speed
from align.train.sft import STAGE, Config, show
from tests.train import steps
from tests.train.kills import assert_survives_kills
from tests.train.ranks import assert_same_gradient, in_ranks
from tests.train.ranks import first_gradient as gradient_of
from tests.train.tiny import demonstrations, make_model, make_tokenizer, save_model

QUICK = {"learning_rate": 2e-3, "epochs": 2.0, "global_batch_size": 8, "max_length": 128}


def inputs(folder: Path, count: int = 24, family: str = "qwen2") -> dict[str, Table | ModelRef]:
    save_model(folder / "base", family)
    return {
        "model": steps.policy(folder / "base"),
        "demonstrations": steps.table(folder / "rows.parquet", demonstrations(count)),
    }


def test_a_model_learns_its_demonstrations_and_is_written_whole(tmp_path: Path) -> None:
    settings = QUICK | {"learning_rate": 1e-2, "epochs": 20.0, "min_lr_ratio": 0.5}
    summary, progress = steps.run(STAGE, tmp_path / "sft", inputs(tmp_path), settings)
    lines = steps.curves(tmp_path / "sft")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] == pytest.approx(math.log(make_model().config.vocab_size), rel=0.05)
    assert summary["loss"] < 1.0
    assert (summary["steps"], summary["rows"], summary["base"]) == (60, 24, "base")
    assert summary["loss_over"] == "supervised tokens of the global batch, all processes"
    assert "⟦The answer is 0.<|im_end|>⟧" in progress.said[0].replace("\x1b[32m", "").replace("\x1b[0m", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft" / "model")
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2_moe"])
def test_other_architectures_take_a_step(tmp_path: Path, family: str) -> None:
    summary, _ = steps.run(STAGE, tmp_path / "sft", inputs(tmp_path, 8, family), QUICK | {"epochs": 1.0})
    assert summary["steps"] == 1
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient of the first optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.seen:
            self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}


def first_gradient(folder: Path, micro: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Of one global batch of 8 rows with 4 to about 30 supervised tokens, `micro` rows at a time."""
    from datasets import Dataset

    config = Config(**QUICK, max_grad_norm=0.0)
    speed = Speed(device="cpu", precision="fp32", micro_batch_size=micro)
    tools = Tools(seed=3, engines={}, progress=steps.Silent(), work=folder / "work", out=folder / "out")
    tokenizer = make_tokenizer()
    pairs = list(encode_demonstrations(tokenizer, demonstrations(rows)))
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]})
    arguments = trainer.training_arguments(
        SFTConfig, config, speed, tools, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer.set_batches(arguments, 8, rows, speed)
    sft = trainer.SFT(
        config, tools, rows, model=make_model(), args=arguments, processing_class=tokenizer, train_dataset=data
    )
    gradients = Gradients()
    sft.add_callback(gradients)
    sft.train()
    return gradients.seen


def test_a_global_batch_gives_the_same_gradient_however_it_is_split(tmp_path: Path) -> None:
    whole = first_gradient(tmp_path, micro=8)
    for micro in (1, 2, 4):
        split = first_gradient(tmp_path, micro)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    """By hand: the sum of -log p over all supervised tokens of the 8 rows, over their number, each row run alone."""
    model, total, count = make_model(), torch.zeros(()), 0
    for ids, labels in encode_demonstrations(make_tokenizer(), demonstrations(8)):
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for place, label in enumerate(labels[1:]):
            if label != -100:
                total, count = total - logps[place, label], count + 1
    (total / count).backward()
    trained = first_gradient(tmp_path, micro=2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.grad, atol=1e-6, rtol=0)


def test_only_the_train_split_is_trained_on(tmp_path: Path) -> None:
    rows = demonstrations(10)
    rows[3]["split"], rows[4]["split"], rows[5]["split"] = "dev", "test", "test"
    save_model(tmp_path / "base")
    given = {"model": steps.policy(tmp_path / "base"), "demonstrations": steps.table(tmp_path / "r.parquet", rows)}
    summary, _ = steps.run(STAGE, tmp_path / "sft", given, QUICK)
    assert (summary["rows"], summary["split_dev"], summary["split_test"]) == (7, 1, 2)


def test_rows_that_are_too_long_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    given = inputs(tmp_path, 12)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    lengths = [len(ids) for ids, _ in encode_demonstrations(tokenizer, demonstrations(12))]
    limit = sorted(lengths)[6]
    summary, _ = steps.run(STAGE, tmp_path / "sft", given, QUICK | {"max_length": limit})
    assert summary["too_long"] == sum(length > limit for length in lengths) > 0
    with pytest.raises(DataError, match=rf"row \d+ of the train split has \d+ tokens, max_length is {limit}"):
        steps.run(STAGE, tmp_path / "other", given, QUICK | {"max_length": limit, "too_long": "error"})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    given = inputs(tmp_path) | {"model": steps.policy(tmp_path)}
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        steps.run(STAGE, tmp_path / "sft", given, QUICK)


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    make_model("qwen2").model.save_pretrained(tmp_path / "base")  # the body without what it ends with
    weights = tmp_path / "base" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(weights).items() if "layers.1" not in k}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="which would be random"):
        steps.run(STAGE, tmp_path / "sft", given, QUICK)


def test_lora_trains_adapters_alone_and_writes_full_weights(tmp_path: Path) -> None:
    settings = QUICK | {"lora_rank": 2, "learning_rate": 1e-2}
    steps.run(STAGE, tmp_path / "sft", inputs(tmp_path), settings)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("proj" in name and name.endswith("weight") for name in changed)
    for name in changed:  # a product of rank 2
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2


def test_an_adapter_folder_is_written_when_asked_and_is_a_model_to_go_on_from(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    settings = QUICK | {"lora_rank": 2, "learning_rate": 1e-2}
    steps.run(STAGE, tmp_path / "merged", given, settings)
    steps.run(STAGE, tmp_path / "apart", given, settings | {"save_merged": False})
    folder = tmp_path / "apart" / "model"
    assert (folder / "adapter_config.json").exists()
    assert not (folder / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model").state_dict()
    loaded = models.load_policy(steps.policy(folder), Speed(device="cpu", precision="fp32")).state_dict()
    for name in merged:
        torch.testing.assert_close(loaded[name], merged[name], atol=1e-6, rtol=0)
    summary, _ = steps.run(STAGE, tmp_path / "on", given | {"model": steps.policy(folder)}, QUICK)
    assert summary["steps"] == 6


def test_weights_are_written_in_the_precision_of_the_model_they_came_from(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    steps.run(STAGE, tmp_path / "sft", given, QUICK)
    assert {tensor.dtype for tensor in steps.weights(tmp_path / "sft").values()} == {torch.bfloat16}


def test_no_model_is_written_of_weights_that_the_last_step_has_ruined(tmp_path: Path) -> None:
    """One step: its loss was computed before it, so no later one tells that it blew up."""
    ruin = {"learning_rate": 1e38, "epochs": 1.0, "lr_scheduler": "constant", "max_grad_norm": 0.0}
    with pytest.raises(RunError, match=r"the training diverged: .* lower learning_rate"):
        steps.run(STAGE, tmp_path / "sft", inputs(tmp_path, 8), QUICK | ruin)
    assert not (tmp_path / "sft" / "model").exists()


def test_the_first_row_is_shown_with_its_supervised_tokens_marked() -> None:
    tokenizer = make_tokenizer()
    ids, labels = next(encode_demonstrations(tokenizer, demonstrations(1)))
    shown = show(tokenizer, ids, labels)
    assert shown.endswith("<|im_start|>assistant\n\x1b[32m⟦The answer is 0.<|im_end|>⟧\x1b[0m")


def test_a_run_killed_at_any_step_goes_on_to_the_same_weights_and_curves(tmp_path: Path) -> None:
    """Killed at the first step (nothing is saved yet), in the middle, and again at the very next step."""
    assert_survives_kills(STAGE, tmp_path, inputs(tmp_path), QUICK, at=(1, 3, 4))


def test_a_checkpoint_that_a_kill_cut_off_is_not_resumed_from(tmp_path: Path) -> None:
    for step, whole in ((4, True), (8, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / trainer.DONE).touch()
    assert trainer.whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-8").exists()


def test_two_ranks_take_the_step_that_one_takes(tmp_path: Path) -> None:
    """The same global batch of 8 rows: at once, and 2 rows at a time in each of 2 ranks with 2 accumulated."""
    given, settings = inputs(tmp_path), QUICK | {"max_grad_norm": 0.0}

    def step(micro: int, folder: str) -> list[torch.Tensor]:
        return gradient_of(lambda: steps.run(STAGE, tmp_path / folder, given, settings, {"micro_batch_size": micro}))

    whole = step(8, "one")
    for gradient in in_ranks(lambda: step(2, "two"), tmp_path / "ranks"):
        assert_same_gradient(gradient, whole)
