"""Chores of the stage `evolve`: making an instruction of the embedded world harder, writing another, and judging both.

Instructions and what becomes of them are of the train split, and `solve` reads all of them: what the model learns to
write has a reference.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from align.core.asking import fill
from align.core.records import Messages
from align.tiny.solve import solve
from align.tiny.world import _DEMANDS, _LESS, _MAPS, _MORE, _NAMES, _SERIES, MAKERS, WORDS, Item, _filters

TEMPLATES = Path(__file__).parents[3] / "data_synthesis" / "templates" / "evolve" / "tiny"
FAMILIES = ("math", "math", "code", "format", "format")


@cache
def template(name: str) -> str:
    """A template of the tiny set."""
    return (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def asked(name: str, **values: str) -> Messages:
    """The filled template as a prompt."""
    return [{"role": "user", "content": fill(template(name), values)}]


# --- making harder: each edit gives the new instruction, or None where it has nothing to do ----------------------


def _one_more_step(rng: random.Random, item: Item) -> str | None:
    *sentences, question = re.split(r"(?<=\.) ", item.instruction)
    who, number = question.split()[-2], int(item.reference["answer"])
    kind = rng.choice(("+", "-", "-", "*")) if 0 < number <= 40 else rng.choice("+-")
    if kind == "*":
        step = f"{who} {rng.choice(('doubles', 'triples'))} them."
    elif kind == "-" and number > 1:
        step = f"{who} {rng.choice(_LESS)} {rng.randint(1, min(20, number - 1))}."
    else:
        step = f"{who} {rng.choice(_MORE)} {rng.randint(1, 20)}."
    return " ".join([*sentences, step, question])


def _another_person(rng: random.Random, item: Item) -> str | None:
    *sentences, question = re.split(r"(?<=\.) ", item.instruction)
    if "distractor" in item.tags:
        return None
    things, who = question.split()[2], question.split()[-2].rstrip("?")
    other = rng.choice([name for name in _NAMES if name != who])
    return " ".join([*sentences, f"{other} has {rng.randint(2, 20)} {things}.", question])


def _one_more_demand(rng: random.Random, item: Item) -> str | None:
    barred = {"json", "dashes"} if {"json", "dashes"} & set(item.tags) else set()
    free = [demand for demand in _DEMANDS if demand not in item.tags and demand not in barred]
    return f"{item.instruction} {rng.choice(_DEMANDS[rng.choice(free)])}" if free else None


def _one_more_word(rng: random.Random, item: Item) -> str | None:
    if found := re.match(r"List the first (\d+) (\w+)", item.instruction):
        more = int(found[1]) + 1
        return item.instruction.replace(found[1], str(more), 1) if more <= len(_SERIES[found[2]]) else None
    head, tail = item.instruction.split(".", 1)
    words = head.split(": ")[1].split(", ")
    if len(words) > 3:
        return None
    return f"{head}, {rng.choice([word for word in WORDS if word not in words])}.{tail}"


def _with_filter(rng: random.Random, item: Item) -> str | None:
    if "filter" in item.tags:
        return None
    words = rng.choice(_filters(rng.randint(1, 8))[1:])[0]
    return item.instruction.replace("numbers in xs", f"{words} in xs")


def _with_map(rng: random.Random, item: Item) -> str | None:
    if any(words and words in item.instruction for words, _ in _MAPS):
        return None
    return re.sub(r" of the ", f" of the {rng.choice(_MAPS[1:])[0]}", item.instruction, count=1)


def _sorted_list(rng: random.Random, item: Item) -> str | None:
    text = item.instruction.replace("returns the list", "returns the sorted list")
    return text.replace("returns the sum", "returns the count") if text == item.instruction else text


Edit = Callable[[random.Random, Item], str | None]
MATH, FORMAT, CODE = (_one_more_step, _another_person), (_one_more_demand, _one_more_word), (_with_filter, _with_map)
EDITS: dict[str, dict[str, tuple[Edit, ...]]] = {
    "constraints": {"math": MATH[::-1], "format": FORMAT, "code": (*CODE, _sorted_list)},
    "deepen": {"math": MATH, "format": FORMAT, "code": (_with_map, _with_filter, _sorted_list)},
    "concretise": {"math": MATH, "format": FORMAT[::-1], "code": (*CODE, _sorted_list)},
    "reasoning": {"math": MATH, "format": FORMAT, "code": (_sorted_list, *CODE)},
    "complicate": {"math": MATH[::-1], "format": FORMAT[::-1], "code": (_with_map, _with_filter, _sorted_list)},
}
"""What an operation is in this world, by family: the first edit that has something to do."""


def harder(rng: random.Random, operation: str, item: Item) -> Item | None:
    """The instruction after one operation; None where it can't be made harder."""
    for edit in EDITS[operation][item.family]:
        text = edit(rng, item)
        if text is not None and text != item.instruction:
            return solve(text)
    return None


def _drawn(rng: random.Random, families: tuple[str, ...] = FAMILIES, simple: float = 0.7) -> Item:
    while True:
        item = MAKERS[rng.choice(families)](rng, rng.random() < simple)
        if item.split == "train":
            return item


def _in_depth(operation: str) -> Callable[[random.Random], tuple[Messages, str]]:
    def chore(rng: random.Random) -> tuple[Messages, str]:
        """An instruction, and a harder one."""
        while True:
            item = _drawn(rng)
            found = harder(rng, operation, item)
            if found is not None and found.split == "train":
                return asked(operation, instruction=item.instruction), found.instruction

    return chore


def tree(rng: random.Random) -> tuple[Messages, str]:
    """An instruction, and one that two or three operations made of it."""
    while True:
        item = found = _drawn(rng)
        nodes = rng.choice((2, 2, 3))
        for operation in rng.sample(tuple(EDITS), nodes):
            found = harder(rng, operation, found) or found
        if found.split == "train" and len(found.instruction) > len(item.instruction) + 12:
            return asked("tree", instruction=item.instruction, nodes=str(nodes)), found.instruction


def another(rng: random.Random, item: Item) -> Item:
    """A new instruction of the same family."""
    while True:
        found = _drawn(rng, (item.family,), 0.5)
        if found.instruction != item.instruction:
            return found


def breadth(rng: random.Random) -> tuple[Messages, str]:
    """An instruction, and another of its family."""
    item = _drawn(rng, (*FAMILIES, "benign", "harmful"))
    return asked("breadth", instruction=item.instruction), another(rng, item).instruction


# --- judging --------------------------------------------------------------------------------------------------------


def _reworded(item: Item) -> str:
    """The same instruction in other words: nothing is gained."""
    if item.family == "format" and item.instruction.startswith(("Copy", "Repeat")):
        first = "Repeat" if item.instruction.startswith("Copy") else "Copy"
        return f"{first} {item.instruction.split(' ', 1)[1]}"
    if item.family == "code":
        name = "f" if "function g(" in item.instruction else "g"
        return re.sub(r"function \w+", f"function {name}", item.instruction)
    return item.instruction


def _judged(rng: random.Random, name: str, item: Item, new: Item) -> tuple[Messages, str] | None:
    """A question about a new version and its verdict; None where the version is not of the train split."""
    said = rng.choice(("gained", "gained", "equal", "answered"))
    text = new.instruction if said == "gained" else _reworded(item) if said == "equal" else new.answer
    version = solve(text)
    if version is not None and version.split != "train":
        return None
    return asked(name, original=item.instruction, instruction=text), said


def judge_depth(rng: random.Random) -> tuple[Messages, str]:
    """Two instructions, and whether the second is a harder one, no harder, or no instruction but an answer."""
    while True:
        item = _drawn(rng)
        found = harder(rng, rng.choice(tuple(EDITS)), item)
        if found is not None and found.split == "train":
            chore = _judged(rng, "judge_depth", item, found)
            if chore is not None:
                return chore


def judge_breadth(rng: random.Random) -> tuple[Messages, str]:
    """Two instructions, and whether the second is a new one, the same again, or no instruction but an answer."""
    while True:
        item = _drawn(rng, (*FAMILIES, "benign", "harmful"))
        chore = _judged(rng, "judge_breadth", item, another(rng, item))
        if chore is not None:
            return chore


def judge_difficulty(rng: random.Random) -> tuple[Messages, str]:
    """An instruction, and how hard it is: by the number of its tags."""
    item = _drawn(rng, simple=0.4)
    return asked("judge_difficulty", instruction=item.instruction), str(2 * len(item.tags))


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {
    **{operation: _in_depth(operation) for operation in EDITS},
    "tree": tree,
    "breadth": breadth,
    "judge_depth": judge_depth,
    "judge_breadth": judge_breadth,
    "judge_difficulty": judge_difficulty,
}
