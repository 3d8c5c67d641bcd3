"""The spread of difficulty of prompts: words, tags and a judge's score, found and put into figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from align.core.asking import Question, ask_each, fill
from align.core.engines.base import Engine, SamplingParams
from align.core.records import Messages, Row
from align.core.text import words
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.tag import read_tags
from reward.judge import verdict_schema
from reward.judge_words import read_score

MEASURES = ("words", "tags", "difficulty")


def tagged(
    rows: Iterable[Row], tagger: Engine, template: str, params: SamplingParams, attempts: int, budget: ErrorBudget
) -> Iterator[Row]:
    """Yields the rows with the tagger's `tags`; those that have some keep them."""

    def questions(row: Row) -> list[Question[list[str]]]:
        prompt: Messages = [{"role": "user", "content": fill(template, {"instruction": last_user_text(row)})}]
        return [] if row.get("tags") else [Question(prompt, read_tags)]

    for row, answers in ask_each(tagger, ((row, questions(row)) for row in rows), params, attempts, whole=True):
        for (answer,) in answers:
            budget.count(answer.value is None, answer.problem)
            row = {**row, "tags": list(dict.fromkeys(answer.value or []))}
        yield row


def scored(
    rows: Iterable[Row],
    judge: Engine,
    prompt_of: Callable[[Row], Messages],
    params: SamplingParams,
    attempts: int,
    budget: ErrorBudget,
    as_json: bool,
) -> Iterator[Row]:
    """Yields the rows with the judge's `difficulty`, 1 to 10; None where it can't be read."""
    schema = verdict_schema("score", {"type": "number"}) if as_json else None
    asked = ((row, [Question(prompt_of(row), lambda said: read_score(said, 1, 10), schema)]) for row in rows)
    for row, ((answer,),) in ask_each(judge, asked, params, attempts, whole=True):
        budget.count(answer.value is None, answer.problem)
        yield {**row, "difficulty": answer.value}


class Spread:
    """Counts how often each value of a measure occurs, by level; no row is kept."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[str, Counter[float]]] = defaultdict(lambda: {name: Counter() for name in MEASURES})
        self._prompts: Counter[int] = Counter()

    def count(self, row: Row) -> None:
        """Takes a prompt in: its words, and its tags and difficulty where it has them."""
        self._prompts[row["level"]] += 1
        of_level = self._counts[row["level"]]
        of_level["words"][len(words(last_user_text(row)))] += 1
        if row.get("tags") is not None:
            of_level["tags"][len(row["tags"])] += 1
        if row.get("difficulty") is not None:
            of_level["difficulty"][row["difficulty"]] += 1

    def whole(self) -> dict[str, Any]:
        """The figures of all prompts together."""
        joined = {name: Counter[float]() for name in MEASURES}
        for of_level in self._counts.values():
            for name in MEASURES:
                joined[name].update(of_level[name])
        return {"prompts": self._prompts.total(), **figures(joined)}

    def levels(self) -> dict[str, Any]:
        """The figures by level, the lowest first."""
        return {
            f"level {level}": {"prompts": self._prompts[level], **figures(self._counts[level])}
            for level in sorted(self._counts)
        }


def figures(counts: dict[str, Counter[float]]) -> dict[str, Any]:
    """Mean, standard deviation (of the population), tenth, middle and ninetieth percentile of each measure."""
    found: dict[str, Any] = {}
    for name, values in counts.items():
        total = values.total()
        if total:
            mean = sum(value * count for value, count in values.items()) / total
            variance = sum((value - mean) ** 2 * count for value, count in values.items()) / total
            found[name] = {
                "mean": round(mean, 2), "sd": round(variance**0.5, 2), "p10": _percentile(values, 0.1),
                "p50": _percentile(values, 0.5), "p90": _percentile(values, 0.9),
            }  # fmt: skip
    return found


def _percentile(values: Counter[float], share: float) -> float:
    """The least value that at least this share of all does not exceed."""
    passed, needed = 0, share * values.total()
    for value in sorted(values):
        passed += values[value]
        if passed >= needed:
            break
    return value
