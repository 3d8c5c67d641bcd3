"""A model as judge: an instruction and a completion to a score on a scale, read strictly, and from it a verdict.

An answer that is not a score is asked for again, and then it is an error and never a guess. Several votes are averaged.
The texts that are judged are marked off in the template by a line (`{mark}`) that none of them holds, so that no text
can end before its end. Reading the judge's words is in `reward.judge_words`, comparing two completions in
`reward.judge_pairs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from align.core.asking import Answer, Question, ask_each, fill, load_template
from align.core.engines.base import Engine, SamplingParams
from align.core.records import Message, Messages, Verdict
from align.core.stage import StageConfig
from align.core.text import stable_hash
from reward.judge_words import read_score

TEMPLATES = Path(__file__).parent / "templates"
Item = TypeVar("Item")
Values = Mapping[str, str | Sequence[Message]]
"""What fills a template's placeholders: text, or messages (a prompt, a completion)."""


class JudgeConfig(StageConfig):
    """Settings of the stages that may have a judge."""

    judge_template: str = Field(
        "judge", description="what the judge is asked: a shipped template's name, a file, or the text itself, with "
        "{instruction} and {completion}; {mark}, {lowest} and {highest} are filled too",
    )  # fmt: skip
    judge_lowest: float = Field(1.0, description="lowest score of the judge's scale")
    judge_highest: float = Field(10.0, description="highest score of the judge's scale")
    judge_threshold: float = Field(
        8.0, description="a score of at least this passes; 8 of 10 is AutoIF's (arXiv:2406.13542)"
    )
    judge_max_tokens: int = Field(256, ge=1, description="most new tokens of a judgement; one cut off is not read")
    judge_attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then it is an error")
    judge_votes: int = Field(
        1, ge=1, description="judgements asked for and averaged; it is an error where half of them or fewer can be read"
    )
    judge_temperature: float = Field(
        0.0, ge=0, le=5, description="sampling temperature of the judge; above 0 where there are several votes"
    )
    judge_json: bool = Field(
        False, description="let the judge write nothing but a JSON object with its reason and its score or winner, as "
        "the shipped templates ask; only for engines with structured output",
    )  # fmt: skip

    @model_validator(mode="after")
    def _scale_and_votes_make_sense(self) -> Self:
        if not self.judge_lowest < self.judge_highest:
            raise ValueError(
                f"judge_lowest={self.judge_lowest:g} must be below judge_highest={self.judge_highest:g}; swap them"
            )
        if not self.judge_lowest <= self.judge_threshold <= self.judge_highest:
            raise ValueError(
                f"judge_threshold={self.judge_threshold:g} is not on the scale from {self.judge_lowest:g} to "
                f"{self.judge_highest:g}; set judge_lowest, judge_highest or judge_threshold"
            )
        if self.judge_votes > 1 and self.judge_temperature == 0:
            raise ValueError("judge_votes above 1 need judge_temperature above 0, such as 0.7: else all votes are one")
        return self

    @property
    def scale(self) -> Scale:
        """The scale that these settings ask for."""
        return Scale(self.judge_lowest, self.judge_highest, self.judge_threshold)


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale of scores; one of at least `pass_from` passes."""

    lowest: float
    highest: float
    pass_from: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of judging one completion.

    Attributes:
        verdict: error where too few votes could be read; else its reward is the mean score, moved to 0 to 1.
        votes: the scores that could be read.
        answers: the judge's answers, one a vote, read or not.
    """

    verdict: Verdict
    votes: tuple[float, ...]
    answers: Sequence[Answer[float]]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the votes (of the population), in points of the scale; None without a vote."""
        if not self.votes:
            return None
        mean = fmean(self.votes)
        return sqrt(fmean((vote - mean) ** 2 for vote in self.votes))

    def figures(self) -> dict[str, Any]:
        """All of it, for a row."""
        spread = self.spread
        return {
            "votes": list(self.votes),
            "mean": round(fmean(self.votes), 4) if self.votes else None,
            "median": median(self.votes) if self.votes else None,
            "spread": None if spread is None else round(spread, 4),
            "unreadable": len(self.answers) - len(self.votes),
            "words": [answer.text for answer in self.answers],
        }


class Judge:
    """Judges completions with a model.

    Raises:
        DataError: the template can't be found, or lacks a placeholder that it `needs`.
    """

    def __init__(self, engine: Engine, config: JudgeConfig, seed: int, needs: Sequence[str] = ("completion",)) -> None:
        self.engine = engine
        self.config = config
        self.template = load_template(config.judge_template, TEMPLATES, needs)
        self.params = params_of(config, seed)

    def judge_many(self, items: Iterable[tuple[Item, Values]]) -> Iterator[tuple[Item, Verdict]]:
        """Yields each item with the judge's verdict, in order; the mapping fills the template.

        The reward is the score, the mean of all votes, moved to 0 (lowest) to 1 (highest).
        """
        for item, judgement in self.judgements(items):
            yield item, judgement.verdict

    def judgements(self, items: Iterable[tuple[Item, Values]]) -> Iterator[tuple[Item, Judgement]]:
        """The same with the votes and the judge's words."""
        scale, config = self.config.scale, self.config
        asked = ((item, [score_question(self.template, values, scale, config.judge_json)]) for item, values in items)
        for item, (answers,) in ask_each(
            self.engine, asked, self.params, config.judge_attempts, config.judge_votes, whole=True
        ):
            yield item, score(answers, scale, config.judge_attempts)


def params_of(config: JudgeConfig, seed: int) -> SamplingParams:
    """How a judge is sampled."""
    return SamplingParams(max_tokens=config.judge_max_tokens, temperature=config.judge_temperature, seed=seed)


def score_question(
    template: str, values: Values, scale: Scale, as_json: bool, more: Mapping[str, str] | None = None
) -> Question[float]:
    """The question for a score on a scale; see `filled`."""
    limits = {"lowest": f"{scale.lowest:g}", "highest": f"{scale.highest:g}"}
    prompt = filled(template, values, {**limits, **(more or {})})
    schema = verdict_schema("score", {"type": "number"}) if as_json else None
    return Question(prompt, lambda said: read_score(said, scale.lowest, scale.highest), schema)


def verdict_schema(word: str, of: Mapping[str, Any]) -> str:
    """The JSON schema of a verdict with its reason before it; nothing in it that some server may not know."""
    properties = {"reason": {"type": "string"}, word: of}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return json.dumps(schema)


def score(answers: Sequence[Answer[float]], scale: Scale, attempts: int) -> Judgement:
    """The judgement that the votes come to."""
    votes = tuple(answer.value for answer in answers if answer.value is not None)
    problem = too_few(answers, "score", attempts)
    if problem is not None:
        return Judgement(Verdict.error(problem), votes, answers)
    mean = fmean(votes)
    detail = f"judge: {mean:.4g} of {scale.highest:g}, {scale.pass_from:g} passes"
    if len(answers) > 1:
        detail += f"; votes {', '.join(f'{vote:g}' for vote in votes)}"
        detail += f" and {len(answers) - len(votes)} unreadable" if len(votes) < len(answers) else ""
    reward = (mean - scale.lowest) / (scale.highest - scale.lowest)
    return Judgement(Verdict("passed" if mean >= scale.pass_from else "failed", reward, detail), votes, answers)


def too_few(answers: Sequence[Answer[Any]], what: str, attempts: int) -> str | None:
    """Why the votes are too few to say anything: more than half must have been read. None if they are enough."""
    read = sum(answer.value is not None for answer in answers)
    needed = len(answers) // 2 + 1
    if read >= needed:
        return None
    failed = next(answer for answer in reversed(answers) if answer.value is None)
    if len(answers) == 1:
        return f"the judge gave no {what} in {attempts} attempts: {failed.problem}"
    return (
        f"only {read} of {len(answers)} votes of the judge could be read in {attempts} attempts each, "
        f"{needed} are needed: {failed.problem}"
    )


def filled(template: str, values: Values, more: Mapping[str, str] | None = None) -> Messages:
    """The template with what is judged put in, and a mark that stands in none of it, as a prompt.

    Args:
        template: with placeholders; `{mark}` is the line that marks off a text.
        values: what is judged.
        more: what is filled in besides; it comes from whoever asks, and is not marked off.
    """
    contents = [content for value in values.values() for content in _contents(value)]
    number = 0
    while True:
        # Made from the texts, so that whoever writes one can't know the mark, and tried until none has it.
        mark = f"=== {stable_hash(json.dumps([number, *contents]), 4)} ==="
        if not any(mark in content for content in contents):
            break
        number += 1
    texts = {name: value if isinstance(value, str) else dialogue(value, mark) for name, value in values.items()}
    return [{"role": "user", "content": fill(template, {**texts, **(more or {}), "mark": mark})}]


def dialogue(messages: Sequence[Message], mark: str) -> str:
    """Messages as a judge reads them: one alone is its content; of several each has its role above it.

    The role's line begins with the mark, so that no message can pretend to be the next one.
    """
    if len(messages) == 1 and messages[0]["role"] != "system" and not messages[0].get("tool_calls"):
        return messages[0]["content"]
    return "\n".join(f"{mark} {message['role']}\n{_said(message)}" for message in messages)


def _contents(value: str | Sequence[Message]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        yield from (_said(message) for message in value)


def _said(message: Message) -> str:
    """A message's content, and the calls of tools in it as JSON."""
    calls = message.get("tool_calls")
    return message["content"] + (f"\n{json.dumps(calls, ensure_ascii=False)}" if calls else "")
