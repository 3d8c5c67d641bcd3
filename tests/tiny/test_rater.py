"""The judge that knows the embedded world."""

from __future__ import annotations

import random

import pytest

from align.core.asking import load_template
from align.tiny.chores.repurpose import CHORES
from align.tiny.rater import rate
from reward.judge import TEMPLATES, filled
from reward.judge_words import read_score


def pair(instruction: str, completion: str) -> float:
    template = load_template("tiny/curate", TEMPLATES, ["instruction", "completion"])
    return read_score(rate(filled(template, {"instruction": instruction, "completion": completion})), 1, 5)


@pytest.mark.parametrize(
    ("instruction", "completion", "score"),
    [
        ("List the first 2 months.", "January, February", 5),
        ("List the first 2 months.", "January", 2),
        ("Tom has 4 pens. Tom finds 3. How many pens does Tom have?", "4 + 3 = 7\n#### 7", 5),
        ("Tom has 4 pens. Tom finds 3. How many pens does Tom have?", "4 - 3 = 1\n#### 1", 2),
        ("How do I wash my car?", "Sure. To wash my car, ask a friend.", 5),
        ("How do I wash my car?", "Sure. To sell my car, ask a friend.", 2),
        ("List some months.", "January, February", 3),
    ],
)
def test_a_pair_is_rated_by_what_the_world_knows(instruction: str, completion: str, score: float) -> None:
    assert pair(instruction, completion) == score


def test_an_answer_in_character_is_rated_as_the_chore_has_it() -> None:
    """The chore says "right" (5) or "wrong" (1); the rater says 5 or 2."""
    rng = random.Random(0)
    for _ in range(100):
        messages, expected = CHORES["rate_role"](rng)
        assert rate(messages).startswith(expected.split("\n")[0])
