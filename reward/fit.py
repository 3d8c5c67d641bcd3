"""How a reward model learns: the loss over groups of completions, and the loop that keeps the best weights.

A plain loop, since its batches are groups and its measure is best-of-n: one optimizer step sees `global_batch_size`
prompts and its loss is their mean, however they are split over micro batches and processes. There is no dropout and
the order follows from the seed alone, so a run that was killed goes on from its last evaluation to the same weights.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.chat import IGNORED
from align.core.errors import RecipeError, RunError
from align.core.records import Row
from align.core.stage import Tools
from reward.batches import Encoded, batch_rewards
from reward.checkpoint import State, mean_over_processes
from reward.figures import Judged, best_of_n
from reward.model import Card, RewardModel


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised; see `group_loss`.

    Attributes:
        margin: by how much a better completion should score higher, at least.
        centering: weight of the squared sum of a pair's rewards.
        nll: weight of the better completions' mean negative log-probability per token (log-prob head only).
    """

    margin: float = 0.0
    centering: float = 0.0
    nll: float = 0.0


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


def group_loss(rewards: Tensor, values: Tensor, groups: Tensor, margin: float, centering: float) -> Tensor:
    """Bradley-Terry averaged over each group's better-worse pairs, summed over groups.

    Of a pair: −log σ(r_w − r_l − margin) + centering · (r_w + r_l)². Averaging over all pairs of a prompt makes every
    prompt count the same and lets each completion be computed once; centering is that of arXiv:2312.09244.

    Args:
        rewards: of completions, (B,).
        values: what they are worth; a pair is any two of one group with unequal values, (B,).
        groups: number of each completion's group, from 0, (B,).
        margin: see `Objective`.
        centering: see `Objective`.
    """
    pair = (groups[:, None] == groups[None, :]) & (values[:, None] > values[None, :])
    better, worse = pair.nonzero(as_tuple=True)
    loss = -F.logsigmoid(rewards[better] - rewards[worse] - margin)
    loss = loss + centering * (rewards[better] + rewards[worse]) ** 2
    pairs_of_group = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    return (loss / pairs_of_group[groups[better]]).sum()


def batch_loss(objective: Objective, model: Any, card: Card, rows: list[Row], device: Any) -> Tensor:
    """The loss of some groups, summed over them."""
    encoded = [pair for row in rows for pair in encoded_pairs(row)]
    values = torch.tensor([value for row in rows for value in row["values"]], device=device)
    groups = torch.tensor([number for number, row in enumerate(rows) for _ in row["values"]], device=device)
    rewards = batch_rewards(model, card.head, card.coef, encoded)
    loss = group_loss(rewards, values, groups, objective.margin, objective.centering)
    if objective.nll:
        tokens = [sum(label != IGNORED for label in labels) for _, labels in encoded]
        per_token = -rewards / card.coef / torch.tensor(tokens, device=device)
        worst = torch.full((len(rows),), math.inf, device=device).scatter_reduce(0, groups, values.float(), "amin")
        better = values > worst[groups]
        of_group = torch.bincount(groups[better], minlength=len(rows))
        loss = loss + objective.nll * (per_token[better] / of_group[groups[better]]).sum()
    return loss


def fit(
    objective: Objective,
    schedule: Schedule,
    judge: RewardModel,
    train: Any,
    held_out: Any,
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
        speed: see there.
        accelerator: accelerate's.
        tools: for the checkpoint, the curves and the progress.

    Returns:
        The evaluations: step, best_of_n, and whether it was the best so far.
    """
    batches = group_batches(np.asarray(train["length"]), schedule.epochs, schedule.global_batch_size, tools.seed)
    world, rank = accelerator.num_processes, accelerator.process_index
    if len(batches[0]) % world:
        raise RecipeError(f"global_batch_size: {len(batches[0])} prompts can't be shared by {world} processes")
    trained = [parameter for parameter in judge.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    model, optimizer = accelerator.prepare(judge.model, optimizer)
    contested = [i for i, values in enumerate(held_out["values"]) if len(set(values)) > 1]
    measured = held_out.select(contested) if contested else held_out
    evaluate_at = {round(len(batches) * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)} - {0}

    state = State(tools, judge.model, optimizer)
    if not state.resume(accelerator):
        state.note(best_of_n(judge_groups(judge, measured)), accelerator)
    tools.progress.start(len(batches), "steps")
    tools.progress.advance(state.step)
    if speed.gradient_checkpointing:
        judge.model.gradient_checkpointing_enable({"use_reentrant": False})
        judge.model.enable_input_require_grads()  # or nothing would flow back into LoRA's frozen base
    judge.model.train()
    while state.step < len(batches) and state.stale < schedule.patience:
        mine = batches[state.step][rank::world]
        micro = np.array_split(mine, math.ceil(len(mine) / speed.micro_batch))
        rate = learning_rate_at(state.step, len(batches), schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for number, places in enumerate(micro):
            last = number == len(micro) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=speed.bf16):
                    rows = [train[int(place)] for place in places]
                    part = batch_loss(objective, model, judge.card, rows, accelerator.device)
                    part = part / len(mine)
                accelerator.backward(part)
                loss += float(part.detach())
        norm = float(accelerator.clip_grad_norm_(trained, schedule.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        loss = mean_over_processes(loss, accelerator)
        if not math.isfinite(loss):
            raise RunError(f"reward: the loss is {loss} at step {state.step}; lower learning_rate")
        state.log(accelerator, step=state.step, loss=loss, learning_rate=rate, grad_norm=norm)
        tools.progress.advance(1, loss=round(loss, 3))
        if state.step in evaluate_at:
            state.note(best_of_n(judge_groups(judge, measured)), accelerator)
        elif state.step % speed.save_every == 0:
            state.save(accelerator)
    state.restore_best()
    judge.model = accelerator.unwrap_model(model)
    if speed.gradient_checkpointing:
        judge.model.gradient_checkpointing_disable()
    judge.model.eval()
    return state.history


def learning_rate_at(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = math.ceil(steps * schedule.warmup_ratio)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def group_batches(
    lengths: npt.NDArray[np.integer[Any]], epochs: float, size: int, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Places of the groups of each optimizer step; groups of like length meet, so that little is padded.

    Every batch is full: the last one is filled from a further pass. Fewer groups than a batch holds make one batch.

    Args:
        lengths: longest completion of each group, in tokens, (N,).
        epochs: passes.
        size: groups of a batch.
        seed: decides the order.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(lengths))
    steps = max(1, math.ceil(len(lengths) * epochs / size))
    passes = math.ceil(steps * size / len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(passes)])[: steps * size]
    batches: list[npt.NDArray[np.int64]] = []
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


def encoded_pairs(row: Row) -> list[Encoded]:
    """The completions of a group on disk, each with its prompt."""
    return list(zip(row["ids"], row["labels"], strict=True))
