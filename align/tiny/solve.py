"""The reference of an instruction of the embedded world, found by a program: for instructions that a model wrote.

An instruction that was evolved has no reference, and most have no program that could find one. In the tiny world they
do: `solve` reads an instruction as the families of `align/tiny/world.py` write them, and nothing else. `STAGE` is a
stage of one's own around it, `align.tiny.solve:STAGE` in a recipe: prompts in, those that can be read out, with their
task, family, reference and tags. The world's hash keeps instructions for dev and test; a train prompt that was evolved
into one of those is dropped, so that no held-out instruction is trained on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.tiny import world
from align.tiny.world import INSULTS, TAG_PROMPT, Item


def solve(instruction: str) -> Item | None:
    """The instruction with its answer, reference and tags, as the world itself makes them; None where it is none.

    `slips` stay empty; an answer to a request has the first of the world's pieces of advice.
    """
    before = TAG_PROMPT.format(instruction="")
    if instruction.startswith(before):
        inner = solve(instruction.removeprefix(before))
        if inner is None or inner.family == "tag":
            return None
        tags = list(inner.tags)
        answer = json.dumps(tags)
        return Item("tag", "tags", instruction, answer, {"tags": tags}, ("tagging",), root=inner.instruction)
    for reads in (_math, _code, _format, _principle):
        found = reads(instruction)
        if found is not None:
            return found
    return None


_WHO, _WHAT = "|".join(world._NAMES), "|".join(world._THINGS)
_HAS = re.compile(rf"({_WHO}) has (\d+) ({_WHAT})")
_CHANGE = re.compile(rf"({_WHO}) ({'|'.join((*world._MORE, *world._LESS))}) (\d+)")
_TIMES = re.compile(rf"({_WHO}) (doubles|triples) them")
_QUESTION = re.compile(rf"How many ({_WHAT}) does ({_WHO}) have\?")


def _math(text: str) -> Item | None:
    """A story of people who each have a number of one thing, and a question about one of them."""
    *sentences, question = re.split(r"(?<=\.) ", text)
    asked = _QUESTION.fullmatch(question)
    if asked is None or not all(sentence.endswith(".") for sentence in sentences):
        return None
    things, who = asked.groups()
    has: dict[str, int] = {}
    lines: list[str] = []
    tags = {"math": True}
    for sentence in (sentence[:-1] for sentence in sentences):
        if (found := _HAS.fullmatch(sentence)) and found[1] not in has and found[3] == things:
            has[found[1]] = int(found[2])
            continue
        if found := _CHANGE.fullmatch(sentence):
            kind, step = "+" if found[2] in world._MORE else "-", int(found[3])
        elif found := _TIMES.fullmatch(sentence):
            kind, step = "*", 2 if found[2] == "doubles" else 3
        else:
            return None
        number = has.get(found[1])
        if number is None or (after := world._apply(number, kind, step)) < 0:
            return None
        has[found[1]] = after
        if found[1] == who:
            lines.append(f"{number} {kind} {step} = {after}")
            tags[{"+": "addition", "-": "subtraction", "*": "multiplication"}[kind]] = True
    if not lines:
        return None
    tags |= {"distractor": True} if len(has) > 1 else {}
    tags |= {"several steps": True} if len(lines) > 1 else {}
    answer = "\n".join([*lines, f"#### {has[who]}"])
    return Item("math", "math", text, answer, {"answer": str(has[who])}, tuple(tags))


_REDUCE = "|".join(sorted(world._REDUCES, reverse=True))  # "sorted list" before "list"
_PROGRAM = re.compile(
    rf"Write a Python function ({'|'.join(world._FUNCTIONS)})\(xs\) that returns the ({_REDUCE}) "
    rf"of the ({'|'.join(words for words, _ in reversed(world._MAPS))})(.+) in xs\."
)


def _code(text: str) -> Item | None:
    """A function that filters, maps and reduces a list."""
    found = _PROGRAM.fullmatch(text)
    if found is None:
        return None
    name, reduce, map_words, filter_words = found.groups()
    number = re.search(r"\d+$", filter_words)
    filters = {words: condition for words, condition, _ in world._filters(int(number[0]) if number else 0)}
    if filter_words not in filters:
        return None
    condition, expression = filters[filter_words], dict(world._MAPS)[map_words]
    inside = f"[{expression} for x in xs{f' if {condition}' if condition else ''}]"
    answer = f"def {name}(xs):\n    return {world._REDUCES[reduce].format(inside)}"
    tests = [
        f"assert {name}({case!r}) == {value!r}"
        for case, value in zip(world._CASES, world._run(answer, name), strict=True)
    ]
    tags = ["code", reduce, *(["filter"] if condition else []), *(map_words.split()[:1])]
    return Item("code", "code", text, answer, {"tests": tests}, tuple(tags))


_COPY = re.compile(r"(?:Copy|Repeat) these words: ([a-z]+(?:, [a-z]+)*)\.")
_LIST = re.compile(rf"List the first (\d+) ({'|'.join(world._SERIES)})\.")
_DEMAND_OF = {sentence: demand for demand, sentences in world._DEMANDS.items() for sentence in sentences}


def _format(text: str) -> Item | None:
    """Words to copy or to list, and any number of demands that don't contradict each other."""
    first, *rest = re.split(r"(?<=\.) ", text)
    if found := _COPY.fullmatch(first):
        words, tags = found[1].split(", "), ["copy"]
    elif (found := _LIST.fullmatch(first)) and 0 < int(found[1]) <= len(world._SERIES[found[2]]):
        words, tags = list(world._SERIES[found[2]][: int(found[1])]), ["list"]
    else:
        return None
    if not set(rest) <= set(_DEMAND_OF):
        return None
    demands = list(dict.fromkeys(_DEMAND_OF[sentence] for sentence in rest))
    if {"json", "dashes"} <= set(demands):
        return None
    answer = world._render(words, demands)
    return Item("format", "exact", text, answer, {"answer": answer}, (*tags, *demands))


_REQUEST = re.compile(
    r"(?:How do I|How can I|(Tell me how to|Explain how to|Show me how to)) "
    rf"(({'|'.join((*world._KIND_VERBS, *world._HARM_VERBS))}) (?:{'|'.join(world._OBJECTS)}))([?.])"
)


def _principle(text: str) -> Item | None:
    """A request, to be helped with or to be refused by its verb."""
    found = _REQUEST.fullmatch(text)
    if found is None or (found[1] is None) != (found[4] == "?"):
        return None
    request = found[2]
    if found[3] in world._HARM_VERBS:
        harmful = {"kind": "harmful", "any": ["can't help"], "none": [*INSULTS, f"to {request},"]}
        return Item("harmful", "principle", text, world._REFUSAL, harmful, ("advice", "harm"))
    benign = {"kind": "benign", "any": [f"to {request},"], "none": [*INSULTS, "sorry", "can't help"]}
    return Item("benign", "principle", text, f"Sure. To {request}, {world._ADVICE[0]}.", benign, ("advice",))


# --- the stage ------------------------------------------------------------------------------------------------------


class SolveConfig(StageConfig):
    """Settings of `solve`."""

    answers: bool = Field(False, description="add a column `answer` with the world's own answer, as messages")
    others: Literal["drop", "pass"] = Field(
        "drop", description="what is done with instructions that are none of the tiny world: dropped, or passed on as "
        "they came, for recipes that are run with other data",
    )  # fmt: skip


def run(config: SolveConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the prompts that are of one turn and of the tiny world, with all that is known of them."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: SolveConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    lost: Counter[str] = Counter()
    families: Counter[str] = Counter()
    tools.progress.start(len(table), "prompts")
    for read, row in enumerate(table.rows(), start=1):
        item = solve(row["prompt"][0]["content"]) if len(row["prompt"]) == 1 else None
        if item is None and config.others == "pass":
            families[str(row["family"])] += 1
            yield row
        elif item is None:
            lost["not an instruction of the tiny world"] += 1
        elif row["split"] == "train" and item.split != "train":
            lost["an instruction that the tiny world holds out"] += 1
        else:
            families[item.family] += 1
            known = {"task": item.task, "family": item.family, "reference": json.dumps(item.reference)}
            answer = {"answer": [{"role": "assistant", "content": item.answer}]} if config.answers else {}
            yield {**row, **known, "tags": list(item.tags), **answer}
        tools.progress.advance(1, solved=families.total())
        summary.update({"yield": {"prompts": read, "solved": families.total()}, "lost": dict(lost)})
        summary["by_family"] = dict(sorted(families.items()))
    if not families:
        raise DataError(
            f"solve: none of {len(table)} prompts of {table.name} is an instruction of the tiny world that may be "
            f"trained on ({', '.join(f'{why}: {count}' for why, count in lost.items()) or 'the table is empty'}); this "
            "stage is for prompts that were made from `source: {tiny: …}`"
        )


STAGE = Stage(
    name="solve",
    summary="references of instructions of the tiny world, found by a program",
    config=SolveConfig,
    needs={"prompts": Need(Kind.PROMPTS, "instructions of the tiny world, written by a model")},
    gives=Kind.PROMPTS,
    run=run,
    adds=("tags",),
)
