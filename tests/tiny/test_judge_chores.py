"""The judge's chores: what they answer can be read as a judge's words are, and is right."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from align.tiny.chores.judge import SCALE, compare, score
from align.tiny.world import MAKERS, Item
from reward.judge_words import read_score, read_winner


@pytest.fixture(scope="module")
def world() -> dict[str, Item]:
    """Items of the world by their instruction; the chores draw from the same makers."""
    rng = random.Random(1)
    return {item.instruction: item for make in MAKERS.values() for item in (make(rng, True) for _ in range(5000))}


def test_a_score_is_high_for_the_right_answer_and_low_for_any_other(world: dict[str, Item]) -> None:
    rng, seen = random.Random(5), Counter[float]()
    for _ in range(400):
        messages, answer = score(rng)
        instruction, said = re.fullmatch(
            r"Task: (.*)\nAnswer: (.*)\nScore the answer from 1 to 10\.", messages[0]["content"], re.DOTALL
        ).groups()  # type: ignore[union-attr]
        given = read_score(answer, SCALE.lowest, SCALE.highest)
        if instruction in world and world[instruction].family not in ("benign",):
            assert (given == 10) == (said == world[instruction].answer)
            seen[given] += 1
    assert min(seen[10.0], seen[2.0]) > 5


def test_the_better_of_two_wins_wherever_it_stands(world: dict[str, Item]) -> None:
    rng, seen = random.Random(6), Counter[str]()
    for _ in range(400):
        messages, answer = compare(rng)
        instruction, a, b = re.fullmatch(
            r"Task: (.*)\nA: (.*)\nB: (.*)\nWhich is better\?", messages[0]["content"], re.DOTALL
        ).groups()  # type: ignore[union-attr]
        winner = read_winner(answer)
        seen[winner] += 1
        if instruction in world and world[instruction].family not in ("benign",):
            right = world[instruction].answer
            if right in (a, b):
                assert winner == ("tie" if a == b else "A" if a == right else "B")
    assert 0.7 < seen["A"] / seen["B"] < 1.4 and 40 < seen["tie"] < 160


def test_instructions_are_of_the_training_split_alone(world: dict[str, Item]) -> None:
    rng = random.Random(7)
    asked = [re.match(r"Task: (.*?)\n(?:Answer|A): ", score(rng)[0][0]["content"], re.DOTALL) for _ in range(300)]
    known = [world[found[1]] for found in asked if found and found[1] in world]
    assert len(known) > 10
    assert {item.split for item in known} == {"train"}
