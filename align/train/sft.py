"""Supervised fine-tuning: the Qwen2 report (arXiv:2407.10671, section 4.2).

    loss = -Σ weight · log p(token) / Σ weight

over the assistant's tokens, each turn's end token among them, of the whole global batch: however it is split over micro
batches and processes, the gradient is the same. The weight is that of the token's message, 1 where it has none.

The defaults are the report's: 2 epochs, learning rate 7e-6 falling to 7e-7, weight decay 0.1, gradient clipping 1.0, up
to 32,768 tokens. It does not give the batch size, the schedule's shape, the warm-up or the masking; those are ours.
Differs from the paper: longer rows are dropped, not cut. Rows lie one behind the other without padding, and none sees
another; where a model can't be run so, they are padded. Both give the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from align.core.chat import IGNORED
from align.core.errors import DataError
from align.core.records import Kind
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.train.settings import MERGING_NEEDS, Speed, TrainSettings
from align.train.tau import drift_warnings, merging_figures, optimizer_words, tau_of


class Config(TrainSettings):
    """Settings of `sft`; the defaults are the report's."""

    learning_rate: float = Field(7e-6, gt=0, description="peak learning rate")
    epochs: float = Field(2.0, gt=0, description="passes over the demonstrations")
    max_length: int = Field(32768, ge=8, description="longest row in tokens, prompt and completion together")
    supervise: Literal["completion", "all_turns"] = Field(
        "completion", description="learn from the completion alone, or from the prompt's assistant turns as well"
    )


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Trains a policy on demonstrations and writes it to `tools.out / "model"`."""
    from align.core.start import tell
    from align.train import adapters, models, sft_trainer
    from align.train.batches import Steps
    from align.train.data import batch_order, tokens_on_disk

    base, table = inputs["model"], inputs["demonstrations"]
    assert isinstance(base, ModelRef) and isinstance(table, Table)  # the pipeline has checked the kinds
    adapters.check_stackable(base, config)
    tau = tau_of(config, inputs, base)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(base)
    arguments = sft_trainer.sft_arguments(config, speed, tools)
    with arguments.main_process_first(local=False):
        encoded = tokenized(config, tokenizer, table)
        rows, counts = tokens_on_disk(tools.work / "tokens.arrow", encoded, "demonstration")
    lengths = rows.with_format("numpy")["length"][:]
    sft = sft_trainer.SFT(
        config,
        tools,
        model=models.load_policy(base, speed, config, int(lengths.max())),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=rows,
        peft_config=adapters.lora_of(config, base),
        rows=len(rows),
    )
    order = batch_order(lengths, config.epochs, config.global_batch_size, tools.seed, by_length=False)
    sft.merge_with(tau)
    steps = Steps(rows, order, **sft.split(len(order), speed))
    sft.train_dataset = steps
    start = start_of(config, sft, steps, speed, f"SFT of {base.name} on {table.name}", counts)
    if arguments.process_index == 0:
        tell(start, tools)
    if tools.rehearse:
        return Result(summary={"start": start.figures()})
    sft.train_or_resume()
    models.save_policy(sft, tokenizer, tools.out / "model", config, base)
    return Result(
        summary=sft.summary()
        | dict(counts)
        | adapters.lineage(base, config)
        | merging_figures(config, sft.merges)
        | {"loss_over": "supervised tokens of the global batch, all processes", "start": start.figures()}
    )


def tokenized(config: Config, tokenizer: Any, table: Table) -> Iterator[dict[str, list[int] | list[float]] | str]:
    """Each row as `align.train.batches.Steps` takes it, or why it is left out."""
    from align.core.chat import encode_rows
    from align.train.data import silent

    left_out: dict[str, int] = {}
    columns = ["prompt_id", "split", "prompt", "completion", *(["tools"] if "tools" in table.columns else [])]

    def training_rows() -> Iterator[Any]:
        for row in table.rows(columns):
            reason = f"split_{row['split']}" if row["split"] != "train" else ""
            if not reason and silent(row["completion"]):
                reason = "empty"
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                yield row

    for number, sequences in enumerate(encode_rows(tokenizer, training_rows(), config.supervise == "all_turns")):
        for tokens in sequences:
            if len(tokens.ids) <= config.max_length:
                weights = [weight for _, _, weight in tokens.turns]
                yield {
                    "input_ids": tokens.ids,
                    "turns": [edge for start, end, _ in tokens.turns for edge in (start, end)],
                    "weights": weights if set(weights) != {1.0} else [],
                }
            elif config.too_long == "error":
                raise DataError(
                    f"{table.name}: row {number} of the train split has {len(tokens.ids)} tokens, max_length is "
                    f"{config.max_length}; raise it, or drop such rows with too_long=drop"
                )
            else:
                yield "too_long"
    for reason, count in left_out.items():
        yield from [reason] * count


def start_of(config: Config, sft: Any, steps: Any, speed: Speed, title: str, counts: Mapping[str, int]) -> Any:
    """What is told before the first step."""
    from align.core.cost import shape_of, training_flops, training_seconds
    from align.core.examples import supervised
    from align.core.start import Batch, Start
    from align.train.trainer import learning_rates

    shape, lengths = shape_of(sft.model), steps.lengths
    tokens, learned = int(lengths.sum()), int(steps.supervised.sum())
    passes = len(steps.order) / len(lengths)
    flops = training_flops(
        shape, int(tokens * passes), int(learned * passes), float((lengths**2.0).sum() / tokens / 2),
        recomputed=speed.gradient_checkpointing,
    )  # fmt: skip
    count = len(steps) // steps.processes
    first = steps[0]["parts"]
    # the largest micro batch of the first step, or the longest row, which may come in any and is one by itself
    largest = max(first, key=lambda part: part["input_ids"].numel())
    at_once = max(largest["input_ids"].numel(), int(lengths.max()))
    scored = max(int((largest["weights"] > 0).sum()), int(steps.supervised.max()))
    return Start(
        title=title,
        examples=[
            supervised(sft.processing_class, row["input_ids"], *labels_and_weights(row))
            for row in steps.rows.select(range(min(2, len(steps.rows))))
        ],
        kept=len(lengths),
        left_out={reason: number for reason, number in counts.items() if reason != "rows"},
        tokens=tokens,
        learned_tokens=learned,
        longest=int(lengths.max()),
        max_length=config.max_length,
        batch=Batch(
            rows=min(steps.batch, len(steps.order)),
            at_once=max(int((part["position_ids"] == 0).sum()) for part in first),
            accumulated=len(first),
            processes=steps.processes,
            tokens_at_once=None if speed.micro_batch_size else steps.tokens_at_once,
        ),
        steps=count,
        epochs=config.epochs,
        layout=sft.layout,
        optimizer=optimizer_words(config),
        warnings=drift_warnings(config, count),
        learning_rates=learning_rates(config, count),
        scheduler=config.lr_scheduler,
        loss="cross-entropy of the supervised tokens, averaged over the step"
        + (f" + {sft.router.weight:g} × balance of the experts" if sft.router.weight else ""),
        parameters=shape.parameters,
        trained=shape.trained,
        place=f"{speed.device}, {speed.precision}",
        **sft.memory(speed, at_once, scored),
        seconds=training_seconds(flops, shape, speed.device, speed.precision),
    )


def labels_and_weights(row: Mapping[str, list[Any]]) -> tuple[list[int], list[float]]:
    """Of each token of a row whether it is supervised (itself, or `IGNORED`), and its weight."""
    ids, turns = row["input_ids"], row["turns"]
    labels, weights = [IGNORED] * len(ids), [1.0] * len(ids)
    for place, (start, end) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        labels[start:end] = ids[start:end]
        if row["weights"]:
            weights[start:end] = [row["weights"][place]] * (end - start)
    return labels, weights


STAGE = Stage(
    name="sft",
    summary="fine-tune a model on demonstrations",
    config=Config,
    needs={
        "model": Need(Kind.MODEL, "the model to start from: a folder, an adapter folder, or a Hub id"),
        "demonstrations": Need(Kind.DEMONSTRATIONS, "prompts with good completions"),
        **MERGING_NEEDS,
    },
    gives=Kind.MODEL,
    run=run,
    trains=True,
    version=2,
)
