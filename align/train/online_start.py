"""What an online DPO run is, told before its first episode; how many pairs it will find, nobody knows yet."""

from __future__ import annotations

from typing import Any

from align.core.chat import row_prompt_ids
from align.core.cost import shape_of
from align.core.examples import Line, Span
from align.core.memory import memory_of
from align.core.start import Batch, Start
from align.train.episodes import Prompts
from align.train.online_settings import Config
from align.train.trainer import learning_rates

_SCORERS = {
    "verifier": "the verifiers",
    "reward_model": "the reward model",
    "mix": "the verifiers, and the reward model where there is none",
}


def start_of(config: Config, online: Any, title: str, prompts: Prompts, most_steps: int, frozen: bool) -> Start:
    """What the training is.

    Args:
        most_steps: if every prompt gave a pair.
        frozen: whether a reference model is in memory beside the policy.
    """
    arguments, device = online.args, online.args.device.type
    first = prompts.of_episode(0)[:2]
    ids = [row_prompt_ids(online.processing_class, row) for row in first]
    micro, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    shape = shape_of(online.model)
    longest = max(map(len, ids)) + config.max_tokens
    return Start(
        title=title,
        examples=[[Line("prompt", [Span(online.processing_class.decode(each))])] for each in ids],
        unit="prompts",
        kept=len(prompts.train),
        batch=Batch(config.global_batch_size, micro, accumulated, arguments.world_size),
        steps=most_steps,
        at_most=True,
        epochs=config.epochs,
        episodes=f"{config.episodes}, each of {prompts.size:,} prompts × {config.samples_per_prompt} completions of at "
        f"most {config.max_tokens:,} tokens; scored by {_SCORERS[config.scorer]}; {len(prompts.probes):,} prompts of "
        f"the split {prompts.probe_split} for the guards",
        layout="the best against the worst completion of a prompt",
        optimizer=f"AdamW, weight decay {config.weight_decay:g}, clip {config.max_grad_norm:g}",
        learning_rates=learning_rates(config, most_steps),
        scheduler=config.lr_scheduler,
        loss=f"{' + '.join(config.losses)} (beta {config.beta:g}), {config.nll_weight:g} × NLL of the chosen",
        parameters=shape.parameters,
        trained=shape.trained,
        place=f"{device}, {online.precision}",
        **memory_of(
            online.model,
            2 * micro * longest,
            2 * micro * config.max_tokens,
            device=device,
            also=[online.reference] if frozen else [],
            lora_rank=config.lora_rank,
            lora_targets=config.lora_targets,
            quantization=config.quantization,
            precision=online.precision,
            checkpointing=arguments.gradient_checkpointing,
            reference=frozen,
        ),
    )
