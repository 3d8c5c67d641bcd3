"""Each hook of TRL and transformers that align/train relies on, held to what we expect of it.

A failure here after an update of either library means: read the new code before trusting a training run.
"""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from trl.trainer import utils
from trl.trainer.base_trainer import _BaseTrainer

from align.train.online_trainer import OnlineDPO
from align.train.preference import DPO
from align.train.sft_trainer import SFT
from align.train.trainer import OurTrainer

OVERRIDDEN = [
    (OurTrainer, transformers.Trainer, "_get_train_sampler", ["self", "train_dataset"]),
    (OurTrainer, transformers.Trainer, "create_scheduler", ["self", "num_training_steps", "optimizer"]),
    (OurTrainer, transformers.Trainer, "create_optimizer", ["self", "model"]),
    (OurTrainer, _BaseTrainer, "_send_telemetry", ["self"]),
    (OurTrainer, transformers.Trainer, "create_model_card", None),
    (SFT, transformers.Trainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
    (SFT, trl.SFTTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
    (SFT, transformers.Trainer, "floating_point_ops", ["self", "inputs"]),
    (DPO, trl.DPOTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
    (DPO, trl.DPOTrainer, "_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
    (DPO, trl.DPOTrainer, "_compute_loss", ["self", "model", "inputs", "return_outputs"]),
    (DPO, trl.DPOTrainer, "log", ["self", "logs", "start_time"]),
    (DPO, transformers.Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
    (OnlineDPO, transformers.Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
    (OnlineDPO, transformers.Trainer, "_get_learning_rate", ["self"]),
]


@pytest.mark.parametrize(("ours", "theirs", "name", "arguments"), OVERRIDDEN)
def test_what_we_override_is_there_and_takes_what_it_took(
    ours: type, theirs: type, name: str, arguments: list[str] | None
) -> None:
    assert name in vars(ours)
    found = list(inspect.signature(getattr(theirs, name)).parameters)
    assert arguments is None or found == arguments


def test_our_methods_come_before_the_libraries() -> None:
    for ours, theirs in ((SFT, trl.SFTTrainer), (DPO, trl.DPOTrainer)):
        order = inspect.getmro(ours)
        assert order.index(OurTrainer) < order.index(theirs) < order.index(transformers.Trainer)


def test_what_we_call_takes_what_we_give() -> None:
    assert next(iter(inspect.signature(utils.add_fused_lm_head).parameters)) == "model"
    assert "inputs" in inspect.signature(transformers.Trainer._prepare_inputs).parameters
    fields = {field.name for field in dataclasses.fields(utils.FusedCausalLMOutput)}
    assert {"loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask"} <= fields


def source(function: Any) -> str:
    return inspect.getsource(function)


def test_the_trainers_score_by_the_fused_head_that_we_replace_on_a_cpu() -> None:
    call = "fused_lm_head=True"
    assert call in source(trl.SFTTrainer.compute_loss)
    assert "model.forward = types.MethodType" in source(utils.add_fused_lm_head)


def test_the_loss_of_sft_is_not_divided_by_accumulation_steps() -> None:
    text = source(transformers.Trainer.training_step)
    assert "loss_is_scaled_for_ga = self.loss_is_scaled_for_ga" in text
    assert "if not loss_is_scaled_for_ga:" in text
    assert SFT.loss_is_scaled_for_ga is True


def test_gradients_are_exchanged_when_accelerate_is_told_so() -> None:
    assert "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)" in source(
        transformers.Trainer._run_epoch
    )


def test_dpo_s_step_asks_for_the_loss_that_we_put_in_its_place() -> None:
    assert "self._compute_loss(model, inputs, return_outputs)" in source(trl.DPOTrainer.compute_loss)


def test_dpo_s_mean_over_pairs_is_divided_by_the_accumulation_steps() -> None:
    assert trl.DPOTrainer.loss_is_scaled_for_ga is False
    assert "current_gradient_accumulation_steps" in source(transformers.Trainer.training_step)


def test_an_optimizer_step_asks_for_its_micro_batches_at_once() -> None:
    text = source(transformers.Trainer._run_epoch)
    assert "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)" in text
    assert "(step + 1) % self.args.gradient_accumulation_steps == 0" in text


def test_reading_a_stage_s_contract_loads_no_torch() -> None:
    """`align sft --help` must be quick."""
    code = (
        "import sys, align.train.sft, align.train.dpo, align.train.online_dpo as o\n"
        "assert o.STAGE.config().episodes == 3\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
