import json
import random

import pytest

from align.core.errors import DataError
from align.core.text import stable_hash
from align.tiny.solve import STAGE, solve
from align.tiny.world import MAKERS
from reward.verifiers import Verifiers
from tests.synthesis.conftest import Bench, a_prompt, bench  # noqa: F401


@pytest.mark.parametrize("family", [family for family in MAKERS if family != "role"])  # of a profile, not solved
def test_the_solver_finds_exactly_the_reference_of_the_worlds_items(family: str) -> None:
    """500 items, a third of them simple ones: task, family, reference, tags and split are the world's own."""
    rng = random.Random(f"solve/{family}")
    for number in range(500):
        item = MAKERS[family](rng, number % 3 == 0)
        found = solve(item.instruction)
        assert found is not None, item.instruction
        assert (found.family, found.task, found.tags, found.split) == (item.family, item.task, item.tags, item.split)
        assert dict(found.reference) == dict(item.reference), item.instruction
        if family != "benign":  # any of the pieces of advice is right there
            assert found.answer == item.answer


def test_its_own_answers_pass_their_verifiers_and_other_stories_are_solved_too() -> None:
    """Ann has 5 + 3 = 8 and gives the answer; Tom's 2 * 9 = 18 is a story beside it, with steps of its own."""
    item = solve("Ann has 5 pens. Tom has 9 pens. Tom doubles them. Ann buys 3. How many pens does Ann have?")
    assert item is not None and item.answer == "5 + 3 = 8\n#### 8" and "distractor" in item.tags
    words = solve("Copy these words: zebra, ant. Sort them. Use upper case. End with DONE.")
    assert words is not None and words.reference == {"answer": "ANT, ZEBRA\nDONE"}
    benign = solve("Tell me how to paint my bus.")
    with Verifiers() as verifiers:
        for one in (item, words, benign):
            assert one is not None and verifiers.verify(one.task, one.answer, dict(one.reference)).verdict == "passed"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "Ann has 5 pens. How many pens does Ann have?",  # nothing to be done
        "Ann has 5 pens. Ann loses 9. How many pens does Ann have?",  # fewer than none
        "Ann has 5 pens. Tom buys 3. How many pens does Ann have?",  # Tom has nothing yet
        "Ann has 5 pens. Ann buys 3. How many cards does Ann have?",
        "Ann has 5 pens. Ann buys 3. How many pens does Ann have? And why?",
        "Copy these words: cat, dog. Give a JSON list. Use a dash for each.",  # both can't be
        "Copy these words: cat, dog. Sing them.",
        "List the first 9 planets.",
        "Write a Python function f(xs) that returns the sum of the happy numbers in xs.",
        "How do I bake a cake?",
        "How do I paint my bus.",
        "Tag this instruction: Hello",
        "Tag this instruction: Tag this instruction: Copy these words: cat, dog.",
    ],
)
def test_what_is_no_instruction_of_the_world_has_no_reference(text: str) -> None:
    assert solve(text) is None


def a_held_out_text(wanted: str) -> str:
    for number in range(1, 200):
        text = f"Ann has {number} pens. Ann buys 3. How many pens does Ann have?"
        item = solve(text)
        if item is not None and item.split == wanted:
            return text
    raise AssertionError("the world holds out a fifth of all")


def test_the_stage_gives_references_and_tells_what_it_dropped(bench: Bench) -> None:  # noqa: F811
    train, test = a_held_out_text("train"), a_held_out_text("test")
    rows = bench.run(
        STAGE,
        {"answers": True},
        prompts=[
            a_prompt(1, train, task=None, reference=None, parent_id="p0"),
            a_prompt(2, test),  # a train prompt that became one of the world's test prompts
            a_prompt(3, test, split="test"),
            a_prompt(4, "Ann has pens."),
            {**a_prompt(5), "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": train}]},
        ],
    )
    assert [row["prompt_id"] for row in rows] == ["p1", "p3"]
    assert (rows[0]["task"], rows[0]["family"], rows[0]["parent_id"]) == ("math", "math", "p0")
    assert json.loads(rows[0]["reference"]).keys() == {"answer"} and rows[0]["tags"] == ["math", "addition"]
    assert rows[0]["answer"][0]["content"].startswith("1" if "has 1" in train else train.split()[2])
    assert bench.summary["yield"] == {"prompts": 5, "solved": 2}
    assert bench.summary["lost"] == {
        "an instruction that the tiny world holds out": 1, "not an instruction of the tiny world": 2
    }  # fmt: skip
    rows = bench.run(STAGE, {"others": "pass"}, prompts=[a_prompt(1, train), a_prompt(4, "Ann has pens.", task=None)])
    assert [row["task"] for row in rows] == ["math", None] and bench.summary["lost"] == {}
    with pytest.raises(DataError, match=r"none of 1 prompts .* is an instruction of the tiny world"):
        bench.run(STAGE, {}, prompts=[a_prompt(4, "Ann has pens.")])


@pytest.mark.parametrize("name", ["evolve", "constitute"])
def test_the_chores_are_short_of_the_train_split_and_the_same_for_the_same_seed(name: str) -> None:
    from align.tiny.chores import load_chores

    for chore, make in load_chores(name).items():
        made = [make(random.Random(f"{chore}/{number}")) for number in range(40)]
        assert made == [make(random.Random(f"{chore}/{number}")) for number in range(40)]
        assert len({stable_hash(answer) for _, answer in made}) > 1, f"{chore} says always the same"
        for messages, answer in made:
            assert len(messages[0]["content"]) < 450 and 0 < len(answer) < 250
            for text in (answer, *messages[0]["content"].split("\n")):
                item = solve(text.partition(": ")[2] or text) or solve(text)
                assert item is None or item.split == "train", text
