"""Stage `reward`: trains the reward model that online DPO will ask (Qwen2 report, arXiv:2407.10671, 4.3).

The loss is Bradley-Terry's over all better-worse pairs of a prompt's completions,

    mean over pairs of −log σ(r_w − r_l − margin) + centering · (r_w + r_l)²,

averaged by prompt: listwise, as for the reward model of Qwen2.5-Math (arXiv:2409.12122); centering is that of
arXiv:2312.09244 and keeps a scalar head's zero where it is. Train it on samples of the very policy it will judge: on
another policy's pairs it has been seen to make that policy worse.

Differs from the paper: nothing is said there of how its reward model is trained, gated or checked. Here the weights
kept are those with the best best-of-n accuracy on held-out prompts; thresholds by family are found there too (see
`reward.gate`); and the model is loaded again from its folder and must give the same scores, since a head lost on
saving would go unnoticed.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from align.core.errors import DataError, ModelError, RecipeError, RunError
from align.core.records import Kind
from align.core.rope import positions
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.start import tell
from align.core.store import ModelRef, Table
from reward.comparisons import groups_on_disk, read_groups
from reward.loading import Head, distinct_pad_id, load_model, load_tokenizer, template_hash

if TYPE_CHECKING:  # they import torch, which the stage's help and a recipe's check do without
    from reward.batches import Encoded
    from reward.model import RewardModel


class Config(StageConfig):
    """Settings of `reward`."""

    head: Head = Field(
        "scalar",
        description="scalar: a number off the last token; logprob: coef times the completion's log-prob",
    )
    coef: float = Field(0.3, gt=0, description="of the log-probability (logprob head)")
    per_side: int = Field(3, ge=1, description="most better and most worse completions of a prompt")
    answers: bool = Field(False, description="the column `answer` stands in where a prompt has no right completion")
    wrong_answers: bool = Field(False, description="and the column `wrong_answer` where it has no wrong one")
    margin: float = Field(0.0, ge=0, description="by how much a better completion should score higher, at least")
    use_margins: bool = Field(
        False, description="a pair's own margin is added to it: the column `margin` of preferences, as Llama 2 has it "
        "(arXiv:2307.09288), the difference of the rewards of ranked completions",
    )  # fmt: skip
    centering: float = Field(0.01, ge=0, description="weight of the term that keeps scores around zero (scalar head)")
    nll: float = Field(0.0, ge=0, description="weight of the better completions' NLL per token (logprob head)")
    router_loss_weight: float | None = Field(
        None, ge=0, description="of a mixture of experts' load-balancing loss; null: the model's own, 0: none"
    )
    learning_rate: float = Field(2e-6, gt=0, description="AdamW's, at its peak")
    epochs: float = Field(1.0, gt=0, description="passes over the prompts")
    global_batch_size: int = Field(128, ge=1, description="prompts of one optimizer step, over all processes")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient to this norm; 0 is off")
    max_length: int = Field(4096, ge=8, description="longest prompt and completion in tokens; longer ones are left out")
    lora_rank: int = Field(0, ge=0, description="rank of LoRA adapters; 0 trains all weights")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA's scale: an adapter counts alpha / rank")
    save_merged: bool = Field(True, description="write full weights; false writes LoRA adapters and head alone")
    evaluations: int = Field(4, ge=1, description="how often best-of-n is measured; the best weights are kept")
    patience: int = Field(2, ge=1, description="stop after so many evaluations without a better best-of-n")
    held_out_share: float = Field(0.1, gt=0, lt=1, description="of the prompts, where none is of the split dev")
    gate_precision: float = Field(0.9, gt=0, le=1, description="share right among completions scored above best_above")
    gate_wrong: float = Field(0.7, gt=0, le=1, description="share wrong among completions scored below worst_below")
    gate_gap: float = Field(0.5, ge=0, description="least difference between the scores of best and worst")

    @model_validator(mode="after")
    def _settings_belong_to_the_head(self) -> Self:
        if self.nll and self.head != "logprob":
            raise ValueError("nll: only a logprob head has a likelihood; set it to 0, or head to logprob")
        if self.lora_rank == 0 and not self.save_merged:
            raise ValueError("save_merged: false needs LoRA adapters to save; set lora_rank")
        return self


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Prepares the groups, trains, keeps the best weights, gates, saves and loads again."""
    from accelerate import Accelerator

    from reward.figures import report
    from reward.fit import Schedule, Speed, fit, group_batches, judge_groups
    from reward.gate import gates_of
    from reward.loss import Objective, encoded_pairs
    from reward.starting import start_of

    policy, completions = inputs["model"], inputs["completions"]
    assert isinstance(policy, ModelRef) and isinstance(completions, Table)
    _check_columns(config, completions)
    speed = Speed.of(tools.speed)
    accelerator = Accelerator(cpu=True) if speed.device == "cpu" else Accelerator()
    _check_parallel(accelerator)
    world = accelerator.num_processes
    judge = new_reward_model(config, policy, tools.seed)
    judge.model.to(accelerator.device)
    counts: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    groups = read_groups(
        completions, tools.work, config.held_out_share, config.answers, counts,
        wrong_answers=config.wrong_answers, use_margins=config.use_margins, filled=filled,
    )  # fmt: skip
    folder = tools.work / f"groups-{accelerator.process_index}"
    train, held_out = groups_on_disk(folder, groups, judge.tokenizer, config.per_side, config.max_length, counts)
    _check_fits(judge.model.config, policy.name, max(max(train["length"]), max(held_out["length"])))
    schedule = Schedule.of(config)
    batches = group_batches(np.asarray(train["length"]), config.epochs, config.global_batch_size, tools.seed, world)
    title = f"{config.head} reward model from {policy.name} on {completions.name}, {len(held_out):,} prompts held out"
    start = start_of(config, judge, train, batches, counts, speed, world, title)
    tell(start, tools)
    if tools.rehearse:
        return Result(summary={"start": start.figures()})

    centering = config.centering if config.head == "scalar" else 0.0
    objective = Objective(config.margin, centering, config.nll, config.use_margins, config.router_loss_weight)
    history = fit(objective, schedule, judge, train, held_out, batches, speed, accelerator, tools)

    judged = judge_groups(judge, held_out)
    labelled = [group for group, absolute in zip(judged, held_out["absolute"], strict=True) if absolute]
    gates = gates_of(labelled, config.gate_precision, config.gate_wrong, config.gate_gap) if labelled else None
    judge.card = replace(judge.card, gates=gates)
    if accelerator.is_main_process:
        probe = [*encoded_pairs(held_out[0])[:2], *encoded_pairs(train[0])]
        scores = judge.score_encoded(probe)
        _save(config, judge, tools.out / "model")
        check_saved(tools.out / "model", probe, scores, str(accelerator.device))
    accelerator.wait_for_everyone()
    summary = {
        "prompts": len(train),
        "completions": sum(len(values) for values in train["values"]),
        "held_out_prompts": len(held_out),
        "left_out": dict(counts),
        "filled": dict(filled),
        "start": start.figures(),
        "steps": len(batches),
        "evaluations": history,
        **report(judged, gates),
    }
    return Result(summary=summary)


def _check_columns(config: Config, completions: Table) -> None:
    asked = {"answers": "answer", "wrong_answers": "wrong_answer", "use_margins": "margin"}
    for setting, column in asked.items():
        if not getattr(config, setting) or column in completions.columns:
            continue
        if setting == "use_margins" and "chosen" not in completions.columns:  # then the rewards make the margins
            continue
        raise DataError(f"{setting}=true needs a column `{column}` in {completions.name}; it has none")


def _check_parallel(accelerator: Any) -> None:
    """Refuses what cuts the model into pieces: it scores, is measured and is saved whole in each process."""
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED"):
        raise RunError(
            f"reward: it was started under {kind}, and every process needs the whole model; start it without FSDP and "
            "DeepSpeed (plain data parallel), and use lora_rank where memory is short"
        )


def _check_fits(model: Any, name: str, longest: int) -> None:
    """Refuses rows that reach beyond a model's positions, by its config."""
    most = positions(model)
    if most is not None and longest > most:
        raise ModelError(
            f"{name}: the longest prompt and completion have {longest} tokens, and the model can tell {most} positions "
            f"apart; leave longer ones out with max_length={most}, or give a policy that was trained with "
            "rope_scaling=yarn"
        )


def new_reward_model(config: Config, policy: ModelRef, seed: int) -> RewardModel:
    """The policy with the head that is asked for; dropout is off, and a scalar head small (std 1/√(d+1))."""
    import torch

    from reward.model import Card, RewardModel

    if not config.save_merged and _is_adapter(policy):
        raise RecipeError(
            f"save_merged: false, but {policy.name} is a LoRA adapter itself, which new adapters can't be saved on top "
            "of; use save_merged=true"
        )
    changes = _no_dropout(policy)
    if config.head == "scalar":
        changes["num_labels"] = 1
    model, missing = load_model(policy.path, config.head, "float32", policy.revision, **changes)
    lost = [name for name in missing if not (config.head == "scalar" and name == "score.weight")]
    if lost:
        raise ModelError(f"{policy.name}: its checkpoint lacks {', '.join(lost[:3])}; give a language model's folder")
    tokenizer = load_tokenizer(policy.path, policy.revision)
    model.config.pad_token_id = distinct_pad_id(tokenizer)
    if config.head == "scalar" and missing:
        weight = model.score.weight.data
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.copy_(noise / math.sqrt(weight.shape[1] + 1))
    if config.lora_rank:
        model = _with_adapters(model, config, policy.revision)
    coef = config.coef if config.head == "logprob" else 1.0
    return RewardModel(model, tokenizer, Card(config.head, coef, None, policy.name, template_hash(tokenizer)))


def check_saved(folder: Path, probe: list[Encoded], scores: list[float], device: str) -> None:
    """Loads the model again and requires the same scores, since a head lost on saving shows in nothing else.

    Raises:
        ModelError: they are not the same.
    """
    from reward.model import load_reward_model

    again = load_reward_model(folder, device, "float32").score_encoded(probe)
    if not np.allclose(again, scores, rtol=1e-3, atol=1e-3):
        worst = max(range(len(scores)), key=lambda i: abs(again[i] - scores[i]))
        raise ModelError(
            f"{folder}: loaded again, the reward model scores {again[worst]:.4f} what it scored {scores[worst]:.4f} "
            "before it was saved; its weights were not written whole (is the disk full?)"
        )


def _no_dropout(policy: ModelRef) -> dict[str, Any]:
    """Config entries that switch off every dropout of a model, whatever its architecture calls them."""
    from peft import PeftConfig
    from transformers import AutoConfig

    path, revision = policy.path, policy.revision
    if _is_adapter(policy):
        path, revision = str(PeftConfig.from_pretrained(path).base_model_name_or_path), None
    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main").to_dict()
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path}: no model can be loaded from it: {str(problem).splitlines()[0]}") from problem
    return {
        name: 0.0
        for name, value in config.items()
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop"))
    }


def _is_adapter(policy: ModelRef) -> bool:
    return (Path(policy.path) / "adapter_config.json").is_file()


def _with_adapters(model: Any, config: Config, revision: str | None) -> Any:
    """LoRA on every linear layer; the scalar head is trained and saved whole, or it would stay as it was drawn."""
    from peft import LoraConfig, TaskType, get_peft_model

    scalar = config.head == "scalar"
    adapters = LoraConfig(
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        revision=revision,
        target_modules="all-linear",
        modules_to_save=["score"] if scalar else None,
    )
    return get_peft_model(model, adapters)


def _save(config: Config, judge: RewardModel, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model = judge.model.merge_and_unload() if config.lora_rank and config.save_merged else judge.model
    if config.lora_rank and not config.save_merged:
        adapters = model.peft_config["default"]
        if Path(adapters.base_model_name_or_path).is_dir():  # so that the base is found from any folder
            adapters.base_model_name_or_path = str(Path(adapters.base_model_name_or_path).resolve())
    model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)
    judge.card.write(folder)


STAGE = Stage(
    name="reward",
    summary="trains a reward model on scored completions, and finds where it may be believed",
    config=Config,
    needs={
        "model": Need(Kind.MODEL, "the policy that it is trained from, best the very one that it will judge"),
        "completions": Need((Kind.COMPLETIONS, Kind.PREFERENCES), "scored completions, or preferences"),
    },
    gives=Kind.REWARD_MODEL,
    run=run,
    version=2,
    trains=True,
)
