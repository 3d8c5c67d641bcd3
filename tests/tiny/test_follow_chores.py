"""The chores of constraints and follow are right, and of the train split."""

import json
import random

from align.tiny.chores.follow import CHECKS, CHORES, PHRASES
from align.tiny.world import _DEMANDS, WORDS


def chores(name: str, count: int = 150) -> list[tuple[str, str]]:
    made = (CHORES[name](random.Random(f"{name}/{number}")) for number in range(count))
    return [(messages[0]["content"], answer) for messages, answer in made]


def test_every_function_of_a_chore_is_right_on_its_own_cases_and_both_outcomes_occur() -> None:
    assert set(PHRASES) == set(CHECKS) == set(_DEMANDS)
    for asked, answer in chores("verifier"):
        written = json.loads(answer)
        scope: dict[str, object] = {}
        exec(written["func"], scope)  # of our own making, not a model's
        for case in written["cases"]:
            assert scope["evaluate"](case["input"]) is case["output"], (asked, case)  # type: ignore[operator]
        assert {case["output"] for case in written["cases"]} == {True, False}


def test_a_demand_is_said_anew_and_told_apart_from_others() -> None:
    demand = {phrase: name for name, phrases in PHRASES.items() for phrase in phrases}
    for asked, answer in chores("augment"):
        seed = asked.partition("times: ")[2]
        said = answer.split("\n")
        assert seed not in said and {demand[line] for line in said} == {demand[seed]}
    for asked, answer in chores("relation"):
        one, _, other = asked.partition("? ")[2].partition(" / ")
        assert answer == ("entailment" if demand[one] == demand[other] else "contradiction")


def test_an_answer_with_other_words_than_were_asked_for_gets_a_low_score() -> None:
    for asked, answer in chores("quality"):
        task, _, completion = asked.partition("Task: ")[2].partition(" Answer: ")
        wanted = task.rpartition(": ")[2].strip(".").split(", ")
        if not task.startswith("List"):
            words = [word for word in WORDS for _ in range(completion.lower().split("done")[0].count(word))]
            assert answer == ("Score: 9" if sorted(words) == sorted(wanted) else "Score: 2"), asked
