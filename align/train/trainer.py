"""What the trainers share beyond TRL's: order, schedule, curves, checkpoints that survive a kill."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from align.core.chat import IGNORED
from align.core.errors import RecipeError, RunError
from align.core.memory import memory_of
from align.core.router import RouterLoss
from align.core.segments import can_be_flat, model_inputs
from align.core.stage import Tools
from align.core.trackers import Trackers, open_trackers
from align.train.batches import AT_ONCE
from align.train.head import score_labelled_only
from align.train.settings import Speed, TrainSettings

# Its new name is unknown to older versions, and TRL uses the old one itself.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
DONE = "done"
"""A file that is written into a checkpoint last: a folder without it was cut off by a kill."""


def learning_rate_factor(settings: TrainSettings, progress: float) -> float:
    """The share of the peak learning rate when `progress` of the training, in [0, 1], is behind."""
    if progress < settings.warmup_ratio:
        return progress / settings.warmup_ratio
    if settings.lr_scheduler == "constant":
        return 1.0
    after = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    left = 1 - after if settings.lr_scheduler == "linear" else (1 + math.cos(math.pi * min(after, 1.0))) / 2
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * max(left, 0.0)


def learning_rates(settings: TrainSettings, steps: int, most: int = 32) -> list[float]:
    """The learning rate at evenly spaced steps from the first to the last."""
    places = sorted({round(i * (steps - 1) / max(1, most - 1)) for i in range(most)})
    return [settings.learning_rate * learning_rate_factor(settings, (place + 0.5) / steps) for place in places]


def training_arguments(kind: type[Any], settings: TrainSettings, speed: Speed, tools: Tools, **more: Any) -> Any:
    """TRL's arguments (an SFTConfig or a DPOConfig), everything said that we rely on.

    Making them joins the processes of a launch; only after that the number of processes is known.
    """
    arguments = kind(
        output_dir=str(tools.work / "checkpoints"),
        num_train_epochs=1,  # the data hold all epochs in order, see align/train/data.py
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        seed=tools.seed % 2**32,
        use_cpu=speed.device == "cpu",
        bf16=speed.precision == "bf16",
        gradient_checkpointing=speed.gradient_checkpointing,
        average_tokens_across_devices=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=speed.save_every,
        save_total_limit=None,  # see `Marks`
        dataloader_num_workers=0,
        dataloader_pin_memory=speed.device != "cpu",
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        **more,
    )
    if arguments.n_gpu > 1:  # one process trains on one GPU, however many it sees; several are for several processes
        arguments._n_gpu = 1
    return arguments


def set_batches(arguments: Any, global_batch_size: int, rows: int, speed: Speed) -> None:
    """Splits the global batch, or all the rows where they are fewer, into equal micro batches.

    Equal, because DPO averages the means of micro batches.
    """
    micro, accumulation = speed.split(min(global_batch_size, rows), arguments.world_size)
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = accumulation


def keep_freed_memory() -> None:
    """Has the C library keep what large tensors leave, and not ask the system for it anew, zeroed, at every step.

    On a CPU that is a tenth of the time of a small model's step. Elsewhere than in glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class OurTrainer:
    """Goes before a TRL trainer among a class's bases.

    The methods that override one of the libraries' are listed, and held to it, in tests/train/test_contract.py.
    """

    accelerator: Any
    args: Any
    state: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    add_callback: Any
    remove_callback: Any
    train: Any
    announces = True
    own_head: bool
    """Whether the model has the head of align/train/head.py, and not TRL's."""
    figures: dict[str, float]
    """Of the last step, for its line of the curves: `tokens`, `supervised_tokens`."""

    def __init__(self, settings: TrainSettings, tools: Tools, rows: int, **trl: Any) -> None:
        self.settings, self.tools, self.figures = settings, tools, {}
        try:
            super().__init__(**trl)
        except ValueError as problem:
            if "Target modules" not in str(problem):
                raise
            raise RecipeError(
                f"lora_targets: the model has no module {settings.lora_targets}; give names of its linear layers, "
                "such as q_proj, or all-linear"
            ) from problem
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)  # the step's own progress speaks
        self.rows = rows
        for weight in self.model.parameters():  # TRL makes QLoRA's adapters bf16, where small updates vanish
            if weight.requires_grad and weight.dtype == torch.bfloat16:
                weight.data = weight.data.float()
        self.aux_loss_enabled = False  # TRL's; ours stands beside whatever loss there is
        self.router = RouterLoss(self.model, settings.router_loss_weight)
        self.curves = Curves(tools, self)
        self.add_callback(self.curves)
        self.add_callback(Marks(self))
        self.own_head = score_labelled_only(self.model)
        if self.args.use_cpu:
            keep_freed_memory()

    def train_or_resume(self) -> None:
        """Trains to the end, from the newest whole checkpoint where a kill left one."""
        self.train(resume_from_checkpoint=whole_checkpoint(Path(self.args.output_dir)))

    def summary(self) -> dict[str, Any]:
        """Figures of the run: mean loss of the last tenth of the steps, and by what it is normalised."""
        losses = [line["loss"] for line in self.curves.lines if "loss" in line]
        last = losses[-max(1, len(losses) // 10) :]
        return {"steps": self.step, "loss": sum(last) / len(last) if last else None}

    @property
    def step(self) -> int:
        """Optimizer steps that are behind."""
        return int(self.state.global_step)

    def experts_load(self, model: Any, parts: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        """The share of a step's tokens that each expert gets, (E,); None where no loss asks for it.

        The load-balancing loss is a product of two means over tokens, of which this one has no gradient. So where a
        step is split, it is taken over the whole step by a pass without gradient, and the rest is a sum over micro
        batches: the gradient does not depend on the split.

        Args:
            model: as it is trained.
            parts: the micro batches of this process.
        """
        if not self.router.weight or (len(parts) == 1 and self.accelerator.num_processes == 1):
            return None
        counts: Any = 0
        for part in parts:
            nothing = {"shift_labels": torch.full_like(part["shift_labels"], IGNORED)}  # no head is needed
            with torch.no_grad(), self.accelerator.autocast(), self.router.watching():
                model(**(model_inputs(part) | nothing), fused_lm_head=True)
            counts = counts + self.router.counts(token_mask(part))
        counts = self.accelerator.reduce(counts, "sum")
        load: torch.Tensor = counts[:-1] / counts[-1]
        return load

    def place(self) -> dict[str, float]:
        """Where the training is, for the curves."""
        return {"step": self.step, "epoch": round(self.step * self.settings.global_batch_size / self.rows, 4)}

    def progress(self, step: float, steps: int) -> float:
        """How much of the training is behind at a step (in its middle, so that a warm-up's first step moves)."""
        return step / steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Ours, for its floor: the report's 7e-6 falls to 7e-7."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(self.settings, self.progress(step + 0.5, num_training_steps)),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """In the order of the data, which `batch_order` has shuffled."""
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The step's manifest says what made the model."""

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""


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


def token_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which places of padded rows hold tokens, (B, T); None for a flat batch, where all do."""
    return None if "segments" in batch else batch["attention_mask"].bool()


class Curves(TrainerCallback):  # type: ignore[misc]
    """Writes one line a step to metrics.jsonl and to the trackers, and counts the steps on the screen.

    After a kill, lines beyond the checkpoint are taken back.
    """

    def __init__(self, tools: Tools, trainer: OurTrainer) -> None:
        self.tools, self.trainer = tools, trainer
        self.path = tools.out / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        self.trackers: Trackers | None = None
        self.since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the lines that are there already."""
        if not state.is_world_process_zero:
            return
        behind = self.trainer.step
        before = self.path.read_text().splitlines() if self.path.exists() and behind else []
        kept = [json.loads(line) for line in before if line.endswith("}")]
        self.lines = [line for line in kept if line["step"] <= behind]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.trackers = open_trackers(self.tools, self.trainer.settings.model_dump(), self.lines)
        if self.trainer.announces:
            self.tools.progress.start(state.max_steps, "steps")
            self.tools.progress.advance(behind)
        self.since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"the loss is {logs['loss']} at step {self.trainer.step}; the training has blown up; "
                "lower learning_rate, or set max_grad_norm"
            )
        figures = self.trainer.figures
        line = self.trainer.place() | {name: float(value) for name, value in logs.items() if name != "epoch"} | figures
        if self.trainer.router.last is not None:
            line["router_loss"] = self.trainer.router.last
        now = time.monotonic()
        if tokens := figures.get("tokens"):
            line["tokens_per_second"] = round(tokens / (now - self.since), 1)
        self.since = now
        self.write(line)
        shown = {"learning_rate": logs["learning_rate"]} if "learning_rate" in logs else {}
        self.tools.progress.advance(loss=round(logs["loss"], 4), **shown, **({"tokens": int(tokens)} if tokens else {}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No line comes any more."""
        if self.trackers is not None:
            self.trackers.close()

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; every one goes through here."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.trackers is not None:
            self.trackers.log(line)


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint that is whole, and removes those before it.

    In this order, so that at every moment one whole checkpoint is marked: transformers' own rotation removes the old
    one before anybody knows that the new one is whole.
    """

    def __init__(self, trainer: OurTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """This process's files of the checkpoint are there when this is called."""
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / DONE).touch()
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            if folder.name != f"checkpoint-{state.global_step}":
                (folder / DONE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, if there is one; those that were not are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if (path / DONE).exists()]
    for path in found:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[-1]) if whole else None
