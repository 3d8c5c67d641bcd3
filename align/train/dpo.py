"""Direct Preference Optimization (arXiv:2305.18290) on a fixed set of pairs: the report's offline stage (section 4.3).

    loss = -log sigmoid(beta * (chosen's log-ratio - rejected's log-ratio)) + nll_weight * NLL(chosen) / |chosen|

A log-ratio is log policy - log reference of a whole completion. The second term (RPO, arXiv:2404.19733) is the guard
against likelihood displacement: both probabilities falling while the margin grows.

The report gives no settings. The defaults are the nearest official ones, Qwen2.5's (arXiv:2412.15115): 1 epoch,
learning rate 7e-7; beta, batch and schedule are ours.
Differs from the paper: the optimizer is AdamW, not yet the Online Merging Optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.train.settings import LOSS_OVER, DPOSettings, Speed


class Config(DPOSettings):
    """Settings of `dpo`."""

    learning_rate: float = Field(7e-7, gt=0, description="peak learning rate")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_length: int = Field(8192, ge=8, description="longest prompt with either completion, in tokens")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0"
    )
    warn_chosen_drop: float = Field(
        10.0, gt=0, description="warn when the chosen's log-probability has fallen by more than this, in nats"
    )


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Trains a policy on preferences and writes it to `tools.out / "model"`."""
    from align.train import adapters, models
    from align.train.data import batch_order, tokens_on_disk
    from align.train.preference import DPO, dpo_arguments
    from align.train.trainer import set_batches

    policy, table = inputs["policy"], inputs["preferences"]
    reference = inputs.get("reference", policy)
    assert isinstance(policy, ModelRef) and isinstance(reference, ModelRef) and isinstance(table, Table)
    adapters.check_stackable(policy, config)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(policy)
    arguments = dpo_arguments(config, speed, tools)
    with arguments.main_process_first(local=False):
        pairs, counts = tokens_on_disk(tools.work / "pairs.arrow", encoded(config, tokenizer, table), "pair")
    if arguments.process_index == 0:
        tools.progress.say(show(tokenizer, pairs[0]))

    order = batch_order(pairs.with_format("numpy")["length"][:], config.epochs, config.global_batch_size, tools.seed)
    set_batches(arguments, config.global_batch_size, len(order), speed)
    dpo = DPO(
        config,
        tools,
        model=models.load_policy(policy, speed, config, longest(pairs)),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=pairs,
        peft_config=adapters.lora_of(config, policy),
        rows=len(pairs),
    )
    dpo.starts_at_reference = reference.fingerprint == policy.fingerprint
    elsewhere = None if dpo.starts_at_reference else reference
    with_reference = reference_columns(dpo, pairs, elsewhere, speed, tools, config)
    dpo.train_dataset = with_reference.remove_columns("length").select(order)
    dpo.train_or_resume()
    models.save_policy(dpo, tokenizer, tools.out / "model", config, policy)

    summary = dpo.summary() | dict(counts)
    summary |= adapters.lineage(policy, config) | {"reference": reference.name, "loss_over": LOSS_OVER}
    summary["chosen_logp_change"] = dpo.chosen_change()
    if summary["chosen_logp_change"] < -config.warn_chosen_drop:
        summary["warnings"] = [
            f"the chosen completions lost {-summary['chosen_logp_change']:.1f} nats of log-probability (likelihood "
            "displacement); raise nll_weight or beta, or lower learning_rate"
        ]
        tools.progress.say(f"warning: {summary['warnings'][0]}")
    return Result(summary=summary)


def encoded(config: Config, tokenizer: Any, table: Table) -> Iterator[dict[str, list[int]] | str]:
    """Each pair's ids, or why it is left out."""
    from align.core.chat import encode_pairs
    from align.train.data import silent

    left_out: dict[str, int] = {}

    def training_rows() -> Iterator[Any]:
        for row in table.rows(["prompt_id", "split", "prompt", "chosen", "rejected"]):
            reason = f"split_{row['split']}" if row["split"] != "train" else ""
            if not reason and silent(row["chosen"]):
                reason = "empty_chosen"
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                yield row

    for number, (prompt, chosen, rejected) in enumerate(encode_pairs(tokenizer, training_rows())):
        length = len(prompt) + max(len(chosen), len(rejected))
        if chosen == rejected:
            yield "identical"
        elif length <= config.max_length:
            yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        elif config.too_long == "error":
            raise DataError(
                f"{table.name}: pair {number} of the train split has {length} tokens, max_length is "
                f"{config.max_length}; raise it, or drop such pairs with too_long=drop"
            )
        else:
            yield "too_long"
    for reason, count in left_out.items():
        yield from [reason] * count


def longest(pairs: Any) -> int:
    """Tokens of the longest prompt with either completion."""
    prompt, chosen, rejected = ([len(ids) for ids in pairs[f"{name}_ids"]] for name in ("prompt", "chosen", "rejected"))
    return max(p + max(c, r) for p, c, r in zip(prompt, chosen, rejected, strict=True))


def reference_columns(
    dpo: Any, pairs: Any, reference: ModelRef | None, speed: Speed, tools: Tools, config: Config
) -> Any:
    """The pairs with the reference's log-probabilities, which a killed run finds again.

    The work folder belongs to these pairs, settings and models; what else changes the figures is in the file's name.
    """
    import numpy as np

    from align.train.models import load_policy

    kept = tools.work / f"reference-{speed.device.partition(':')[0]}-{speed.precision}.npy"
    if not kept.exists():
        frozen = None
        if reference is not None:  # loaded as the policy was, and freed before training
            frozen = dpo.score_like_the_policy(load_policy(reference, speed, config))
        logps = dpo.reference_logps(pairs, frozen)
        if dpo.accelerator.is_main_process:
            part = Path(f"{kept}.part.npy")
            np.save(part, logps)
            part.rename(kept)
        dpo.accelerator.wait_for_everyone()
    logps = np.load(kept)
    return pairs.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])


def show(tokenizer: Any, pair: Mapping[str, list[int]]) -> str:
    """A pair as the trainer sees it, the chosen in green and the rejected in red."""
    prompt, chosen, rejected = (tokenizer.decode(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
    return f"first pair: {prompt}\n  chosen:   \x1b[32m⟦{chosen}⟧\x1b[0m\n  rejected: \x1b[31m⟦{rejected}⟧\x1b[0m"


STAGE = Stage(
    name="dpo",
    summary="prefer the chosen to the rejected (DPO on a fixed set of pairs)",
    config=Config,
    needs={
        "policy": Need(Kind.MODEL, "the model to start from, as a rule the one that sft made"),
        "preferences": Need(Kind.PREFERENCES, "prompts with a chosen and a rejected completion"),
        "reference": Need(
            Kind.MODEL, "the frozen model to stay near; the policy itself where not given", optional=True
        ),
    },
    gives=Kind.MODEL,
    run=run,
    trains=True,
)
