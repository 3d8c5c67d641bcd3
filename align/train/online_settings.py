"""Settings of the stage `online-dpo`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from align.train.settings import DPOSettings


class Config(DPOSettings):
    """Names as in `dpo`; an episode samples, scores, pairs and updates."""

    learning_rate: float = Field(5e-7, gt=0, description="peak learning rate; one schedule over all episodes")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs of an episode")
    max_length: int = Field(8192, ge=8, description="longest prompt with either completion, in tokens; longer: no pair")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    nll_weight: float = Field(
        0.2, ge=0, description="weight of the chosen's negative log-likelihood per token: holds its probability up"
    )

    reference_at: Literal["start", "episode"] = Field(
        "start", description="whose log-probabilities the losses go by: the reference model's, or the policy's own at "
        "the start of each episode (it may then go farther; the guards' KL is from the reference model in any case)"
    )
    asynchronous: bool = Field(
        False, description="a second process samples an episode while the one before it is trained: samples are one "
        "episode stale"
    )

    episodes: int = Field(3, ge=1, description="rounds of sampling and updating")
    prompts_per_episode: int = Field(4096, ge=1, description="prompts that are sampled from in an episode")
    samples_per_prompt: int = Field(8, ge=2, description="completions of each prompt")
    resample: int = Field(0, ge=0, description="further completions where none of the first is believed to be right")
    temperature: float = Field(1.0, gt=0, description="of the samples")
    top_p: float = Field(1.0, gt=0, le=1, description="of the samples; 1 is off")
    max_tokens: int = Field(1024, ge=1, description="most new tokens; a completion cut there is never chosen")

    scorer: Literal["mix", "reward_model", "verifier"] = Field(
        "mix",
        description="who scores: the verifier of a prompt's task where it has one and else the reward model (mix)",
    )
    verified_tasks: list[str] = Field(
        ["math", "code", "constraints", "follow", "exact", "tags"],
        description="tasks whose verifier is asked under mix; others go to the reward model",
    )
    min_margin: float = Field(0.0, ge=0, description="least reward of the chosen over the rejected; ties never count")

    probe_prompts: int = Field(
        200, ge=0, description="held-out prompts (dev split) on which the guards look after each episode; 0 is no guard"
    )
    kind: str = Field(
        "kind", description="the column that says whether a prompt is benign (safe, harmless) or harmful (unsafe)"
    )
    max_score_drop: float = Field(
        5.0, gt=0, description="points of verified score below the best so far; .inf turns this guard off, or another"
    )
    max_family_drop: float = Field(25.0, gt=0, description="points of one family's score below the best so far")
    max_kind_drop: float = Field(
        10.0, gt=0, description="points of benign help, or of harmful refusal, below the best so far"
    )
    max_second_drop: float = Field(
        0.25,
        gt=0,
        description="fall of the second reward below its best so far, in standard deviations of the start's answers",
    )
    min_sigmas: float = Field(
        2.0,
        ge=0,
        description="such a drop counts from so many of its own standard errors on, paired over the prompts; 0: always",
    )
    max_length_ratio: float = Field(2.0, gt=1, description="mean length of the samples against the start's")
    min_length_ratio: float = Field(0.33, ge=0, lt=1, description="the same, for samples that shrink; 0 is off")
    max_chosen_drop: float = Field(20.0, gt=0, description="nats that the chosen lost against the reference")
    max_kl: float = Field(100.0, gt=0, description="nats a completion from the reference")
    max_sampler_gap: float = Field(
        0.1,
        gt=0,
        description="nats a token between the sampler's log-probabilities and the trainer's; beyond, it stops",
    )
    after_rollback: Literal["go_on", "stop"] = Field(
        "go_on", description="after an episode was rolled back: the next one, from the last good weights, or the end"
    )
    max_rollbacks: int = Field(3, ge=1, description="so many episodes rolled back in a row end the run early")

    @model_validator(mode="after")
    def _guards_can_look(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in GUARDS if getattr(self, name) != fields[name].default]
        if changed and not self.probe_prompts:
            raise ValueError(
                f"{changed[0]} has no effect with probe_prompts 0: nothing is looked at; set it, or leave it"
            )
        if self.after_rollback == "stop" and self.max_rollbacks != fields["max_rollbacks"].default:
            raise ValueError("max_rollbacks has no effect with after_rollback: stop; leave one of the two")
        return self


GUARDS = (
    "kind", "max_score_drop", "max_family_drop", "max_kind_drop", "max_second_drop", "min_sigmas", "max_length_ratio",
    "min_length_ratio", "max_kl", "max_sampler_gap",
)  # fmt: skip
"""Settings that are read only where there is something to look at."""
