"""Asking a model for an answer of a fixed form: fill a template, parse strictly, ask again at most so often."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Generic, TypeVar

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.errors import DataError, EngineError

RETRY_TEMPERATURE = 0.7
"""A retry is sampled at this temperature at least: a greedy one would give the same answer again [our choice]."""

BATCH = 1024
"""Items whose questions are asked, and asked again, together."""

NOT_SAMPLED = "not sampled"
"""How the problem of an answer begins that the engine failed to give."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


class MalformedError(ValueError):
    """An answer that is not of the form that was asked for; the message says what was found."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[Parsed]):
    """What came of one question.

    Attributes:
        value: the parsed answer; None where every attempt failed.
        text: the model's last words, whether they could be parsed or not.
        attempts: how many samples it took.
        problem: why the last attempt failed, where it did.
    """

    value: Parsed | None
    text: str
    attempts: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Question(Generic[Parsed]):
    """A question to a model.

    Attributes:
        prompt: what it is asked.
        parse: how its answer is read: gives the value, or raises `MalformedError`.
        json_schema: holds the answer to a form, where the engine can (see `SamplingParams`).
    """

    prompt: Prompt
    parse: Callable[[str], Parsed]
    json_schema: str | None = None


def ask(
    engine: Engine,
    questions: Iterable[tuple[Item, Prompt]],
    parse: Callable[[str], Parsed],
    params: SamplingParams,
    attempts: int,
) -> Iterator[tuple[Item, Answer[Parsed]]]:
    """Yields each item with the answer to its question, in order; each attempt is the next sample index.

    Args:
        engine: who is asked.
        questions: an item of the caller's and the prompt; read a batch ahead.
        parse: gives the value, or raises `MalformedError`.
        params: of the first attempt; later ones are sampled at `RETRY_TEMPERATURE` at least.
        attempts: most samples a question; 1 is no retry.
    """
    items = ((item, [Question(prompt, parse)]) for item, prompt in questions)
    for item, answers in ask_each(engine, items, params, attempts):
        yield item, answers[0][0]


def ask_each(
    engine: Engine,
    items: Iterable[tuple[Item, Sequence[Question[Parsed]]]],
    params: SamplingParams,
    attempts: int,
    votes: int = 1,
    whole: bool = False,
) -> Iterator[tuple[Item, list[list[Answer[Parsed]]]]]:
    """Yields each item with the answers to its questions, in order: for every question a list of `votes` of them.

    A vote that can't be read is asked for again, at the sample index after the last one that its question used.

    Args:
        engine: who is asked.
        items: an item of the caller's and its questions, none or several; read a batch ahead, and never while the
            engine samples, so that they may come from the same engine.
        params: of the first attempt; later ones are sampled at `RETRY_TEMPERATURE` at least.
        attempts: most samples for one vote; 1 is no retry.
        votes: answers wanted to each question.
        whole: an answer that was cut off at `max_tokens` counts as malformed ("Score: 1" may have become "Score: 10").

    Raises:
        EngineError: the engine can't go on, or gave too few completions.
    """
    remaining = iter(items)
    while batch := list(islice(remaining, BATCH)):
        asked = [[_Asked(question, votes) for question in questions] for _, questions in batch]
        turn = 0
        for attempt in range(1, attempts + 1):
            warm = max(params.temperature, RETRY_TEMPERATURE) if attempt > 1 else params.temperature
            for (missing, first, schema), group in _by_need(asked).items():
                prompts = [one.question.prompt for one in group]
                how = replace(params, temperature=warm, json_schema=schema or params.json_schema)
                for number, index, completion in engine.sample(prompts, missing, how, first_index=first):
                    group[number].take(index - first, _read(completion, group[number].question, attempt, whole))
                    while turn < len(batch) and all(one.is_done() for one in asked[turn]):
                        yield batch[turn][0], [one.given() for one in asked[turn]]
                        turn += 1
                for one in group:
                    one.taken += missing
                    if None in one.answers:
                        raise EngineError(
                            f"{engine.generator}: the engine gave too few completions for a prompt; this is a fault of "
                            "the engine, not of the prompt"
                        )
        for place in range(turn, len(batch)):
            yield batch[place][0], [one.given() for one in asked[place]]


class _Asked(Generic[Parsed]):
    """A question with the answers so far.

    Attributes:
        answers: by vote; None where the engine has not answered yet.
        lacking: votes that this round asks for.
        taken: sample indices used so far.
    """

    def __init__(self, question: Question[Parsed], votes: int) -> None:
        self.question = question
        self.answers: list[Answer[Parsed] | None] = [None] * votes
        self.lacking: list[int] = []
        self.taken = 0

    def take(self, place: int, answer: Answer[Parsed]) -> None:
        """Takes an answer of this round in, by its place among those that were lacking."""
        self.answers[self.lacking[place]] = answer

    def is_done(self) -> bool:
        """Whether every vote could be read."""
        return all(answer is not None and not answer.problem for answer in self.answers)

    def given(self) -> list[Answer[Parsed]]:
        """The answers, when all rounds are over."""
        return [answer for answer in self.answers if answer is not None]


_Need = tuple[int, int, str | None]
"""How many votes a question lacks, the first sample index that is free, and its JSON schema."""


def _by_need(asked: Iterable[Iterable[_Asked[Parsed]]]) -> dict[_Need, list[_Asked[Parsed]]]:
    """The questions that still lack votes, those together that can be sampled in one call."""
    groups: dict[_Need, list[_Asked[Parsed]]] = {}
    for one in chain.from_iterable(asked):
        one.lacking = [place for place, answer in enumerate(one.answers) if answer is None or answer.problem]
        if one.lacking:
            groups.setdefault((len(one.lacking), one.taken, one.question.json_schema), []).append(one)
    return groups


def _read(completion: Completion, question: Question[Parsed], attempts: int, whole: bool) -> Answer[Parsed]:
    if completion.finish_reason == "error":
        return Answer(None, completion.text, attempts, f"{NOT_SAMPLED}: {completion.error}")
    if whole and completion.finish_reason == "length":
        problem = f"cut off after {len(completion.token_ids)} tokens, the most that were allowed"
        return Answer(None, completion.text, attempts, problem)
    try:
        return Answer(question.parse(completion.text), completion.text, attempts)
    except MalformedError as problem:
        return Answer(None, completion.text, attempts, str(problem) or "malformed")


def load_template(setting: str, shipped: Path, needs: Iterable[str]) -> str:
    """The text of a prompt template, from a setting that holds it, names a file, or names a shipped one.

    Args:
        setting: a text with at least one placeholder (`{instruction}`), a path, or a name in `shipped` (`tag`).
        shipped: the folder of the package's own templates.
        needs: placeholders that the template must have.

    Raises:
        DataError: there is no such template, or a placeholder is missing.
    """
    text = setting
    if not _PLACEHOLDER.search(setting):
        places = [Path(setting).expanduser(), shipped / f"{setting}.txt"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            names = ", ".join(sorted(path.stem for path in shipped.glob("*.txt")))
            raise DataError(
                f"template {setting!r}: no such file, and no shipped template ({names}); a template's text "
                "itself holds a placeholder such as {instruction}"
            )
        text = found.read_text(encoding="utf-8").removesuffix("\n")  # a space at the end may be meant
    missing = sorted(set(needs) - set(_PLACEHOLDER.findall(text)))
    if missing:
        raise DataError(f"template {setting!r}: lacks {', '.join(f'{{{name}}}' for name in missing)}")
    return text


def load_templates(setting: str, shipped: Path, needs: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The texts of a stage's prompt templates by name, from a setting that names a shipped set or a folder.

    Args:
        setting: `default`, the name of a folder in `shipped` (`tiny`), or a path. A template that the folder lacks is
            the default one.
        shipped: the folder of the stage's own templates: the default set as files, other sets as folders.
        needs: the placeholders that each template must have, by its name.

    Raises:
        DataError: there is no such set, a file in it is none of the templates, or a placeholder is missing.
    """
    sets = sorted(place.name for place in shipped.iterdir() if place.is_dir())
    folder = shipped if setting == "default" else shipped / setting if setting in sets else Path(setting).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"templates {setting!r}: no such folder, and no shipped set (default, {', '.join(sets)}); a folder holds "
            f"{', '.join(f'{name}.txt' for name in needs)}, or some of them"
        )
    texts = {}
    for name, placeholders in needs.items():
        file = folder / f"{name}.txt"
        texts[name] = load_template(str(file if file.is_file() else shipped / f"{name}.txt"), shipped, placeholders)
    if folder.parent != shipped and folder != shipped:
        unknown = sorted(file.name for file in folder.glob("*.txt") if file.stem not in needs)
        if unknown:
            expected = ", ".join(f"{name}.txt" for name in needs)
            raise DataError(f"templates {setting!r}: {', '.join(unknown)}: no template of this stage ({expected})")
    return texts


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced; braces around anything else stay as they are.

    The values are put in as they are: a brace inside an instruction is never read as a placeholder.
    """
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)
