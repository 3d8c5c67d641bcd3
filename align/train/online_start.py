"""What an online DPO run is, told before its first episode; how many pairs it will find, nobody knows yet."""

from __future__ import annotations

from typing import Any

from align.core.chat import row_prompt_ids
from align.core.cost import shape_of
from align.core.examples import Line, Span
from align.core.memory import memory_of
from align.core.start import Batch, Start
from align.train.episode_file import pairs_of
from align.train.episodes import Prompts
from align.train.online_settings import Config
from align.train.tau import drift_warnings, merging_bytes, optimizer_words
from align.train.trainer import learning_rates

_SCORERS = {
    "verifier": "the verifiers",
    "reward_model": "the reward model",
    "judge": "the judge",
    "mix": "the verifiers, and the reward model (or the judge) where there is none",
}

_PAIRS = {
    "max_min": "the best against the worst completion of a prompt",
    "max_random": "the best against another completion of a prompt",
    "random": "two completions of a prompt, drawn at random",
    "all": "of a prompt every passed completion with a failed one, or any two with a margin",
}


def _scorers(config: Config) -> str:
    if config.scorer == "weighted":
        parts = (f"{weight:g} × {_SCORERS[part]}" for part, weight in config.weights.items())
        return f"{' + '.join(parts)}, each standardised"
    return _SCORERS[config.scorer]


def _looked_at(prompts: Prompts) -> str:
    return f" (of {prompts.looked_at:,} looked at)" if prompts.looked_at > prompts.size else ""


def start_of(config: Config, online: Any, title: str, prompts: Prompts, most_steps: int, frozen: bool) -> Start:
    """What the training is.

    Args:
        most_steps: if every prompt gave all the pairs that it can.
        frozen: whether a reference model is in memory beside the policy.
    """
    ids = [row_prompt_ids(online.processing_class, row) for row in prompts.of_episode(0)[:2]]
    ahead = "; sampled by a second process while the episode before is trained" if config.asynchronous else ""
    return Start(
        title=title,
        examples=[[Line("prompt", [Span(online.processing_class.decode(each))])] for each in ids],
        unit="prompts",
        kept=len(prompts.train),
        episodes=f"{config.episodes}, each of {prompts.size:,} prompts{_looked_at(prompts)} × "
        f"{config.samples_per_prompt} completions of at most {config.max_tokens:,} tokens{ahead}; scored by "
        f"{_scorers(config)}; {len(prompts.probes):,} prompts of the split {prompts.probe_split} for the guards",
        **_shared(config, online, most_steps, frozen, max(map(len, ids)) + config.max_tokens, config.max_tokens),
    )


def replay_start_of(config: Config, replayed: Any, title: str, most_steps: int, frozen: bool) -> Start:
    """What a replay is: its pairs are known."""
    kept = [number for number, record in enumerate(replayed.recorded) if not record["rolled_back"]]
    pairs = [pair for number in kept for pair in pairs_of(replayed.rows_of(number))]
    decode = replayed.processing_class.decode
    longest = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    whole = [len(pair["prompt_ids"]) + length for pair, length in zip(pairs, longest, strict=True)]
    undone = len(replayed.recorded) - len(kept)
    return Start(
        title=title,
        examples=[
            [Line(name, [Span(decode(pair[f"{name}_ids"]))]) for name in ("prompt", "chosen", "rejected")]
            for pair in pairs[:2]
        ],
        unit="pairs",
        kept=len(pairs),
        longest=max(whole, default=0),
        max_length=config.max_length,
        episodes=f"{len(kept)} as they were sampled"
        + (f"; {undone} that were rolled back are left out" * (undone > 0)),
        **_shared(config, replayed, most_steps, frozen, max(whole, default=1), max(longest, default=1)),
    )


def _shared(
    config: Config, online: Any, most_steps: int, frozen: bool, longest: int, completion: int
) -> dict[str, Any]:
    """What both have: batches, steps, losses, optimizer, weights and memory."""
    arguments, device = online.args, online.args.device.type
    micro, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    shape = shape_of(online.model)
    own = "the policy at the start of each episode" if config.reference_at == "episode" else "the start"
    return {
        "batch": Batch(config.global_batch_size, micro, accumulated, arguments.world_size),
        "steps": most_steps,
        "at_most": True,
        "epochs": config.epochs,
        "layout": _PAIRS[config.pairing],
        "optimizer": optimizer_words(config),
        "warnings": drift_warnings(config, most_steps),
        "learning_rates": learning_rates(config, most_steps),
        "scheduler": config.lr_scheduler,
        "loss": f"{' + '.join(config.losses)} (beta {config.beta:g}), {config.nll_weight:g} × NLL of the chosen; the "
        f"reference is {own}",
        "parameters": shape.parameters,
        "trained": shape.trained,
        "place": f"{device}, {online.precision}",
        **memory_of(
            online.model,
            2 * micro * longest,
            2 * micro * completion,
            device=device,
            also=[online.reference] if frozen else [],
            lora_rank=config.lora_rank,
            lora_targets=config.lora_targets,
            quantization=config.quantization,
            precision=online.precision,
            checkpointing=arguments.gradient_checkpointing,
            reference=frozen,
            merging=merging_bytes(config),
        ),
    }
