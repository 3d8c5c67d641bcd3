"""TRL's SFT trainer with batches and a loss of our own; see align/train/batches.py for what a batch is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from trl import SFTConfig, SFTTrainer

from align.core.errors import RecipeError
from align.core.memory import memory_of
from align.core.segments import can_be_flat, model_inputs
from align.core.stage import Tools
from align.train.batches import AT_ONCE
from align.train.settings import Speed, TrainSettings
from align.train.tau import merging_bytes
from align.train.trainer import OurTrainer, token_mask, training_arguments


def layout_of(model: Any, speed: Speed, own_head: bool) -> tuple[bool, str]:
    """Whether rows lie one behind the other without padding, and why, in words; `own_head`: it has the head of ours."""
    if not own_head or not can_be_flat(model, speed.precision):
        why = "this model's attention can't be taken apart by rows" if own_head else "this model scales its logits"
        return False, f"padded, rows of like length together: {why}"
    varlen = speed.device != "cpu" and speed.precision == "bf16"
    return True, f"flat, without padding: attention {'over rows of unlike length (varlen)' if varlen else 'row by row'}"


def sft_arguments(settings: TrainSettings, speed: Speed, tools: Tools) -> Any:
    """TRL's arguments for `SFT`, which splits steps itself."""
    return training_arguments(
        SFTConfig,
        settings,
        speed,
        tools,
        max_length=None,  # the rows have been measured; nothing is cut
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        remove_unused_columns=False,
    )


class SFT(OurTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our own batches and loss; see align/train/batches.py for what an item of the data is.

    loss = -Σ weight · log p(token) / Σ weight, both over the supervised tokens of the global batch, all processes
    """

    loss_is_scaled_for_ga = True  # the loss is divided by the weight of the whole step, not of a micro batch

    def __init__(self, settings: TrainSettings, tools: Tools, rows: int, **trl: Any) -> None:
        super().__init__(settings, tools, rows, **trl)
        self.data_collator = lambda items: items[0]  # an item is a process's share of a step
        self.step_weight = self.positions = 1.0
        self.load: torch.Tensor | None = None
        self.layout = ""

    def split(self, rows: int, speed: Speed) -> dict[str, Any]:
        """How steps are split and rows lie, as `align.train.batches.Steps` is told; says in `layout` why.

        Args:
            rows: of all steps.
            speed: whose `micro_batch_size` counts, where it isn't 0, in place of tokens.

        Raises:
            RecipeError: a step has fewer rows than there are processes.
        """
        batch, processes = self.settings.global_batch_size, self.args.world_size
        if min(batch, rows) < processes:
            raise RecipeError(
                f"global_batch_size: a step of {min(batch, rows)} rows can't be shared by {processes} processes; "
                "use more rows, or fewer processes"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if min(batch, rows) % processes:
                raise RecipeError(
                    f"global_batch_size: {min(batch, rows)} rows of a step can't be shared evenly by {processes} "
                    f"processes, which sharded weights need; use a multiple of {processes}"
                )
            if self.settings.lora_rank:
                raise RecipeError(
                    "lora_rank: adapters are not gathered from sharded weights when they are saved; start without FSDP "
                    "and DeepSpeed (adapters need little memory), or set lora_rank to 0"
                )
        flat, self.layout = layout_of(self.model, speed, self.own_head)
        return {
            "batch": batch,
            "processes": processes,
            "flat": flat,
            "tokens_at_once": 2**62 if speed.micro_batch_size else self.fitting(speed),
            "rows_at_once": speed.micro_batch_size or 2**62,
            "pad_id": self.processing_class.pad_token_id,
        }

    def memory(self, speed: Speed, tokens: int, labelled: int) -> dict[str, Any]:
        """`memory`: bytes that micro batches of so many tokens need, by part; and `memory_there`, the model's too."""
        settings = self.settings
        return memory_of(
            self.model,
            tokens,
            labelled,
            device=speed.device,
            lora_rank=settings.lora_rank,
            lora_targets=settings.lora_targets,
            quantization=settings.quantization,
            precision=speed.precision,
            checkpointing=speed.gradient_checkpointing,
            merging=merging_bytes(settings),
        )

    def fitting(self, speed: Speed) -> int:
        """Tokens of a micro batch: `AT_ONCE`, or as many as there is memory for.

        The first process decides for all, and its answer outlives a kill: another split would round otherwise.
        """
        file = self.tools.work / "tokens_at_once.json"
        if self.accelerator.is_main_process and not file.exists():
            told = self.memory(speed, 1024, 1024)
            needed = told["memory"]
            left = 0.9 * told["memory_there"] - (sum(needed.values()) - needed["activations"])
            tokens = max(1, min(AT_ONCE[speed.device], int(left / needed["activations"] * 1024)))
            part = file.with_suffix(".part")
            part.write_text(json.dumps(tokens))
            part.replace(file)
        found = [json.loads(file.read_text()) if self.accelerator.is_main_process else None]
        return int(broadcast_object_list(found)[0])

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The micro batches of this process one after the other; gradients are exchanged with the last one's."""
        self.figures = {"tokens": inputs["tokens"], "supervised_tokens": inputs["supervised"]}
        self.step_weight, self.positions, parts = inputs["weight"], inputs["positions"], inputs["parts"]
        model.train()
        self.load = self.experts_load(model, [self._prepare_inputs(part) for part in parts])
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part)
        return loss

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        """This micro batch's part of the loss, times the processes, whose gradients are averaged."""
        with self.router.watching():
            out = model(**model_inputs(inputs), fused_lm_head=True)
        loss: torch.Tensor = -(inputs["weights"] * out.log_probs).sum() / self.step_weight
        if self.router.weight:
            mask = token_mask(inputs)
            share = float(inputs["input_ids"].numel() if mask is None else mask.sum()) / self.positions
            loss = loss + self.router.term(share, mask, self.load)
        return loss * int(self.accelerator.num_processes)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here."""
        return 0
