"""What the trainers share beyond TRL's: order, schedule, curves, checkpoints that survive a kill."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTTrainer

from align.core.errors import RecipeError, RunError
from align.core.router import RouterLoss
from align.core.stage import Tools
from align.train.head import score_labelled_only
from align.train.settings import Speed, TrainSettings

# Its new name is unknown to older versions, and TRL uses the old one itself.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

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
        save_total_limit=1,
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


class OurTrainer:
    """Goes before a TRL trainer among a class's bases.

    The methods that override one of the libraries' are listed, and held to it, in tests/train/test_contract.py.
    """

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

    def __init__(self, settings: TrainSettings, tools: Tools, rows: int, **trl: Any) -> None:
        self.settings, self.tools = settings, tools
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
        self.aux_loss_enabled = False  # TRL's; ours stands beside whatever loss there is
        self.router = RouterLoss(self.model, settings.router_loss_weight)
        self.curves = Curves(tools, self)
        self.add_callback(self.curves)
        self.add_callback(Marks())
        if self.args.use_cpu:
            score_labelled_only(self.model)

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


class SFT(OurTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer on our own ids and labels."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
        """TRL's, and the load-balancing loss of experts."""
        mask = inputs["attention_mask"].bool()
        with self.router.watching():
            loss = super().compute_loss(model, inputs, *rest, num_items_in_batch=num_items_in_batch, **more)
        return loss + self.router.term(1 / self.current_gradient_accumulation_steps, mask)


class Curves(TrainerCallback):  # type: ignore[misc]
    """Writes one line a step to metrics.jsonl and counts the steps on the screen.

    After a kill, lines beyond the checkpoint are taken back.
    """

    def __init__(self, tools: Tools, trainer: OurTrainer) -> None:
        self.tools, self.trainer = tools, trainer
        self.path = tools.out / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []

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
        if self.trainer.announces:
            self.tools.progress.start(state.max_steps, "steps")
            self.tools.progress.advance(behind)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"the loss is {logs['loss']} at step {self.trainer.step}; the training has blown up; "
                "lower learning_rate, or set max_grad_norm"
            )
        self.write(self.trainer.place() | {name: float(value) for name, value in logs.items() if name != "epoch"})
        self.tools.progress.advance(loss=round(logs["loss"], 4))

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Marks(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint that is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every file of the checkpoint is there when this is called."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / DONE).touch()


def whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, if there is one; those that were not are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if (path / DONE).exists()]
    for path in found:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[-1]) if whole else None
