"""Chores of `repurpose`, `back-translate` and `role-play`: an instruction for an answer, a rating, a role."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from align.core.asking import fill, load_template, load_templates
from align.core.records import Messages
from align.tiny.world import ANIMALS, DONT_KNOW, MAKERS, Item, profile, role_questions
from data_synthesis.repurpose import TEMPLATES as SHIPPED
from reward.judge import TEMPLATES as JUDGES

_LEVELS = load_templates("tiny", SHIPPED, {level: ["passage"] for level in ("sparse", "medium", "detailed")})
_ROLE = load_templates(
    "tiny", SHIPPED.parent / "role-play", dict.fromkeys(("known", "unknown", "answer", "decline"), ())
)
_BACKWARD = load_template("tiny/backward", SHIPPED.parent, ["answer"])
_CURATE = load_template("tiny/curate", JUDGES, ["instruction", "completion"])
_IN_ROLE = load_template("tiny/role", JUDGES, ["question", "completion"])
_FAMILIES = ("math", "math", "code", "format", "format", "benign")
_VERB = re.compile(r"(?:How do I|How can I|Tell me how to|Explain how to|Show me how to) (.*?)[.?]")


def _item(rng: random.Random, families: tuple[str, ...] = _FAMILIES) -> Item:
    while True:
        item = MAKERS[rng.choice(families)](rng, rng.random() < 0.3)
        if item.split == "train":
            return item


def at_level(item: Item, level: str) -> str:
    """The instruction of an item told with less: what is wanted (sparse), and the main thing about it (medium)."""
    text = item.instruction
    if level == "detailed":
        return text
    if item.family == "code":
        found = re.search(r"function (\w+)\(xs\) that returns the (sum|count|list|sorted list)", text)
        assert found is not None
        more = f"(xs) that returns a {found[2]}" if level == "medium" else ""
        return f"Write a Python function {found[1]}{more}."
    if item.family == "math":
        lines = item.answer.splitlines()[:-1]
        if level == "sparse":
            return f"Show how to get {item.answer.rsplit(' ', 1)[1]}."
        steps = [" ".join(line.split()[1:3]) for line in lines]
        return f"Go from left to right: {' '.join([lines[0].split()[0], *steps])}."
    if item.family == "format":
        listed = re.match(r"List the first (\d) (\w+)\.", text)
        if level == "medium":
            return listed[0] if listed else f"Copy {len(text.split('.')[0].split(','))} words."
        return f"List some {listed[2]}." if listed else "Copy some words."
    request = _VERB.fullmatch(text)
    assert request is not None
    return f"How do I {request[1]}?" if level == "sparse" else f"Please tell me how to {request[1]}."


def _written(level: str) -> Callable[[random.Random], tuple[Messages, str]]:
    def make(rng: random.Random) -> tuple[Messages, str]:
        item = _item(rng)
        prompt = fill(_LEVELS[level], {"passage": item.answer})
        return [{"role": "user", "content": prompt}], f"Instruction: {at_level(item, level)}"

    return make


def _backward(rng: random.Random) -> tuple[Messages, str]:
    item = _item(rng)
    prompt = fill(_BACKWARD, {"answer": item.answer})
    return [{"role": "user", "content": prompt}], f"Instruction: {item.instruction}"


def _rating(instruction: str, answer: str, said: str, score: int) -> tuple[Messages, str]:
    prompt = fill(_CURATE, {"instruction": instruction, "completion": answer})
    return [{"role": "user", "content": prompt}], f"{said}\nScore: {score}"


def _rate_right(rng: random.Random) -> tuple[Messages, str]:
    """A rating: 5 for an answer that does what is asked, 3 for one that does more."""
    item = _item(rng)
    level = rng.choice(("sparse", "medium", "detailed", "detailed"))
    plain = level == "detailed" or item.family != "format" or len(item.tags) == 1
    return _rating(at_level(item, level), item.answer, *(("right", 5) if plain else ("more than asked", 3)))


def _rate_wrong(rng: random.Random) -> tuple[Messages, str]:
    """A rating: 2 for a slip, or for the answer to an instruction that differs in a verb or a number."""
    while True:
        item = _item(rng)
        answer = item.slips[0] if item.slips and rng.random() < 0.3 else _nearly(rng, item).answer
        if answer != item.answer and not (item.family == "benign" and item.reference["any"][0] in answer.lower()):
            return _rating(item.instruction, answer, "wrong", 2)


def _rate_other(rng: random.Random) -> tuple[Messages, str]:
    """A rating: 1 for an answer to something else."""
    item, other = _item(rng), _item(rng)
    while other.family == item.family:
        other = _item(rng)
    return _rating(at_level(item, rng.choice(("sparse", "medium", "detailed"))), other.answer, "something else", 1)


def _nearly(rng: random.Random, item: Item) -> Item:
    """Another item of the family whose instruction begins with the same words, where a few tries find one."""
    others = [_item(rng, (item.family,)) for _ in range(20)]
    return max(others, key=lambda other: _begin_alike(item.instruction, other.instruction))


def _begin_alike(one: str, other: str) -> int:
    return sum(a == b for a, b in zip(one.split(), other.split(), strict=False))


def _two(rng: random.Random) -> tuple[dict[str, str], dict[str, int], dict[str, str], dict[str, int]]:
    """Two characters with their animals; the second has other ones than the first where that is to be asked about."""
    one, mine = profile(rng)
    while True:
        other, others = profile(rng)
        if other["name"] != one["name"]:
            return one, mine, other, others


def _questions(known: bool) -> Callable[[random.Random], tuple[Messages, str]]:
    def make(rng: random.Random) -> tuple[Messages, str]:
        one, mine, other, others = _two(rng)
        who, animals = (one, mine) if known else (other, others)
        count = rng.randint(1, 2)
        asked = []
        for animal, number in list(animals.items())[:count]:
            question = f"How many {animal} does {who['name']} have?"
            if known:
                question, _ = rng.choice(role_questions(animal, number))
            asked.append({"evidence": f"{who['name']} has {number} {animal}.", "question": question})
        values = {
            "name": one["name"], "facts": one["facts"], "other": other["name"], "other_facts": other["facts"],
            "count": str(count),
        }  # fmt: skip
        prompt = fill(_ROLE["known" if known else "unknown"], values)
        return [{"role": "user", "content": prompt}], json.dumps(asked)

    return make


def _system(one: dict[str, str]) -> str:
    return f"You are {one['name']}. {one['brief']}"


def _is_held_out(one: dict[str, str], question: str) -> bool:
    return Item("role", "exact", question, "", {}, (), root=f"{_system(one)}\n{question}").split != "train"


def _in_character(rng: random.Random) -> tuple[Messages, str]:
    while True:
        one, mine, other, others = _two(rng)
        animal = rng.choice(tuple(mine))
        question, answer = rng.choice(role_questions(animal, mine[animal]))
        values = {"evidence": f"{one['name']} has {mine[animal]} {animal}.", "question": question}
        template = "answer"
        if rng.random() < 0.4:
            question, answer = f"How many {rng.choice(tuple(others))} does {other['name']} have?", DONT_KNOW
            values, template = {"question": question}, "decline"
        if not _is_held_out(one, question):
            break
    messages: Messages = [{"role": "system", "content": _system(one)}]
    if rng.random() < 0.3:  # an earlier turn
        animal = rng.choice(ANIMALS)
        early = rng.choice(role_questions(animal, mine[animal])) if animal in mine else (
            f"How many {animal} does {other['name']} have?", DONT_KNOW,
        )  # fmt: skip
        messages += [{"role": "user", "content": early[0]}, {"role": "assistant", "content": early[1]}]
    return [*messages, {"role": "user", "content": fill(_ROLE[template], values)}], answer


def _rate_role(rng: random.Random) -> tuple[Messages, str]:
    """5 for what the character knows or owns not to know, 1 for a wrong number, a needless "I don't know", a leak."""
    one, mine, other, others = _two(rng)
    known = rng.random() < 0.5
    animal = rng.choice(tuple(mine if known else others))
    number = (mine if known else others)[animal]
    wrong = rng.choice([n for n in range(2, 10) if n != number])
    if known:
        question, answer = rng.choice(role_questions(animal, number))
        bad = (answer.replace(str(number), str(wrong)), DONT_KNOW)
    else:
        question, answer = f"How many {animal} does {other['name']} have?", DONT_KNOW
        bad = (f"{other['name']} has {number} {animal}.", f"I have {wrong} {animal}.")
    right = rng.random() < 0.5
    values = {
        "name": one["name"], "facts": one["facts"], "question": question,
        "completion": answer if right else rng.choice(bad),
    }  # fmt: skip
    said = "right\nScore: 5" if right else "wrong\nScore: 1"
    return [{"role": "user", "content": fill(_IN_ROLE, values)}], said


CHORES = {
    "sparse": _written("sparse"),
    "medium": _written("medium"),
    "detailed": _written("detailed"),
    "backward": _backward,
    "rate_right": _rate_right,
    "rate_wrong": _rate_wrong,
    "rate_other": _rate_other,
    "known": _questions(True),
    "unknown": _questions(False),
    "in_character": _in_character,
    "rate_role": _rate_role,
}
