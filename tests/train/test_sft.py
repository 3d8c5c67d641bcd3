from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from align.core.chat import encode_demonstrations, encode_rows
from align.core.errors import DataError, ModelError, RunError
from align.core.records import Kind
from align.core.stage import Tools
from align.core.store import ModelRef, Table
from align.core.writer import write_rows
from align.train import callbacks, models, sft_trainer
from align.train.settings import Speed
from align.train.sft import STAGE
from tests.core.shapes import tokenizer_of
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
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", progress.said[0]).split())  # however it is broken into lines
    assert "⟦The answer is 0.<|im_end|>⟧" in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft" / "model")
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_other_architectures_take_a_step(tmp_path: Path, family: str) -> None:
    summary, _ = steps.run(STAGE, tmp_path / "sft", inputs(tmp_path, 8, family), QUICK | {"epochs": 1.0})
    assert summary["steps"] == 1
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def first_gradient(
    folder: Path, given: dict[str, Table | ModelRef], micro: int = 8, **settings: Any
) -> list[torch.Tensor]:
    """Of one global batch of 8 rows with 4 to about 30 supervised tokens, `micro` rows at a time."""
    settings = QUICK | {"epochs": 1.0, "max_grad_norm": 0.0} | settings
    return gradient_of(lambda: steps.run(STAGE, folder / f"by-{micro}", given, settings, {"micro_batch_size": micro}))


def as_named(model: Any, gradient: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The optimizer holds what decays first."""
    names = sorted((name for name, _ in model.named_parameters()), key=lambda name: "norm" in name or "bias" in name)
    return dict(zip(names, gradient, strict=True))


def test_the_gradient_is_that_of_the_weighted_mean_over_supervised_tokens(tmp_path: Path) -> None:
    """In float64 and row by row: the sum of -weight · log p over all supervised tokens, over the sum of weights.

    Every third answer has the weight 0.25, and every fourth row a second answer of the weight 2.
    """
    rows = demonstrations(8)
    for number, row in enumerate(rows):
        row["completion"][0]["weight"] = 0.25 if number % 3 == 0 else 1.0
        if number % 4 == 0:
            more = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes.", "weight": 2.0}]
            row["completion"] += more
    model, total, count = make_model().double(), torch.zeros(()).double(), 0.0
    for (tokens,) in encode_rows(make_tokenizer(), rows):
        logps = model(torch.tensor([tokens.ids])).logits[0, :-1].log_softmax(-1)
        for start, end, weight in tokens.turns:
            for place in range(start, end):
                total, count = total - weight * logps[place - 1, tokens.ids[place]], count + weight
    torch.autograd.backward(total / count)
    given = inputs(tmp_path, 8) | {"demonstrations": stored(tmp_path / "weighted", rows)}
    trained = as_named(model, first_gradient(tmp_path, given, micro=3))
    assert_same_gradient([trained[name] for name, _ in model.named_parameters()], [p.grad for p in model.parameters()])


def stored(folder: Path, rows: list[dict[str, Any]]) -> Table:
    """As a stage would be handed them."""
    write_rows(folder, rows, Kind.DEMONSTRATIONS)
    return Table.open(folder)


def test_loss_and_gradient_are_those_of_trl_on_the_same_rows(tmp_path: Path) -> None:
    encoded = list(encode_demonstrations(make_tokenizer(), demonstrations(8)))
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]})
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, max_grad_norm=0.0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    model = make_model()
    trl = SFTTrainer(model, arguments, train_dataset=data, processing_class=make_tokenizer())
    theirs = gradient_of(trl.train)
    given = inputs(tmp_path, 8)
    assert_same_gradient(first_gradient(tmp_path, given, micro=3), theirs)
    steps.run(STAGE, tmp_path / "ours", given, QUICK | {"epochs": 1.0})
    batch = trl.data_collator([data[i] for i in range(8)])
    assert steps.curves(tmp_path / "ours")[0]["loss"] == pytest.approx(make_model()(**batch).loss.item(), abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "gemma"])
def test_a_global_batch_gives_the_same_gradient_however_it_is_split_and_laid_out(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat and padded; of the mixture of experts with a loss of its routers that counts as much as the other.

    Rows of gemma (attention with a cap) are always padded.
    """
    given = inputs(tmp_path, 8, family)
    more = {"router_loss_weight": 0.5} if family == "qwen2_moe" else {}
    whole = first_gradient(tmp_path, given, 8, **more)
    assert_same_gradient(first_gradient(tmp_path, given, 3, **more), whole)
    monkeypatch.setattr(sft_trainer, "can_be_flat", lambda *_: False)
    assert_same_gradient(first_gradient(tmp_path, given, 2, **more), whole)


def test_only_the_train_split_is_trained_on(tmp_path: Path) -> None:
    rows = demonstrations(10)
    rows[3]["split"], rows[4]["split"], rows[5]["split"] = "dev", "test", "test"
    save_model(tmp_path / "base")
    given: dict[str, Table | ModelRef] = {
        "model": steps.policy(tmp_path / "base"),
        "demonstrations": steps.table(tmp_path / "r.parquet", rows),
    }
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


def test_a_run_killed_at_any_step_goes_on_to_the_same_weights_and_curves(tmp_path: Path) -> None:
    """Killed at the first step (nothing is saved yet), in the middle, and again at the very next step."""
    assert_survives_kills(STAGE, tmp_path, inputs(tmp_path), QUICK, at=(1, 3, 4))


def test_a_checkpoint_that_a_kill_cut_off_is_not_resumed_from(tmp_path: Path) -> None:
    for step, whole in ((4, True), (8, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / callbacks.DONE).touch()
    assert callbacks.whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-8").exists()


def test_two_ranks_take_the_step_that_one_takes(tmp_path: Path) -> None:
    """The same global batch of 7 rows at once, and in two ranks, which get 4 and 3 of them, 2 at a time.

    The model is a mixture of experts, whose load counts over all of the step.
    """
    given, more = inputs(tmp_path, 7, "qwen2_moe"), {"router_loss_weight": 0.5}
    whole = first_gradient(tmp_path, given, 8, **more)
    for gradient in in_ranks(lambda: first_gradient(tmp_path, given, 2, **more), tmp_path / "ranks"):
        assert_same_gradient(gradient, whole)


def test_the_router_loss_is_the_model_s_own_unless_it_is_set(tmp_path: Path) -> None:
    given = inputs(tmp_path, 8, "qwen2_moe")
    _, progress = steps.run(STAGE, tmp_path / "own", given, QUICK | {"epochs": 1.0})
    assert "0.001 × balance of the experts" in " ".join(progress.said[0].split())
    assert steps.curves(tmp_path / "own")[0]["router_loss"] == pytest.approx(2.0, abs=0.5)  # k = 2 where balanced
    own = first_gradient(tmp_path, given)
    assert_same_gradient(first_gradient(tmp_path, given, router_loss_weight=0.001), own)
    with pytest.raises(AssertionError, match="apart"):
        assert_same_gradient(first_gradient(tmp_path, given, router_loss_weight=0.0), own)


def test_a_row_whose_history_the_template_rewrites_becomes_several(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.save_pretrained(tmp_path / "base")
    row = demonstrations(1)[0]
    row["completion"] += [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes."}]
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    given: dict[str, Table | ModelRef] = {
        "model": steps.policy(tmp_path / "base"),
        "demonstrations": steps.table(tmp_path / "r.parquet", [row] * 4),
    }
    summary, _ = steps.run(STAGE, tmp_path / "sft", given, QUICK | {"epochs": 1.0})
    assert (summary["rows"], summary["steps"]) == (8, 1)


def test_a_rehearsal_tells_what_would_be_done_and_trains_nothing(tmp_path: Path) -> None:
    given, progress = inputs(tmp_path, 20), steps.Silent()
    tools = Tools(
        seed=3, engines={}, progress=progress, work=tmp_path / "work", out=tmp_path / "sft", speed={"device": "cpu"},
        rehearse=True,
    )  # fmt: skip
    tools.work.mkdir()
    start = STAGE.run(STAGE.config(**QUICK), given, tools).summary["start"]
    assert (start["kept"], start["steps"], start["batch"]["rows"]) == (20, 5, 8)
    assert "flat, without padding: attention row by row" in progress.said[0]
    assert not (tmp_path / "sft" / "model").exists()


def test_the_curves_tell_tokens_and_their_speed(tmp_path: Path) -> None:
    steps.run(STAGE, tmp_path / "sft", inputs(tmp_path, 8), QUICK | {"epochs": 2.0})
    encoded = list(encode_demonstrations(make_tokenizer(), demonstrations(8)))
    for line in steps.curves(tmp_path / "sft"):
        assert line["tokens"] == sum(len(ids) for ids, _ in encoded)
        assert line["supervised_tokens"] == sum(label >= 0 for _, labels in encoded for label in labels)
        assert line["tokens_per_second"] > 0
