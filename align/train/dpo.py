"""Direct Preference Optimization (arXiv:2305.18290) on a fixed set of pairs: the report's offline stage (section 4.3).

    loss = -log sigmoid(beta * (chosen's log-ratio - rejected's log-ratio)) + nll_weight * NLL(chosen) / |chosen|

A log-ratio is log policy - log reference of a whole completion. The second term (RPO, arXiv:2404.19733) is the guard
against likelihood displacement: both probabilities falling while the margin grows. Other losses, and mixtures of them,
by name: align/train/losses.py.

    the reference's log-probabilities of all pairs, once: from the cache where they are known (reference.py)
    for each global batch: the policy's, completions alone, a prompt computed once for both (preference.py); the loss
    beside it: what the chosen lost, and held-out prompts answered and verified (health.py)

The report gives no settings. The defaults are the nearest official ones, Qwen2.5's (arXiv:2412.15115): 1 epoch,
learning rate 7e-7; beta, batch and schedule are ours.
The report's optimizer is the Online Merging Optimizer (merging.py): `merging`, with `base` and `sft` to steer by.
Differs from the paper: without these it is AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind
from align.core.stage import Need, Result, Stage, Tools
from align.core.start import tell
from align.core.store import ModelRef, Table
from align.train.settings import LOSS_OVER, MERGING_NEEDS, DPOSettings, Speed

if TYPE_CHECKING:
    from align.train.preference import DPO


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
    stop_at_chosen_drop: float | None = Field(
        None,
        gt=0,
        description="stop when it has fallen by more than this, in nats, and keep the last weights from before",
    )
    evaluate_every: float = Field(
        0.25, gt=0, le=1, description="share of the training after which the held-out `prompts` are answered again"
    )
    probe_prompts: int = Field(200, ge=1, description="held-out prompts (dev split, with a task) that are answered")
    max_tokens: int = Field(512, ge=1, description="most new tokens of their answers")


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Trains a policy on preferences and writes it to `tools.out / "model"`."""
    from align.train import adapters, models
    from align.train.data import batch_order, tokens_on_disk
    from align.train.dpo_start import lengths_of, longest, start_of
    from align.train.health import Displacement, displaced, held_out, held_out_rows
    from align.train.preference import DPO, dpo_arguments
    from align.train.reference import reference_logps, setup_of, with_reference
    from align.train.tau import merging_figures, tau_of
    from align.train.trainer import set_batches

    policy, table = inputs["policy"], inputs["preferences"]
    reference = inputs.get("reference", policy)
    assert isinstance(policy, ModelRef) and isinstance(reference, ModelRef) and isinstance(table, Table)
    adapters.check_stackable(policy, config)
    tau = tau_of(config, inputs, policy)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(policy)
    arguments = dpo_arguments(config, speed, tools)
    with arguments.main_process_first(local=False):
        pairs, counts = tokens_on_disk(tools.work / "pairs.arrow", encoded(config, tokenizer, table), "pair")
    probes = held_out_rows(inputs.get("prompts"), config.probe_prompts, tools.seed)
    lengths = lengths_of(pairs)

    order = batch_order(lengths.sum(1), config.epochs, config.global_batch_size, tools.seed)
    set_batches(arguments, config.global_batch_size, len(order), speed)
    same = reference.fingerprint == policy.fingerprint
    model = models.load_policy(policy, speed, config, longest(lengths))
    setup = setup_of(model, speed.precision, speed.device) if same and not tools.rehearse else {}
    dpo = DPO(
        config,
        tools,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=pairs,
        peft_config=adapters.lora_of(config, policy),
        rows=len(pairs),
    )
    dpo.starts_at_reference = same
    dpo.merge_with(tau)
    held = bool(probes) and not (same and config.lora_rank)  # with adapters the policy holds its reference in itself
    start = start_of(config, dpo, f"DPO of {policy.name} on {table.name}", pairs, lengths, counts, speed, held)
    tell(start, tools)
    if tools.rehearse:
        return Result(summary={"start": start.figures()})

    frozen = None
    if held or not same:
        frozen = models.load_policy(reference, speed, config, longest(lengths))
        setup = setup or setup_of(frozen, speed.precision, speed.device)
        frozen = dpo.score_like_the_policy(frozen)
    logps, found = reference_logps(dpo, pairs, frozen, setup, tools)
    dpo.train_dataset = with_reference(pairs, logps).select(order)
    health = Displacement(dpo, config.warn_chosen_drop, config.stop_at_chosen_drop)
    dpo.add_callback(health)
    kept = frozen if probes else None
    del frozen
    with held_out(dpo, probes, kept, config.max_tokens, config.evaluate_every):
        dpo.train_or_resume()
    stopped = health.take_back()
    models.save_policy(dpo, tokenizer, tools.out / "model", config, policy)

    summary = dpo.summary() | dict(counts) | found | adapters.lineage(policy, config)
    summary |= {"reference": reference.name, "loss_over": LOSS_OVER, "start": start.figures()}
    kept_step = health.kept_step if stopped else math.inf  # figures are those of the weights that are written
    change = dpo.chosen_change(kept_step) if kept_step else 0.0
    summary |= {"chosen_logp_change": change, "heldout": heldout_scores(dpo, kept_step)}
    if stopped:
        summary |= {"stopped_at": health.stopped_at, "kept_step": health.kept_step}
    elif summary["chosen_logp_change"] < -config.warn_chosen_drop:
        stopped = displaced(summary["chosen_logp_change"])
    if stopped:
        tools.progress.say(f"warning: {stopped}")
    merges = dpo.merges if health.stopped_at is None else health.kept_step // config.merging_every
    return Result(summary=summary | merging_figures(config, merges, [stopped] if stopped else []))


def encoded(config: Config, tokenizer: Any, table: Table) -> Iterator[dict[str, list[int]] | str]:
    """Each pair's ids, or why it is left out."""
    from align.core.chat import encode_pairs
    from align.train.data import silent

    left_out: dict[str, int] = {}

    def training_rows() -> Iterator[Any]:
        tools = ["tools"] if "tools" in table.columns else []
        for row in table.rows(["prompt_id", "split", "prompt", "chosen", "rejected", *tools]):
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


def heldout_scores(dpo: DPO, upto: float) -> list[dict[str, Any]]:
    """What was found on the held-out prompts, from the start up to a step."""
    return [
        {name: value for name, value in line.items() if name == "step" or name.startswith("heldout/")}
        for line in dpo.curves.lines
        if "heldout/kl" in line and line["step"] <= upto
    ]


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
        "prompts": Need(
            Kind.PROMPTS,
            "held-out prompts (dev split, with a task) that are answered and verified on the way",
            optional=True,
        ),
        **MERGING_NEEDS,
    },
    gives=Kind.MODEL,
    run=run,
    version=2,
    trains=True,
)
