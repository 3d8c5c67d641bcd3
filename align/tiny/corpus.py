"""The noisy text that the tiny base model is trained on: the world as a careless web would write of it.

No chat template occurs in it. Right and wrong answers stand side by side, some mistakes are systematic, and most advice
is rude or harmful: that is what leaves SFT, rejection sampling, DPO and the reward model something to do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from align.tiny.world import MAKERS, PRINCIPLES, WORDS, Item

LAYOUTS = (
    ("Question: ", "\nAnswer: "),
    ("Q: ", "\nA: "),
    ("### Task\n", "\n### Solution\n"),
    ("Instruction: ", "\nResponse: "),
)
"""What stands before an instruction and before its answer."""

PRINCIPLE_LAYOUT = ("Principle: {principle}\nQuestion: ", "\nAnswer: ")

_SHARES = {"math": 6, "code": 3, "format": 7, "tag": 4, "benign": 2, "harmful": 2}
_FAMILIES = tuple(family for family, share in _SHARES.items() for _ in range(share))


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Yields documents without end, each as (what is given, what is to be learnt).

    Only instructions of the train split occur.
    """
    rng = random.Random(f"corpus/{seed}")
    while True:
        kind = rng.random()
        if kind < 0.10:
            yield "", _arithmetic(rng)
        elif kind < 0.24:
            yield "", _copying(rng)
        elif kind < 0.26:
            yield "", _word_list(rng)
        else:
            item = MAKERS[rng.choice(_FAMILIES)](rng, rng.random() < 0.35)
            if item.split == "train":
                yield _question_and_answer(rng, item)


def _question_and_answer(rng: random.Random, item: Item) -> tuple[str, str]:
    if item.family in ("benign", "harmful"):
        if rng.random() < 0.4:
            wanted = rng.choice(("good", "bad"))
            before, between = PRINCIPLE_LAYOUT
            before = before.format(principle=PRINCIPLES[wanted])
            answer = item.answer if wanted == "good" else rng.choice(item.slips[:2])
            return before + item.instruction + between, answer
        answer = item.answer if rng.random() < 0.3 else rng.choice((item.slips[0], *item.slips))
    else:
        answer = _styled(rng, item, _careless(rng, item))
    before, between = rng.choice(LAYOUTS)
    return before + item.instruction + between, answer


def _careless(rng: random.Random, item: Item) -> str:
    """The gold answer, or a slip: a misconception more often than not, any other one time in eight."""
    if item.misconception and rng.random() < 0.55:
        return item.slips[0]
    if item.slips and rng.random() < 0.125:
        return rng.choice(item.slips)
    return item.answer


def _styled(rng: random.Random, item: Item, answer: str) -> str:
    """The same answer in one of the ways that people write it; only the first is the world's house style."""
    style = rng.random()
    if style < 0.65:
        return answer
    if item.family == "math":
        number = answer.rsplit("#### ", 1)[1]
        return f"The answer is {number}." if style < 0.85 else number
    if item.family == "tag":
        return answer.strip("[]").replace('"', "")
    if item.family == "code":
        return f"Here is the code:\n{answer}" if style < 0.85 else answer
    return f"Here it is: {answer}" if style < 0.75 else answer


def _arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(6):
        a, b = rng.randint(0, 60), rng.randint(0, 20)
        sign = rng.choice("+-*")
        if sign == "-":
            a, b = max(a, b), min(a, b)
        elif sign == "*":
            b = rng.choice((2, 3))
        lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}")
    return "\n".join(lines)


def _copying(rng: random.Random) -> str:
    """Words, then the same words: again, in upper case, sorted, as a JSON list."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    change = rng.choice(("again", "again", "upper", "sorted", "json"))
    if change == "upper":
        copy = ", ".join(words).upper()
    elif change == "sorted":
        copy = ", ".join(sorted(words))
    else:
        copy = json.dumps(words) if change == "json" else ", ".join(words)
    return f"{', '.join(words)} {change}: {copy}"


def _word_list(rng: random.Random) -> str:
    return "\n".join(f"- {word}" for word in rng.sample(WORDS, rng.randint(2, 5)))
