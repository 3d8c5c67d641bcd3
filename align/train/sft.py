"""Supervised fine-tuning: the Qwen2 report (arXiv:2407.10671, section 4.2).

The loss is the cross-entropy of the assistant's tokens, each turn's end token among them, averaged over the supervised
tokens of the whole global batch: however it is split over micro batches and processes, the gradient is the same.

The defaults are the report's: 2 epochs, learning rate 7e-6 falling to 7e-7, weight decay 0.1, gradient clipping 1.0, up
to 32,768 tokens. It does not give the batch size, the schedule's shape, the warm-up or the masking; those are ours.
Differs from the paper: rows are not packed but batched by length, and longer ones are dropped, not cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.train.settings import Speed, TrainSettings


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
    from trl import SFTConfig

    from align.train import adapters, models, trainer
    from align.train.data import batch_order, tokens_on_disk

    base, table = inputs["model"], inputs["demonstrations"]
    assert isinstance(base, ModelRef) and isinstance(table, Table)  # the pipeline has checked the kinds
    adapters.check_stackable(base, config)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(base)
    arguments = trainer.training_arguments(
        SFTConfig, config, speed, tools, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
    )
    with arguments.main_process_first(local=False):
        rows = encoded(config, tokenizer, table)
        tokens, counts = tokens_on_disk(tools.work / "tokens.arrow", rows, "demonstration")
    first = tokens[0]
    if arguments.process_index == 0:
        tools.progress.say(show(tokenizer, first["input_ids"], first["labels"]))

    lengths = tokens.with_format("numpy")["length"][:]
    order = batch_order(lengths, config.epochs, config.global_batch_size, tools.seed)
    trainer.set_batches(arguments, config.global_batch_size, len(order), speed)
    sft = trainer.SFT(
        config,
        tools,
        model=models.load_policy(base, speed, config, int(lengths.max())),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=tokens.select_columns(["input_ids", "labels"]).select(order),
        peft_config=adapters.lora_of(config, base),
        rows=len(tokens),
    )
    sft.train_or_resume()
    models.save_policy(sft, tokenizer, tools.out / "model", config, base)
    return Result(
        summary=sft.summary()
        | dict(counts)
        | adapters.lineage(base, config)
        | {"loss_over": "supervised tokens of the global batch, all processes"}
    )


def encoded(config: Config, tokenizer: Any, table: Table) -> Iterator[dict[str, list[int]] | str]:
    """Each row's ids and labels, or why it is left out."""
    from align.core.chat import encode_demonstrations
    from align.train.data import silent

    left_out: dict[str, int] = {}

    def training_rows() -> Iterator[Any]:
        for row in table.rows(["prompt_id", "split", "prompt", "completion"]):
            reason = f"split_{row['split']}" if row["split"] != "train" else ""
            if not reason and silent(row["completion"]):
                reason = "empty"
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                yield row

    for number, (ids, labels) in enumerate(
        encode_demonstrations(tokenizer, training_rows(), config.supervise == "all_turns")
    ):
        if len(ids) <= config.max_length:
            yield {"input_ids": ids, "labels": labels}
        elif config.too_long == "error":
            raise DataError(
                f"{table.name}: row {number} of the train split has {len(ids)} tokens, max_length is "
                f"{config.max_length}; raise it, or drop such rows with too_long=drop"
            )
        else:
            yield "too_long"
    for reason, count in left_out.items():
        yield from [reason] * count


def show(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """A row as the trainer sees it, supervised tokens in green between ⟦ and ⟧."""
    text, supervised = "first row: ", False
    for token, label in zip([*ids, None], [*labels, -100], strict=True):
        if (label >= 0) != supervised:
            supervised = not supervised
            text += "\x1b[32m⟦" if supervised else "⟧\x1b[0m"
        if token is not None:
            text += tokenizer.decode([token])
    return text


STAGE = Stage(
    name="sft",
    summary="fine-tune a model on demonstrations",
    config=Config,
    needs={
        "model": Need(Kind.MODEL, "the model to start from: a folder, an adapter folder, or a Hub id"),
        "demonstrations": Need(Kind.DEMONSTRATIONS, "prompts with good completions"),
    },
    gives=Kind.MODEL,
    run=run,
    trains=True,
)
