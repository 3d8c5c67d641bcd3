"""Settings of the stage `online-dpo`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from align.core.stage import StageConfig
from align.train.settings import DPOSettings
from reward.judge import JudgeConfig
from reward.pairs import Strategy

Part = Literal["verifier", "reward_model", "judge"]
PARTS: tuple[Part, ...] = ("verifier", "reward_model", "judge")
"""Who may score a completion."""

Verified = Literal["math", "code", "follow", "constraints", "exact", "tags", "principle"]
"""Tasks that a program verifies: those of `reward.verifiers.VERIFIERS`."""


class Episodes(StageConfig):
    """How an episode comes about: prompts, samples, scores, pairs."""

    episodes: int = Field(3, ge=1, description="rounds of sampling and updating")
    prompts_per_episode: int = Field(4096, ge=1, description="prompts whose samples may be paired in an episode")
    choose_from: int = Field(
        1,
        ge=1,
        description="prompts looked at for each one taken; above 1 half of the samples are drawn of all of them, and "
        "those whose rewards vary most get the other half (Qwen2.5, arXiv:2412.15115)",
    )
    samples_per_prompt: int = Field(8, ge=2, description="completions of each prompt")
    resample: int = Field(0, ge=0, description="further completions where none of the first is believed to be right")
    temperature: float = Field(1.0, gt=0, description="of the samples")
    top_p: float = Field(1.0, gt=0, le=1, description="of the samples; 1 is off")
    max_tokens: int = Field(1024, ge=1, description="most new tokens; a completion cut there is never chosen")

    max_error_share: float = Field(
        0.1, ge=0, le=1, description="stop when more than this share of an episode's completions could not be sampled"
    )

    scorer: Literal["mix", "reward_model", "verifier", "judge", "weighted"] = Field(
        "mix",
        description="who scores: the verifier of a prompt's task where it has one, and else the reward model, or the "
        "judge where there is no reward model (mix); one of them alone; or a sum of several (weighted)",
    )
    weights: dict[Part, float] = Field(
        {},
        description="under weighted, the weight of each that scores; its scores are standardised over the episode, and "
        "a prompt without a verifier is scored by the others, as {verifier: 1, reward_model: 0.5}",
    )
    verified_tasks: list[Verified] = Field(
        ["math", "code", "constraints", "follow", "exact", "tags"],
        description="tasks whose verifier is asked under mix and weighted; others go to who else scores",
    )
    pairing: Strategy = Field(
        "max_min",
        description="max_min: a prompt's best against its worst (the report, 4.3); max_random: its best against one "
        "drawn of the others (Zephyr, arXiv:2310.16944); all: every passed with a failed one side by side, or, where "
        "no verifier spoke, any two with a margin; random: one pair drawn, a control",
    )
    max_pairs: int = Field(10, ge=1, description="most pairs of one prompt under pairing=all; 10 is IRPO's K")
    min_margin: float = Field(0.0, ge=0, description="least reward of the chosen over the rejected; ties never count")
    length_penalty: float = Field(
        0.0,
        ge=0,
        description="taken off the reward for each 100 tokens beyond the prompt's shortest completion, among those of "
        "one verdict (RLHFlow's, arXiv:2405.07863, by tokens)",
    )
    missing_end_penalty: float = Field(
        0.0, ge=0, description="taken off the reward of a completion that was cut off; 1 is open-instruct's"
    )

    reference_at: Literal["start", "episode"] = Field(
        "start",
        description="whose log-probabilities the losses go by: the reference model's, or the policy's own at "
        "the start of each episode (it may then go farther; the guards' KL is from the reference model in any case)",
    )
    asynchronous: bool = Field(
        False,
        description="a second process samples an episode while the one before it is trained: samples are one "
        "episode stale",
    )

    @model_validator(mode="after")
    def _there_is_an_episode_to_sample_ahead(self) -> Self:
        if self.asynchronous and self.episodes == 1:
            raise ValueError("asynchronous has no effect with episodes 1; set episodes to 2 or more, or leave it out")
        return self


class Config(JudgeConfig, DPOSettings, Episodes):
    """Names as in `dpo`; an episode samples, scores, pairs and updates."""

    learning_rate: float = Field(5e-7, gt=0, description="peak learning rate; one schedule over all episodes")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs of an episode")
    max_length: int = Field(8192, ge=8, description="longest prompt with either completion, in tokens; longer: no pair")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    nll_weight: float = Field(
        0.2, ge=0, description="weight of the chosen's negative log-likelihood per token: holds its probability up"
    )
    judge_threshold: float = Field(
        1.0, description="a completion that the judge gives less is never chosen; the lowest score: all may be"
    )

    probe_prompts: int = Field(
        200, ge=0, description="held-out prompts (dev split) on which the guards look after each episode; 0 is no guard"
    )
    kind: str = Field(
        "kind", description="the column that says whether a prompt is benign (safe, harmless) or harmful (unsafe)"
    )
    max_score_drop: float = Field(
        5.0,
        gt=0,
        allow_inf_nan=True,
        description="points of verified score below the best so far; .inf turns this guard off, or another",
    )
    max_family_drop: float = Field(
        25.0, gt=0, allow_inf_nan=True, description="points of one family's score below the best so far"
    )
    max_kind_drop: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=True,
        description="points of benign help, or of harmful refusal, below the best so far",
    )
    max_second_drop: float = Field(
        0.25,
        gt=0,
        allow_inf_nan=True,
        description="fall of the second reward below its best so far, in standard deviations of the start's answers",
    )
    min_sigmas: float = Field(
        2.0,
        ge=0,
        description="such a drop counts from so many of its own standard errors on, paired over the prompts; 0: always",
    )
    max_length_ratio: float = Field(
        2.0, gt=1, allow_inf_nan=True, description="mean length of the samples against the start's"
    )
    min_length_ratio: float = Field(0.33, ge=0, lt=1, description="the same, for samples that shrink; 0 is off")
    max_chosen_drop: float = Field(
        20.0, gt=0, allow_inf_nan=True, description="nats that the chosen lost against the reference"
    )
    max_kl: float = Field(100.0, gt=0, allow_inf_nan=True, description="nats a completion from the reference")
    max_sampler_gap: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=True,
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

    @property
    def scored_by(self) -> tuple[Part, ...]:
        """Who may be asked, as far as the settings alone say."""
        if self.scorer == "weighted":
            return tuple(part for part in PARTS if part in self.weights)
        return PARTS if self.scorer == "mix" else (self.scorer,)

    @model_validator(mode="after")
    def _scoring_and_pairing_make_sense(self) -> Self:
        if self.scorer == "weighted" and len(self.weights) < 2:
            raise ValueError(
                f"scorer is weighted and weights has {', '.join(self.weights) or 'nothing'}; give two or three of "
                f"{', '.join(PARTS)} a weight, or set scorer to the one that scores alone"
            )
        if self.scorer != "weighted" and self.weights:
            raise ValueError(f"weights has no effect with scorer={self.scorer}; set scorer to weighted, or leave it")
        for part, weight in self.weights.items():
            if not weight > 0:
                raise ValueError(f"weights: {part} has {weight:g}; weights are above 0: leave that one out")
        if self.choose_from > 1 and self.samples_per_prompt < 4:
            raise ValueError(
                f"choose_from={self.choose_from} draws half of samples_per_prompt={self.samples_per_prompt} first, and "
                "one completion has no variance; set samples_per_prompt to 4 or more"
            )
        if self.resample and self.scorer == "judge" and self.judge_threshold <= self.judge_lowest:
            raise ValueError(
                "resample has no effect where the judge's lowest score is believed; raise judge_threshold, such as 8"
            )
        deaf = {"max_pairs": f"pairing={self.pairing}; set pairing to all"} if self.pairing != "all" else {}
        if "verifier" not in self.scored_by or self.scorer == "verifier":
            deaf["verified_tasks"] = f"scorer={self.scorer}; set scorer to mix"
        if "judge" not in self.scored_by:
            names = [name for name in JudgeConfig.model_fields if name.startswith("judge_")]
            deaf |= dict.fromkeys(names, f"scorer={self.scorer}; set scorer to judge")
        for name, why in deaf.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with {why}, or leave {name} out")
        return self


GUARDS = (
    "kind", "max_score_drop", "max_family_drop", "max_kind_drop", "max_second_drop", "min_sigmas", "max_length_ratio",
    "min_length_ratio", "max_kl", "max_sampler_gap",
)  # fmt: skip
"""Settings that are read only where there is something to look at."""
