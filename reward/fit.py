"""How a reward model learns: the loop over batches of groups, which keeps the best weights.

A plain loop, since its batches are groups and its measure is best-of-n: one optimizer step sees `global_batch_size`
prompts and its loss is their mean, however they are split over micro batches and processes. There is no dropout and
the order follows from the seed alone, so a run that was killed goes on from its last checkpoint to the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from align.core.chat import IGNORED
from align.core.errors import RecipeError, RunError
from align.core.records import Row
from align.core.router import RouterLoss
from align.core.stage import Tools
from reward.batches import Rewards
from reward.checkpoint import State, sum_over_processes
from reward.figures import Judged, best_of_n
from reward.loading import device_of
from reward.loss import Objective, batch_loss, encoded_pairs
from reward.model import RewardModel

Batches = list[npt.NDArray[np.int64]]
"""Places of the groups of each optimizer step."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast; the names are those of the stage's settings."""

    learning_rate: float
    epochs: float
    global_batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    evaluations: int
    patience: int

    @staticmethod
    def of(config: Any) -> Schedule:
        """From the stage's settings."""
        return Schedule(**{name: getattr(config, name) for name in Schedule.__slots__})


@dataclass(frozen=True, slots=True)
class Speed:
    """What changes how fast it is and not what comes of it, save by rounding.

    Attributes:
        device: cpu or cuda.
        bf16: whether the forward pass is computed in bfloat16; the weights stay float32.
        micro_batch: groups at once in one process.
        gradient_checkpointing: less memory for more time.
        save_every: optimizer steps between checkpoints.
    """

    device: str
    bf16: bool
    micro_batch: int
    gradient_checkpointing: bool = False
    save_every: int = 500

    @staticmethod
    def of(given: Mapping[str, Any]) -> Speed:
        """From a recipe's words; on a CPU 8 prompts at once, on a GPU 1, unless told otherwise.

        Raises:
            RecipeError: it knows no such device or precision, or there is no such device.
        """
        device = str(given.get("device") or "auto")
        if device not in ("auto", "cpu", "cuda"):
            raise RecipeError(
                f"device: {device}; a training stage takes auto, cpu or cuda, and of several GPUs the first that it "
                "sees (choose another with CUDA_VISIBLE_DEVICES; use several with processes)"
            )
        device = device_of(given)
        precision = given.get("precision") or "auto"
        if precision not in ("auto", "fp32", "bf16"):
            raise RecipeError(f"precision: {precision}; known: auto, fp32, bf16")
        return Speed(
            device,
            bf16=precision == "bf16" or (precision == "auto" and device != "cpu"),
            micro_batch=int(given.get("micro_batch_size") or (8 if device == "cpu" else 1)),
            gradient_checkpointing=bool(given.get("gradient_checkpointing")),
            save_every=int(given.get("save_every") or 500),
        )


FIGURES = ("loss", "accuracy", "reward_better", "reward_worse")
"""Of a step, for the curves: means over its prompts; the rewards are those of the pairs' better and worse sides."""


def fit(
    objective: Objective,
    schedule: Schedule,
    judge: RewardModel,
    train: Any,
    held_out: Any,
    batches: Batches,
    speed: Speed,
    accelerator: Any,
    tools: Tools,
) -> list[dict[str, float]]:
    """Trains `judge.model` in place and leaves it with the weights of the best evaluation.

    Args:
        objective: see there.
        schedule: see there.
        judge: the model to train.
        train: groups on disk, see `reward.comparisons`.
        held_out: groups that best-of-n is measured on.
        batches: see `group_batches`.
        speed: see there.
        accelerator: accelerate's.
        tools: for the checkpoint, the curves and the progress.

    Returns:
        The evaluations: step, best_of_n, and whether it was the best so far.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    trained = [parameter for parameter in judge.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    router = RouterLoss(judge.model, objective.router)
    model, optimizer = accelerator.prepare(Rewards(judge.model, judge.card.head, judge.card.coef), optimizer)
    contested = [i for i, values in enumerate(held_out["values"]) if len(set(values)) > 1]
    measured = held_out.select(contested) if contested else held_out
    evaluate_at = {round(len(batches) * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)} - {0}

    state = State(tools, judge.model, optimizer, {**asdict(schedule), **asdict(objective)})
    if not state.resume(accelerator):
        state.note(best_of_n(judge_groups(judge, measured)), accelerator)
    tools.progress.start(len(batches), "steps")
    tools.progress.advance(state.step)
    if speed.gradient_checkpointing:
        judge.model.gradient_checkpointing_enable({"use_reentrant": False})
        judge.model.enable_input_require_grads()  # or nothing would flow back into LoRA's frozen base
    judge.model.train()
    while state.step < len(batches) and state.stale < schedule.patience:
        begun = perf_counter()
        mine = batches[state.step][rank::world]
        micro = np.array_split(mine, math.ceil(len(mine) / speed.micro_batch))
        rate = learning_rate_at(state.step, len(batches), schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(5, device=accelerator.device)  # the loss, and the figures of `BatchLoss`
        parts = [[train[int(place)] for place in places] for places in micro]
        balance = None
        if router.weight and (len(parts) > 1 or world > 1):
            balance = _balance(router, objective, model, parts, speed, accelerator)
        for number, rows in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                with _computing(speed, accelerator), router.watching():
                    loss, figures, mask = batch_loss(objective, model, rows, accelerator.device)
                if balance is None:
                    routed = router.term(1.0, mask)
                else:
                    routed = router.term(world * float(figures[3]) / balance[1], mask, balance[0])
                accelerator.backward(loss / len(mine) + routed)
                sums += torch.cat([loss.detach()[None], figures])
        norm = float(accelerator.clip_grad_norm_(trained, schedule.max_grad_norm or math.inf))
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        *means, tokens = sum_over_processes(sums, accelerator)
        line = dict(zip(FIGURES, (figure / len(mine) / world for figure in means), strict=True))
        if not math.isfinite(line["loss"]):
            raise RunError(f"reward: the loss is {line['loss']} at step {state.step}; lower learning_rate")
        line |= {"learning_rate": rate, "grad_norm": norm, "tokens_per_second": tokens / (perf_counter() - begun)}
        if router.last is not None:
            line["router_loss"] = router.last
        state.log(accelerator, step=state.step, **line)
        tools.progress.advance(1, loss=round(line["loss"], 3), learning_rate=rate, tokens=round(tokens))
        if state.step in evaluate_at:
            state.note(best_of_n(judge_groups(judge, measured)), accelerator)
        elif state.step % speed.save_every == 0:
            state.save(accelerator)
    state.trackers.close()
    state.restore_best()
    judge.model = accelerator.unwrap_model(model).model
    if speed.gradient_checkpointing:
        judge.model.gradient_checkpointing_disable()
    judge.model.eval()
    return state.history


def _balance(
    router: RouterLoss, objective: Objective, model: Any, parts: list[list[Row]], speed: Speed, accelerator: Any
) -> tuple[torch.Tensor, float]:
    """Shares of the global batch's tokens that go to each expert, (E,), and its tokens: by a pass without gradient.

    So the router loss is that of the global batch, however it is split.
    """
    sums: Any = 0.0
    with torch.no_grad():
        for rows in parts:
            with _computing(speed, accelerator), router.watching():
                _, figures, mask = batch_loss(objective, model, rows, accelerator.device)
            sums = sums + torch.cat([router.counts(mask), figures[3:]])
    *sent, passes, tokens = sum_over_processes(sums, accelerator)
    return torch.tensor(sent, device=accelerator.device) / passes, tokens


def _computing(speed: Speed, accelerator: Any) -> Any:
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=speed.bf16)


def learning_rate_at(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = math.ceil(steps * schedule.warmup_ratio)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def group_batches(
    lengths: npt.NDArray[np.integer[Any]], epochs: float, size: int, seed: int, processes: int = 1
) -> Batches:
    """Places of the groups of each optimizer step; groups of like length meet, so that little is padded.

    Every batch is full: the last one is filled from a further pass. Fewer groups than a batch holds make one batch.

    Args:
        lengths: longest completion of each group, in tokens, (N,).
        epochs: passes.
        size: groups of a batch.
        seed: decides the order.
        processes: that share each batch.

    Raises:
        RecipeError: they can't share it equally.
    """
    rng = np.random.default_rng(seed)
    asked, size = size, min(size, len(lengths))
    if size % processes:
        few = f", but there are {size} to train on, which" if size < asked else ""
        fewer = max(n for n in range(1, processes + 1) if size % n == 0)
        multiple = f"use a multiple of {processes}"
        if size < asked:
            multiple = f"set it to {size - size % processes}" if size > processes else "give more prompts"
        raise RecipeError(
            f"global_batch_size: {asked} prompts{few} can't be shared equally by {processes} processes; {multiple}, "
            f"or processes={fewer}"
        )
    steps = max(1, math.ceil(len(lengths) * epochs / size))
    passes = math.ceil(steps * size / len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(passes)])[: steps * size]
    batches: Batches = []
    for start in range(0, len(order), 8 * size):
        window = order[start : start + 8 * size]
        window = window[np.argsort(lengths[window], kind="stable")]
        parts = window.reshape(-1, size)
        batches += [parts[i] for i in rng.permutation(len(parts))]
    return batches


def judge_groups(judge: RewardModel, groups: Any, at_once: int = 256) -> list[Judged]:
    """Scores every completion of groups on disk."""
    judged = []
    for start in range(0, len(groups), at_once):
        rows = [groups[i] for i in range(start, min(start + at_once, len(groups)))]
        pairs = [pair for row in rows for pair in encoded_pairs(row)]
        scores = iter(judge.score_encoded(pairs))
        for row in rows:
            lengths = [sum(label != IGNORED for label in labels) for labels in row["labels"]]
            own = [next(scores) for _ in lengths]
            judged.append(Judged(row["family"], row["values"], row["counts"], own, lengths))
    return judged
