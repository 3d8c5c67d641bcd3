"""A model as judge: an instruction and a completion to a score on a scale, read strictly, and from it a verdict.

An answer that is not a score is asked for again, and then it is an error and never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from align.core.asking import Answer, MalformedError, ask, fill, load_template
from align.core.engines.base import Engine, Prompt, SamplingParams
from align.core.records import Messages, Verdict
from align.core.stage import StageConfig

TEMPLATES = Path(__file__).parent / "templates"
Item = TypeVar("Item")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


class JudgeConfig(StageConfig):
    """Settings of the stages that may have a judge."""

    judge_template: str = Field(
        "judge", description="what the judge is asked: a shipped template's name, a file, or the text itself, with "
        "{instruction} and {completion}",
    )  # fmt: skip
    judge_lowest: float = Field(1.0, description="lowest score of the judge's scale")
    judge_highest: float = Field(10.0, description="highest score of the judge's scale")
    judge_threshold: float = Field(
        8.0, description="a score of at least this passes; 8 of 10 is AutoIF's (arXiv:2406.13542)"
    )
    judge_max_tokens: int = Field(256, ge=1, description="most new tokens of a judgement")
    judge_attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then it is an error")


class Judge:
    """Judges completions with a model.

    Raises:
        DataError: the template can't be found, or lacks a placeholder that it `needs`.
    """

    def __init__(self, engine: Engine, config: JudgeConfig, seed: int, needs: Sequence[str] = ("completion",)) -> None:
        self.engine = engine
        self.config = config
        self.template = load_template(config.judge_template, TEMPLATES, needs)
        self.params = SamplingParams(max_tokens=config.judge_max_tokens, temperature=0.0, seed=seed)

    def judge_many(self, items: Iterable[tuple[Item, Mapping[str, str]]]) -> Iterator[tuple[Item, Verdict]]:
        """Yields each item with the judge's verdict, in order; the mapping fills the template.

        The reward is the score moved to 0 (lowest) to 1 (highest).
        """

        def questions() -> Iterator[tuple[Item, Prompt]]:
            for item, values in items:
                prompt: Messages = [{"role": "user", "content": fill(self.template, values)}]
                yield item, prompt

        def parse(text: str) -> float:
            return read_score(text, self.config.judge_lowest, self.config.judge_highest)

        for item, answer in ask(self.engine, questions(), parse, self.params, self.config.judge_attempts):
            yield item, self._verdict(answer)

    def _verdict(self, answer: Answer[float]) -> Verdict:
        if answer.value is None:
            return Verdict.error(f"the judge gave no score in {answer.attempts} attempts: {answer.problem}")
        low, high = self.config.judge_lowest, self.config.judge_highest
        passed = answer.value >= self.config.judge_threshold
        detail = f"judge: {answer.value:g} of {high:g}, {self.config.judge_threshold:g} passes"
        return Verdict("passed" if passed else "failed", (answer.value - low) / (high - low), detail)


def read_score(text: str, lowest: float, highest: float) -> float:
    """The score in a judge's answer: a number alone, or a JSON object with a number `score`, in a code fence or not.

    Raises:
        MalformedError: anything else, or a number outside the scale.
    """
    found = _FENCE.fullmatch(text.strip())
    body = found.group(1) if found else text.strip()
    try:
        value = json.loads(body)
    except ValueError as problem:
        raise MalformedError(f"neither a number nor a JSON object: {body[:80]!r}") from problem
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MalformedError(f"no number as score: {body[:80]!r}")
    if not lowest <= value <= highest:
        raise MalformedError(f"the score {value:g} is not between {lowest:g} and {highest:g}")
    return float(value)
