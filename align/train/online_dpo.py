"""Online DPO: the report's second stage of preference training (arXiv:2407.10671, section 4.3).

    for each episode:
        choose prompts; sample n completions of each from the policy as it is, or as it was one episode before
        score them: a verifier where a program can decide, the reward model for the rest
        the best against the worst, or other pairs; ties, small margins, equal texts and truncated winners are dropped
        the reference's log-probabilities once, then DPO steps on the pairs
        answer held-out prompts; where a guard objects, undo the episode

One optimizer and one schedule over all episodes. The reference is the start for all of them (OAIF, arXiv:2402.04792) or
each episode's own (`reference_at`). n = 8 is Qwen2.5's (arXiv:2412.15115), temperature 1 RLHFlow's (arXiv:2405.07863),
best against worst the report's, samples of one episode before (`asynchronous`) Asynchronous RLHF's (arXiv:2410.18252);
beta 0.1 and learning rate 5e-7 are ours. Where to read on: episodes.py and scoring.py make the pairs, online_trainer.py
trains on them, probe.py and guards.py look, stale.py samples ahead, replay.py trains again without sampling.
Differs from the paper: verifiers beside the reward model, guards, an NLL term. The optimizer is AdamW where `merging`
doesn't say otherwise; the report's is the Online Merging Optimizer (merging.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from align.core.errors import ModelError, RecipeError, RunError
from align.core.records import Kind
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.start import tell
from align.core.store import ModelRef, Table
from align.train.online_settings import Config
from align.train.settings import LOSS_OVER, MERGING_NEEDS, Speed


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Trains a policy on its own completions and writes it to `tools.out / "model"`."""
    from accelerate.utils import gather_object

    from align.train import adapters, models, samplers
    from align.train.episodes import Prompts
    from align.train.online_start import start_of
    from align.train.online_trainer import OnlineDPO
    from align.train.preference import dpo_arguments
    from align.train.probe import check_guards, check_probe, second_scorer
    from align.train.scoring import judge_of
    from align.train.share import Share
    from align.train.stale import Ahead, Work
    from align.train.tau import merging_figures, tau_of
    from reward.verifiers import Verifiers

    policy, table = inputs["policy"], inputs["prompts"]
    reference = inputs.get("reference", policy)
    assert isinstance(policy, ModelRef) and isinstance(reference, ModelRef) and isinstance(table, Table)
    adapters.check_stackable(policy, config)
    check_guards(config, inputs)
    tau = tau_of(config, inputs, policy)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(policy)
    arguments = dpo_arguments(config, speed, tools)  # first, since it says which GPU is this process's
    rank, world = arguments.process_index, arguments.world_size
    check_asynchronous(config, tools, world)
    prompts = Prompts(table, config, tools.seed)
    check_probe(config, prompts.of_probe(), table.name)
    judge = judge_of(config, tools, "reward_model" in inputs)
    sampler = samplers.given(config, tools, policy, tokenizer, world)
    # With adapters the reference is the policy without them; else it is a second model.
    same = reference.fingerprint == policy.fingerprint
    frozen = None if config.lora_rank and same else models.load_policy(reference, speed, config)
    most_pairs = prompts.size * (config.max_pairs if config.pairing == "all" else 1)
    most_steps = config.episodes * (math.ceil(most_pairs * config.epochs / config.global_batch_size) + 1)

    title = f"online DPO of {policy.name} on {table.name}"
    work = Work(config, inputs, tools.seed, tools.work, speed, rank, world)
    ahead = Ahead(work, tools.progress) if config.asynchronous else None
    with Verifiers(say=tools.progress.say) as verifiers, ahead or nullcontext():
        scorer = scorer_of(config, inputs, speed, verifiers, tokenizer, judge)
        share = Share(
            config, prompts, scorer, tools.seed, tokenizer, tools.progress, tools.work, rank, world, gather_object
        )
        trl = trl_of(config, policy, speed, arguments, tokenizer, most_steps)
        online = OnlineDPO(config, tools, share, frozen, sampler, **trl)
        online.starts_at_reference = same
        online.ahead = ahead
        online.second = second_scorer(config, inputs, speed, verifiers, tokenizer)
        online.merge_with(tau)
        start = start_of(config, online, title, prompts, most_steps, frozen is not None)
        tell(start, tools)
        if tools.rehearse:
            return Result(summary={"start": start.figures()})
        online.train()
    if not any(record["pairs"] for record in online.records):
        outcomes = ", ".join(f"{n} {reason}" for reason, n in online.records[0]["outcomes"].items())
        raise RunError(
            f"no episode gave a pair (the first: {outcomes}); sample more completions of each prompt, take other "
            "prompts, or another scorer"
        )
    models.save_policy(online, tokenizer, tools.out / "model", config, policy)
    about = adapters.lineage(policy, config) | {"reference": reference.name, "loss_over": LOSS_OVER}
    found = summary(online)
    about |= merging_figures(config, online.merges, found.get("warnings", ())) | {"start": start.figures()}
    return Result(summary=found | about)


def check_asynchronous(config: Config, tools: Tools, processes: int) -> None:
    """Refuses what the second process of `asynchronous` can't do.

    Raises:
        RecipeError: there is some.
    """
    if config.asynchronous and tools.engines:
        raise RecipeError(
            f"asynchronous: the second process samples with an embedded engine of its own and can't share the engine "
            f"{', '.join(sorted(tools.engines))} of the recipe; leave that out, or set asynchronous to false"
        )
    if config.asynchronous and processes > 1 and (config.choose_from > 1 or config.scorer == "weighted"):
        raise RecipeError(
            "asynchronous: choose_from and scorer=weighted compare the prompts of all processes, and those that sample "
            f"ahead for {processes} trainings don't know of each other; set processes=1, or asynchronous to false"
        )


def trl_of(
    config: Config, policy: ModelRef, speed: Speed, arguments: Any, tokenizer: Any, most_steps: int
) -> dict[str, Any]:
    """What TRL's trainer is made with, the policy among it."""
    from datasets import Dataset

    from align.train import adapters, models
    from align.train.trainer import set_batches

    set_batches(arguments, config.global_batch_size, config.global_batch_size, speed)
    arguments.max_steps = most_steps
    arguments.save_strategy = "no"  # align/train/border.py saves
    model = models.load_policy(policy, speed, config)
    models.stop_at_end_of_turn(model, tokenizer)
    # The trainer needs a dataset to count its steps by; the pairs come from the episodes.
    nothing = Dataset.from_dict({"prompt_ids": [[0]] * (most_steps * config.global_batch_size)})
    return {
        "model": model,
        "args": arguments,
        "processing_class": tokenizer,
        "train_dataset": nothing,
        "peft_config": adapters.lora_of(config, policy),
    }


def scorer_of(
    config: Config, inputs: Mapping[str, Table | ModelRef], speed: Speed, verifiers: Any, tokenizer: Any, judge: Any
) -> Any:
    """What scores the samples; the second process of `asynchronous` has one of its own."""
    from align.train.scoring import Scorer

    return Scorer(config, verifiers, reward_model_of(config, inputs, speed, judge is not None), tokenizer, judge)


def reward_model_of(config: Config, inputs: Mapping[str, Table | ModelRef], speed: Speed, judged: bool) -> Any:
    """The reward model, where there is one; under mix a judge may be in its place.

    Raises:
        ModelError: the scorer needs one and none was given, or one was given that nothing asks.
    """
    given = inputs.get("reward_model")
    if given is None:
        if "reward_model" in config.scored_by and not (config.scorer == "mix" and judged):
            raise ModelError(
                f"scorer is {config.scorer} and no reward_model was given; give one, or set scorer=verifier"
            )
        return None
    if "reward_model" not in config.scored_by:
        raise ModelError(
            f"reward_model has no effect, since scorer is {config.scorer}; leave it out (or give it as "
            "second_reward_model, at which the guards look), or set scorer to mix"
        )
    from reward.members import load_judge

    assert isinstance(given, ModelRef)
    return load_judge(given, speed.device)


def summary(online: Any) -> dict[str, Any]:
    """Figures of the run, episode by episode."""
    start, records = online.kept[0], online.records
    found: dict[str, Any] = online.summary() | {
        "pairs": sum(record["pairs"] for record in records),
        "chosen_logp_change": online.chosen_change(),
        "rolled_back": [record["episode"] for record in records if record["rolled_back"]],
        "heldout_start": start.score,
        "heldout_end": online.kept[-1].score,
        "probe_split": online.share.prompts.probe_split,
        "episodes": records,
    }
    if found["rolled_back"]:
        reasons = [f"episode {r['episode']}: {'; '.join(r['rolled_back'])}" for r in records if r["rolled_back"]]
        found["warnings"] = [f"rolled back {reason}" for reason in reasons]
        if records[-1]["stopped"]:
            found["warnings"].append(f"ended after episode {records[-1]['episode']}: {records[-1]['stopped']}")
    return found


def asks(config: Config) -> dict[str, Asks]:
    """The policy's samples of all episodes; the guards' few apart."""
    samples = config.episodes * (config.samples_per_prompt + config.resample)
    if config.choose_from > 1:
        samples += config.episodes * (config.choose_from - 1) * (config.samples_per_prompt // 2)
    prompts = config.prompts_per_episode
    judged = Asks(samples * config.judge_votes, config.judge_max_tokens, prompts=prompts)
    return {"sampler": Asks(samples, config.max_tokens, prompts=prompts), "judge": judged}


STAGE = Stage(
    name="online-dpo",
    summary="sample, score, pair and train in episodes (online DPO)",
    config=Config,
    needs={
        "policy": Need(Kind.MODEL, "the model to start from, as a rule the one that dpo made"),
        "prompts": Need(Kind.PROMPTS, "what to sample from; its dev split is what the guards look at"),
        "reward_model": Need(Kind.REWARD_MODEL, "scores what no verifier decides", optional=True),
        "second_reward_model": Need(
            Kind.REWARD_MODEL, "held out: the guards score with it, and nothing is trained on it", optional=True
        ),
        "reference": Need(
            Kind.MODEL, "the frozen model to stay near; the policy itself where not given", optional=True
        ),
        **MERGING_NEEDS,
    },
    gives=Kind.MODEL,
    run=run,
    engines={
        "sampler": "samples for the policy, whose own model it is and whose weights it takes; the policy itself",
        "judge": "a model that grades completions, under scorer judge or weighted, or under mix for a reward model",
    },
    optional_engines=("sampler", "judge"),
    served={"sampler": "policy"},
    reads=("judge_template",),
    asks=asks,
    trains=True,
    version=3,
)
