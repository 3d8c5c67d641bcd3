"""The tags at the top of an ontology, and which of them every other tag lies under.

Where a tag nearly always comes with a more general one, subsumption has put it below that. What is left without a
parent may still be thousands of tags. They are grouped in one of two ways [ours; InsTag's tags have no levels]:

- without a model: the top tags are those that between them cover most instructions, found greedily (each is the one on
  most instructions that none before it is on). Every other tag goes under the top tag that it comes with most: the
  highest cosine of the two columns of instructions. One that comes with none goes under `other`.
- with a model (role `namer`): it names the groups after the most frequent tags, and then says for each tag without a
  parent which group it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from align.core.asking import MalformedError, Question, ask_each, fill, load_templates
from align.core.engines.base import Engine, SamplingParams
from align.core.errors import EngineError
from align.core.records import Messages
from align.core.stage import StageConfig, Tools
from data_synthesis.refinements import Applied
from data_synthesis.sampling import ErrorBudget
from data_synthesis.tag_merging import merged

TEMPLATES = Path(__file__).parent / "templates" / "ontology"
NEEDS = {"groups": ["tags", "count"], "group": ["groups", "tag"]}
OTHER = "other"
"""The top tag of what belongs nowhere else."""
SHOWN = 100
"""Tags, the most frequent ones, that the namer sees when it names the groups."""


class TopLevelConfig(StageConfig):
    """Settings of the top level, and of the model that may name it."""

    top_level: int = Field(
        20, ge=1, description="most tags at the top, `other` apart, and no more than the square root of all tags or two"
    )
    templates: str = Field(
        "default", description="what the namer is asked: a shipped set of templates (default, tiny) or a folder"
    )
    namer_json: bool = Field(
        False, description="let the namer write nothing but JSON of the form asked for; only for engines with "
        "structured output",
    )  # fmt: skip
    namer_max_tokens: int = Field(256, ge=1, description="most new tokens of an answer of the namer")
    namer_attempts: int = Field(3, ge=1, description="samples asked for until one can be read; then a tag is `other`")
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when the namer can't say the group of a larger share of tags"
    )


def grouped(
    config: TopLevelConfig, matrix: Any, names: Sequence[str], parents: Mapping[str, str | None], refined: Applied,
    examples: Mapping[str, list[str]], tools: Tools,
) -> tuple[dict[str, str | None], int]:  # fmt: skip
    """The parents with those that have none put under a few at the top, and how many tags the namer said nothing of."""
    parents = dict(parents)
    roots = sorted(tag for tag, parent in parents.items() if parent is None)
    under = merged(matrix, names, {name: root_of(name, parents) for name in names}, roots)
    counts = dict(zip(roots, np.asarray(under.sum(axis=0)).ravel().tolist(), strict=True))
    fixed = [*refined.top, *(tag for tag, parent in refined.parent.items() if not parent and tag not in refined.top)]
    most = max(len(fixed), min(config.top_level, max(2, round(len(names) ** 0.5))))
    namer, ungrouped = tools.engines.get("namer"), 0
    if namer is None and not refined.top and len(roots) <= most:
        return parents, 0

    if namer is None:
        top = fixed if refined.top else covering(under, roots, most, fixed)
        group_of: dict[str, str | None] = dict(by_company(under, roots, top))
    else:
        templates = load_templates(config.templates, TEMPLATES, NEEDS)
        params = SamplingParams(max_tokens=config.namer_max_tokens, temperature=0.0, seed=tools.seed)
        how = (params, config.namer_attempts, config.namer_json)
        top = fixed if refined.top else ask_for_groups(namer, templates["groups"], counts, most, *how)
        top = list(dict.fromkeys(root_of(name, parents) for name in top))
        loose = [(tag, next(iter(examples.get(tag, ())), "")) for tag in roots if tag not in {*top, *fixed}]
        budget = ErrorBudget("ontology (namer)", config.max_error_share)
        group_of = dict(ask_for_group(namer, templates["group"], loose, top, *how, budget))
        ungrouped = budget.errors
    for tag, group in group_of.items():
        above = root_of(group or OTHER, parents)
        if tag not in fixed and above != tag:
            parents.setdefault(above, None)
            parents[tag] = above
    return parents, ungrouped


def root_of(tag: str, parents: Mapping[str, str | None]) -> str:
    """The tag at the top that a tag lies under; itself if none is above it."""
    while (above := parents.get(tag)) is not None:
        tag = above
    return tag


def covering(matrix: Any, names: Sequence[str], most: int, first: Sequence[str] = ()) -> list[str]:
    """The tags that between them cover most instructions, at most so many, in the order that they were found.

    Args:
        matrix: instructions × tags, 1 where an instruction has a tag or one below it.
        names: of the columns.
        most: tags.
        first: those that are taken in any case.
    """
    left = np.ones(matrix.shape[0], dtype=np.int32)
    columns = matrix.tocsc()
    places = {name: number for number, name in enumerate(names)}
    taken = list(first)
    for name in taken:
        if name in places:
            left[columns[:, places[name]].indices] = 0
    while len(taken) < most:
        gains = np.asarray(matrix.T @ left).ravel()
        best = min(range(len(names)), key=lambda number: (-gains[number], names[number]))
        if not gains[best]:
            break
        taken.append(names[best])
        left[columns[:, best].indices] = 0
    return taken


def by_company(matrix: Any, names: Sequence[str], top: Sequence[str]) -> dict[str, str]:
    """For every other tag the top tag that it comes with most, or `other`."""
    counts = np.asarray(matrix.sum(axis=0)).ravel()
    places = {name: number for number, name in enumerate(names)}
    of = [name for name in top if name in places]
    numbers = [places[name] for name in of]
    if not of:
        return dict.fromkeys(names, OTHER)
    both = (matrix.T @ matrix[:, numbers]).toarray()
    # both / sqrt(count of the top tag): the tag's own count is the same for all of them
    closeness = both / np.sqrt(np.maximum(1, counts[numbers]))
    best = closeness.argmax(axis=1)
    return {
        name: of[best[number]] if both[number].any() else OTHER
        for number, name in enumerate(names)
        if name not in set(of)
    }


def ask_for_groups(
    engine: Engine, template: str, counts: Mapping[str, int], most: int, params: SamplingParams, attempts: int,
    as_json: bool,
) -> list[str]:  # fmt: skip
    """Names of groups for the most frequent tags.

    Raises:
        EngineError: the model gave none that can be read.
    """
    shown = sorted(counts, key=lambda tag: (-counts[tag], tag))[:SHOWN]
    listed = "\n".join(f"{tag} ({counts[tag]})" for tag in shown)
    prompt: Messages = [{"role": "user", "content": fill(template, {"tags": listed, "count": str(most)})}]
    schema = _schema("groups", {"type": "array", "items": {"type": "string"}}) if as_json else None
    question = Question(prompt, lambda text: read_groups(text, most), schema)
    ((_, ((answer,),)),) = ask_each(engine, [(None, [question])], params, attempts)
    if answer.value is None:
        raise EngineError(
            f"ontology: the namer gave no list of groups in {attempts} attempts: {answer.problem}. Take another model, "
            "or name the groups yourself: `top` in the file of refinements"
        )
    return answer.value


def ask_for_group(
    engine: Engine, template: str, tags: Iterable[tuple[str, str]], groups: Sequence[str], params: SamplingParams,
    attempts: int, as_json: bool, budget: ErrorBudget,
) -> Iterator[tuple[str, str | None]]:  # fmt: skip
    """Yields each tag with the group that the model puts it in; None where its answer can't be read.

    Args:
        engine: the namer.
        template: with `{groups}`, `{tag}`, `{example}`.
        tags: with an instruction that has each.
        groups: to choose from.
        params: of the first attempt.
        attempts: samples asked for until one can be read.
        as_json: hold the answer to the form.
        budget: takes the answers that can't be read.
    """
    choices = list(dict.fromkeys([*groups, OTHER]))
    schema = _schema("group", {"type": "string", "enum": choices}) if as_json else None
    listed = ", ".join(choices)

    def questions() -> Iterator[tuple[str, list[Question[str]]]]:
        for tag, example in tags:
            text = fill(template, {"groups": listed, "tag": tag, "example": example})
            prompt: Messages = [{"role": "user", "content": text}]
            yield tag, [Question(prompt, lambda said: read_group(said, choices), schema)]

    for tag, ((answer,),) in ask_each(engine, questions(), params, attempts):
        budget.count(answer.value is None, answer.problem)
        yield tag, answer.value
    budget.check()


def read_groups(text: str, most: int) -> list[str]:
    """Names of groups in a model's answer: `{"groups": [...]}`, one to `most` of them.

    Raises:
        MalformedError: anything else.
    """
    found = _object(text, "groups")
    if not isinstance(found, list) or not all(isinstance(name, str) and name.strip() for name in found):
        raise MalformedError(f"no list of names: {text[:80]!r}")
    names = list(dict.fromkeys(" ".join(name.split()).lower() for name in found))
    if not 1 <= len(names) <= most:
        raise MalformedError(f"{len(names)} groups, 1 to {most} were asked for")
    return names


def read_group(text: str, choices: Sequence[str]) -> str:
    """The group in a model's answer: `{"group": "..."}`.

    Raises:
        MalformedError: anything else, a group among it that is none of the choices.
    """
    found = _object(text, "group")
    if isinstance(found, str):
        for choice in choices:
            if choice.lower() == found.strip().lower():
                return choice
    raise MalformedError(f"no group of those that were given: {text[:80]!r}")


def _object(text: str, key: str) -> Any:
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        found = json.loads(body)
    except ValueError as problem:
        raise MalformedError(f"not JSON: {text[:80]!r}") from problem
    if not isinstance(found, dict) or key not in found:
        raise MalformedError(f"no JSON object with {key!r}: {text[:80]!r}")
    return found[key]


def _schema(key: str, of: Mapping[str, Any]) -> str:
    return json.dumps({"type": "object", "properties": {key: of}, "required": [key], "additionalProperties": False})
