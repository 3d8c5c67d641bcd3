"""The judge's chores: scoring an answer from 1 to 10, and saying which of two answers is better.

The tiny judge says first what it would answer itself, then its verdict: what a model of this size can't see in an
answer it can still compare with its own. Answers are right ones, the world's slips, and ones spoilt as samples are:
cut short, a number changed, another instruction's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import cast

from align.core.asking import load_template
from align.core.records import Messages
from align.tiny.world import MAKERS, Item
from reward.judge import TEMPLATES, Scale, score_question
from reward.judge_pairs import pair_questions

SCALE = Scale(1.0, 10.0, 8.0)
_FAMILIES = ("math", "math", "math", "code", "code", "format", "format", "format", "tag", "benign", "harmful")
_OWN = {"benign": "Help politely.", "harmful": "Refuse politely."}


def score(rng: random.Random) -> tuple[Messages, str]:
    """A score: 10 for a right answer, 2 for a wrong one, 1 for one that has nothing to do with the task."""
    item = _item(rng)
    answer, worth = (item.answer, 10) if rng.random() < 0.5 else _wrong(rng, item)
    template = load_template("tiny_judge", TEMPLATES, ["instruction", "completion"])
    question = score_question(template, {"instruction": item.instruction, "completion": answer}, SCALE, False)
    return cast(Messages, question.prompt), f"{_own(item)}\nScore: {worth}"


def compare(rng: random.Random) -> tuple[Messages, str]:
    """A comparison: the better answer wins; of two right ones, or two of the same worth, neither does."""
    item = _item(rng)
    kind = rng.random()
    right, wrong = (item.answer, 10), _wrong(rng, item)
    both = [right, wrong] if kind < 0.8 else [right, right] if kind < 0.9 else [wrong, _wrong(rng, item)]
    rng.shuffle(both)
    (a, of_a), (b, of_b) = both
    template = load_template("tiny_judge_pair", TEMPLATES, ["instruction", "completion_a", "completion_b"])
    first, _ = pair_questions(template, {"instruction": item.instruction}, a, b, False)
    winner = "tie" if of_a == of_b else "A" if of_a > of_b else "B"
    return cast(Messages, first.prompt), f"{_own(item)}\nWinner: {winner}"


def _item(rng: random.Random) -> Item:
    """An instruction of the training split."""
    while True:
        item = MAKERS[rng.choice(_FAMILIES)](rng, rng.random() < 0.3)
        if item.split == "train":
            return item


def _own(item: Item) -> str:
    """What the judge would answer; of advice, where many answers are right, only what kind of answer is."""
    return _OWN.get(item.family, item.answer)


def _wrong(rng: random.Random, item: Item) -> tuple[str, int]:
    """A wrong answer and its score."""
    kind = rng.random()
    spoilt = item.answer
    if kind < 0.1:
        other = _item(rng)
        if other.family != item.family:
            return other.answer, 1
    elif kind < 0.2:
        spoilt = item.answer[: rng.randint(1, max(1, len(item.answer) // 2))]
    elif kind < 0.5 and item.family in ("math", "code"):
        numbers = list(re.finditer(r"\d+", item.answer))
        if numbers:
            at = numbers[-1] if item.family == "math" else rng.choice(numbers)
            changed = str(max(0, int(at[0]) + rng.choice((-10, -2, -1, 1, 2, 10))))
            spoilt = item.answer[: at.start()] + changed + item.answer[at.end() :]
    if spoilt == item.answer:
        spoilt = rng.choice(item.slips) if item.slips else "What?"
    return spoilt, 2


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {"score": score, "compare": compare}
