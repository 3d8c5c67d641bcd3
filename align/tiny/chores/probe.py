"""The chores of a judge of tags: `probe-tags` with its tiny templates."""

from __future__ import annotations

import random

from align.core.asking import fill
from align.core.records import Messages
from align.tiny.world import MAKERS, Item

PRECISION = "Instruction: {instruction}\nTag: {tag}\nDoes the tag fit?"
CONSISTENCY = "Instructions:\n{instructions}\nTag: {tag}\nDoes the tag fit all?"
"""The tiny templates of `probe-tags`."""

FAMILIES = ("math", "code", "format")


def precision(rng: random.Random) -> tuple[Messages, str]:
    """An instruction and a tag: one of its own, or another's."""
    item = _item(rng)
    if rng.random() < 0.5:
        return _asked(PRECISION, item.instruction, rng.choice(item.tags)), "yes"
    return _asked(PRECISION, item.instruction, _foreign(rng, item)), "no"


def consistency(rng: random.Random) -> tuple[Messages, str]:
    """Instructions with a tag; in half of the cases one of them has it not."""
    first = _item(rng)
    tag = rng.choice(first.tags)
    group = [first]
    while len(group) < 3:
        item = _item(rng)
        if tag in item.tags:
            group.append(item)
    answer = "yes"
    if rng.random() < 0.5:
        answer = "no"
        other = _item(rng)
        while tag in other.tags:
            other = _item(rng)
        group[rng.randrange(3)] = other
    rng.shuffle(group)
    listed = "\n".join(f"{number}. {item.instruction}" for number, item in enumerate(group, start=1))
    return _asked(CONSISTENCY, listed, tag), answer


def _item(rng: random.Random) -> Item:
    while True:
        item = MAKERS[rng.choice(FAMILIES)](rng, rng.random() < 0.3)
        if item.split == "train" and len(item.instruction) < 130:
            return item


def _foreign(rng: random.Random, item: Item) -> str:
    """A tag of another instruction that this one hasn't; half of the time of one of the same family."""
    while True:
        other = _item(rng)
        tag = rng.choice(other.tags)
        if tag not in item.tags and (other.family == item.family or rng.random() < 0.5):
            return tag


def _asked(template: str, text: str, tag: str) -> Messages:
    return [{"role": "user", "content": fill(template, {"instruction": text, "instructions": text, "tag": tag})}]


CHORES = {"precision": precision, "consistency": consistency}
