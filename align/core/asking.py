"""Asking a model for an answer of a fixed form: fill a template, parse strictly, ask again at most so often."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.errors import DataError

RETRY_TEMPERATURE = 0.7
"""A retry is sampled at this temperature at least: a greedy one would give the same answer again [our choice]."""

BATCH = 256
"""Questions that wait for their retries together."""

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
    remaining = iter(questions)
    while batch := list(islice(remaining, BATCH)):
        answers: dict[int, Answer[Parsed]] = {}
        for attempt in range(attempts):
            open_places = [place for place in range(len(batch)) if place not in answers or answers[place].problem]
            if not open_places:
                break
            how = params if attempt == 0 else replace(params, temperature=max(params.temperature, RETRY_TEMPERATURE))
            prompts = [batch[place][1] for place in open_places]
            for number, _, completion in engine.sample(prompts, 1, how, first_index=attempt):
                answers[open_places[number]] = _read(completion, parse, attempt + 1)
        for place, (item, _) in enumerate(batch):
            yield item, answers[place]


def _read(completion: Completion, parse: Callable[[str], Parsed], attempts: int) -> Answer[Parsed]:
    if completion.finish_reason == "error":
        return Answer(None, completion.text, attempts, f"not sampled: {completion.error}")
    try:
        return Answer(parse(completion.text), completion.text, attempts)
    except MalformedError as problem:
        return Answer(None, completion.text, attempts, str(problem))


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


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced; braces around anything else stay as they are.

    The values are put in as they are: a brace inside an instruction is never read as a placeholder.
    """
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)
