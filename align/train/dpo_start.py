"""What a DPO run is, told before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from align.core.cost import shape_of, training_flops, training_seconds
from align.core.examples import pair
from align.core.memory import memory_of
from align.core.start import Batch, Start
from align.train.preference import DPO
from align.train.settings import DPOSettings, Speed
from align.train.tau import drift_warnings, merging_bytes, optimizer_words
from align.train.trainer import learning_rates


def lengths_of(pairs: Any) -> npt.NDArray[np.int64]:
    """Tokens of each pair's prompt, chosen and rejected, (N, 3)."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return np.stack([pc.list_value_length(pairs.data.column(name)).to_numpy() for name in names], 1).astype(np.int64)


def longest(lengths: npt.NDArray[np.int64]) -> int:
    """Tokens of the longest prompt with either of its completions."""
    return int((lengths[:, 0] + lengths[:, 1:].max(1)).max())


def start_of(
    config: DPOSettings,
    dpo: DPO,
    title: str,
    pairs: Any,
    lengths: npt.NDArray[np.int64],
    counts: Mapping[str, int],
    speed: Speed,
    held: bool,
) -> Start:
    """What the training is, told before its first step.

    Args:
        lengths: see `lengths_of`.
        counts: of pairs, kept and left out.
        held: whether a reference model is in memory beside the policy.
    """
    arguments = dpo.args
    micro, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    rows = micro * accumulated * arguments.world_size
    steps = max(1, math.ceil(len(pairs) * config.epochs / rows))
    learned = lengths[:, 1:].sum(1)
    read = lengths.sum(1) if dpo.flat else lengths[:, 0] + lengths.sum(1)
    shape = shape_of(dpo.model)
    flops = training_flops(
        shape,
        tokens=int(read.sum() * config.epochs),
        scored=int(learned.sum() * config.epochs),
        mean_length=float(lengths.sum(1).mean() / 2),
        only_forward=int(read.sum()),
        recomputed=arguments.gradient_checkpointing,
    )
    terms = [
        f"{weight:g} × {name}" if weight != 1 else name
        for name, weight in zip(config.losses, config.loss_weights or [1.0] * len(config.losses), strict=True)
    ]
    nll = f" + {config.nll_weight:g} × NLL of the chosen" if config.nll_weight else ""
    first = pairs[0]
    return Start(
        title=title,
        examples=[pair(dpo.processing_class, first["prompt_ids"], first["chosen_ids"], first["rejected_ids"])],
        unit="pairs",
        kept=len(pairs),
        left_out={reason: count for reason, count in counts.items() if reason != "rows"},
        tokens=int(lengths.sum()),
        learned_tokens=int(learned.sum()),
        longest=longest(lengths),
        max_length=config.max_length,
        batch=Batch(rows=rows, at_once=micro, accumulated=accumulated, processes=arguments.world_size),
        steps=steps,
        epochs=config.epochs,
        layout="flat, without padding, a prompt once for both completions"
        if dpo.flat
        else "padded, a prompt with each completion: this model's attention can't be taken apart by rows",
        optimizer=optimizer_words(config),
        warnings=drift_warnings(config, steps),
        learning_rates=learning_rates(config, steps),
        scheduler=config.lr_scheduler,
        loss=f"{' + '.join(terms)} (beta {config.beta:g}){nll}",
        parameters=shape.parameters,
        trained=shape.trained,
        place=f"{speed.device}, {speed.precision}",
        **memory_of(
            dpo.model,
            int(np.sort(read)[-micro:].sum()),
            int(np.sort(learned)[-micro:].sum()),
            device=speed.device,
            lora_rank=config.lora_rank,
            lora_targets=config.lora_targets,
            quantization=config.quantization,
            precision=speed.precision,
            checkpointing=speed.gradient_checkpointing,
            reference=held,
            merging=merging_bytes(config),
        ),
        seconds=training_seconds(flops, shape, speed.device, speed.precision),
    )
