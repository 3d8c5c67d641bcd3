"""What the trainers share beyond TRL's: schedule, arguments, order, and how a split leaves the gradient alone."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from align.core.chat import IGNORED
from align.core.errors import RecipeError
from align.core.router import RouterLoss
from align.core.segments import model_inputs
from align.core.stage import Tools
from align.train.callbacks import Curves, Marks, MergesTheRest, whole_checkpoint
from align.train.head import score_labelled_only
from align.train.settings import Speed, TrainSettings
from align.train.tau import Tau

# Its new name is unknown to older versions, and TRL uses the old one itself.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


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
    get_decay_parameter_names: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
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
        self.tau: Tau | None = None
        self.merging: Any = None  # the Online Merging Optimizer
        if self.args.use_cpu:
            keep_freed_memory()

    def merge_with(self, tau: Tau | None) -> None:
        """Takes what the Online Merging Optimizer steers by, where there is any; its names and shapes are checked."""
        if self.settings.merging != "none" and self.is_deepspeed_enabled:
            raise RecipeError(
                f"merging: {self.settings.merging} needs parameters as they are, and DeepSpeed lays them in one; start "
                "without it, with FSDP2 where one process has not the memory"
            )
        sharding = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.settings.merging != "none" and sharding is not None and sharding.fsdp_version == 1:
            raise RecipeError(
                f"merging: {self.settings.merging} needs parameters as they are, and the first FSDP lays them in one; "
                "set fsdp_version to 2"
            )
        if tau is not None:
            tau.check(self.model)
        self.tau = tau

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

    def lines_behind(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Which lines of the curves are behind, of those that an earlier attempt has left."""
        return [line for line in lines if line["step"] <= self.step] if self.step else []

    def place(self) -> dict[str, float]:
        """Where the training is, for the curves."""
        return {"step": self.step, "epoch": round(self.step * self.settings.global_batch_size / self.rows, 4)}

    def progress(self, step: float, steps: int) -> float:
        """How much of the training is behind at a step (in its middle, so that a warm-up's first step moves)."""
        return step / steps

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW's, or the Online Merging Optimizer with the same groups."""
        settings = self.settings
        if self.optimizer is not None or settings.merging == "none":
            return super().create_optimizer(model)  # type: ignore[misc]
        from align.train.merging import Merging, MergingAdamW

        model = self.model if model is None else model
        decays = set(self.get_decay_parameter_names(model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [each for each in named if each[0] in decays], "weight_decay": settings.weight_decay},
            {"params": [each for each in named if each[0] not in decays], "weight_decay": 0.0},
        ]
        self.optimizer = self.merging = MergingAdamW(
            [group for group in groups if group["params"]],
            Merging(
                method=settings.merging,
                alpha=settings.merging_alpha,
                keep=settings.merging_keep,
                as_in=settings.merging_as_in,
                every=settings.merging_every,
                seed=self.tools.seed,
            ),
            self.tau,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        if settings.merging_every > 1:
            self.add_callback(MergesTheRest(self.optimizer))
        return self.optimizer

    def merge_the_rest(self) -> None:
        """Merges what steps have gathered, where the Online Merging Optimizer merges every few of them."""
        if self.merging is not None:
            self.merging.finish()

    @property
    def merges(self) -> int:
        """How often the Online Merging Optimizer has merged; what was undone doesn't count."""
        return 0 if self.merging is None else self.merging.merges

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


def token_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Which places of padded rows hold tokens, (B, T); None for a flat batch, where all do."""
    return None if "segments" in batch else batch["attention_mask"].bool()
