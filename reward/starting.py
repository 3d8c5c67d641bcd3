"""What the stage `reward` tells before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from align.core.chat import IGNORED
from align.core.cost import shape_of, training_flops, training_seconds
from align.core.examples import group
from align.core.memory import memory_of
from align.core.start import Batch, Start
from reward.batches import reads_flat
from reward.fit import Batches, Schedule, Speed, learning_rate_at
from reward.model import RewardModel

if TYPE_CHECKING:
    from reward.train import Config

FLAT = "flat, without padding: a prompt once, its completions behind it"
PADDED = "a padded row for each completion: this model's attention can't read several behind one prompt"


def start_of(
    config: Config, judge: RewardModel, train: Any, batches: Batches, left_out: Mapping[str, int],
    speed: Speed, processes: int, title: str,
) -> Start:  # fmt: skip
    """The facts of a training that is about to begin; the examples are the first step's first two groups."""
    schedule = Schedule.of(config)
    shape = shape_of(judge.model)
    tokens, learned = (int(np.asarray(train[name]).sum()) for name in ("tokens", "learned"))
    share = len(batches[0]) // processes
    at_once = min(speed.micro_batch, share)
    passes = len(batches) * len(batches[0]) / len(train)
    precision = "bf16" if speed.bf16 else "fp32"
    flops = training_flops(
        shape, tokens=int(tokens * passes), scored=int(learned * passes) if config.head == "logprob" else 0,
        mean_length=float(np.mean(train["length"])) / 2, recomputed=speed.gradient_checkpointing,
    )  # fmt: skip
    return Start(
        title=title,
        examples=[_example(judge.tokenizer, train[int(place)]) for place in batches[0][:2]],
        unit="prompts",
        kept=len(train),
        left_out=left_out,
        tokens=tokens,
        learned_tokens=learned,
        longest=int(np.max(train["length"])),
        max_length=config.max_length,
        batch=Batch(len(batches[0]), at_once, math.ceil(share / speed.micro_batch), processes),
        steps=len(batches),
        epochs=config.epochs,
        layout=FLAT if reads_flat(judge.model) else PADDED,
        loss=_in_words(config),
        optimizer=f"AdamW, weight decay {config.weight_decay:g}, clip {config.max_grad_norm:g}",
        learning_rates=[
            learning_rate_at(int(step), len(batches), schedule) for step in np.linspace(0, len(batches) - 1, 32)
        ],
        scheduler="cosine",
        parameters=shape.parameters,
        trained=shape.trained,
        place=f"{speed.device}, {precision}",
        **memory_of(
            judge.model,
            at_once * int(np.max(train["tokens"])),
            at_once * int(np.max(train["learned"])) if config.head == "logprob" else 0,
            device=speed.device,
            lora_rank=config.lora_rank,
            precision=precision,
            checkpointing=speed.gradient_checkpointing,
        ),
        seconds=training_seconds(flops, shape, speed.device, precision),
    )


def _example(tokenizer: Any, row: Mapping[str, Any]) -> Any:
    begins = [next(at for at, label in enumerate(labels) if label != IGNORED) for labels in row["labels"]]
    completions = [ids[begin:] for ids, begin in zip(row["ids"], begins, strict=True)]
    return group(tokenizer, row["ids"][0][: begins[0]], completions, row["values"])


def _in_words(config: Config) -> str:
    margins = [f"margin {config.margin:g}"] if config.margin else []
    margins += ["the pair's own margin"] if config.use_margins else []
    terms = [", ".join(["Bradley-Terry over all better-worse pairs of a prompt", *margins])]
    if config.centering and config.head == "scalar":
        terms.append(f"{config.centering:g} × centering")
    if config.nll:
        terms.append(f"{config.nll:g} × NLL of the better")
    return " + ".join(terms)
