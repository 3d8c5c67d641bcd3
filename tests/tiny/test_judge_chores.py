"""The judge's chores: what they answer can be read as a judge's words are, and is right."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from align.tiny.chores import judge
from align.tiny.world import Item
from reward.judge_words import read_score, read_winner


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """The items that the chores draw; the first since it was emptied is the one that is asked about."""
    items: list[Item] = []
    draw = judge._item

    def seen(rng: random.Random) -> Item:
        items.append(draw(rng))
        return items[-1]

    monkeypatch.setattr(judge, "_item", seen)
    return items


def parts(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    assert found, text
    return found.groups()


def test_a_score_is_high_for_the_right_answer_and_low_for_any_other(drawn: list[Item]) -> None:
    rng, seen = random.Random(5), Counter[float]()
    for _ in range(300):
        drawn.clear()
        messages, answer = judge.score(rng)
        pattern = r"Task: (.*)\nAnswer: (.*)\nScore the answer from 1 to 10\."
        instruction, said = parts(pattern, messages[0]["content"])
        assert instruction == drawn[0].instruction and drawn[0].split == "train"
        given = read_score(answer, judge.SCALE.lowest, judge.SCALE.highest)
        assert (given == 10) == (said == drawn[0].answer)
        seen[given] += 1
    assert min(seen[10.0], seen[2.0]) > 90 and seen[1.0] > 3


def test_the_better_of_two_wins_wherever_it_stands(drawn: list[Item]) -> None:
    rng, seen = random.Random(6), Counter[str]()
    for _ in range(300):
        drawn.clear()
        messages, answer = judge.compare(rng)
        pattern = r"Task: (.*)\nA: (.*)\nB: (.*)\nWhich is better\?"
        _, a, b = parts(pattern, messages[0]["content"])
        winner, right = read_winner(answer), drawn[0].answer
        seen[winner] += 1
        if right in (a, b):
            assert winner == ("tie" if a == b else "A" if a == right else "B")
    assert 0.7 < seen["A"] / seen["B"] < 1.4 and 30 < seen["tie"] < 120
