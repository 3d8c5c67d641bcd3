"""Settings of the stage `rank`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_synthesis.sampling import PooledConfig, Temperature
from reward.judged import JudgedConfig

By = Literal["judge", "reward_model", "people"]
Criterion = Literal["judge", "reward_model", "people", "verifier"]


class RankConfig(PooledConfig, JudgedConfig):
    """Settings of `rank`."""

    by: Literal["judge", "reward_model", "people", "nobody"] = Field(
        "judge", description="who ranks; nobody only samples, so that people can rank what was sampled"
    )
    also: list[By] = Field([], description="who ranks besides, to see how far they agree; they decide nothing")
    judging: Literal["pairs", "scores"] = Field(
        "pairs", description="what a judge is asked: which of two is better, for every two in both orders, n(n-1) "
        "questions of n completions; or the score of each, n questions, coarser",
    )  # fmt: skip
    judge_template: str = Field(
        "judge_rubric", description="what the judge is asked for a score: a shipped template's name, a file, or the "
        "text itself, with {completion}, and {instruction}, {rubric}, {lowest}, {highest}, {mark} as wanted",
    )  # fmt: skip
    compare_template: str = Field(
        "judge_pair", description="what the judge is asked of two: the same, with {completion_a} and {completion_b}, "
        "and {instruction}, {rubric}, {mark} as wanted",
    )  # fmt: skip
    rubric: str = Field(
        "Does it do what the instruction asks: correctly above all, then completely and to the point?", min_length=1,
        description="what counts, where the template has {rubric}",
    )  # fmt: skip
    criteria: list[Criterion] | None = Field(
        None, description="what the best must meet to pass: judge (scores it judge_threshold or more), verifier (of "
        "the prompt's task), reward_model (its gate), people (most found it good enough); by default that of `by`",
    )  # fmt: skip
    annotations: list[str] = Field(
        [], description="files in which people ranked the completions, made by `align rank --serve` or `--import`"
    )
    samples: int = Field(2, ge=1, description="completions of each engine at each temperature")
    temperature: Temperature | Annotated[list[Temperature], Field(min_length=1)] = Field(
        [0.7, 1.0], description="sampling temperature, or several that every engine samples at"
    )
    keep: int = Field(1, ge=1, description="most completions of a prompt that are kept, where several are the best")

    @model_validator(mode="after")
    def _rankers_make_sense(self) -> Self:
        if self.by in self.also:
            raise ValueError(f"also names {self.by}, which is `by` already; leave it out there")
        if self.by == "nobody" and (self.also or self.criteria):
            raise ValueError("by=nobody ranks nothing; leave out also and criteria")
        if self.annotations and "people" not in (self.by, *self.also):
            raise ValueError("annotations are given and nobody reads them; set by=people, or also=[people]")
        if "people" in (self.criteria or []) and "people" not in (self.by, *self.also):
            raise ValueError("criteria=[people] needs people who rank; set by=people, or also=[people]")
        return self

    @property
    def must_meet(self) -> list[Criterion]:
        """What the best must meet."""
        if self.criteria is not None:
            return list(self.criteria)
        return [] if self.by == "nobody" else [self.by]
