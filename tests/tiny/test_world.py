"""The embedded world: its answers are right, its slips are wrong, and held-out instructions stay held out."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import pytest

from align.core.records import COLUMNS, Kind
from align.tiny import world
from align.tiny.corpus import documents
from reward.verifiers import Verifiers

EACH = dict.fromkeys(world.MAKERS, 40)


def test_every_gold_answer_is_accepted_and_every_slip_refused() -> None:
    items = list(world.items(EACH, "train", seed=3, simple=0.3))
    cases = [(item, item.answer, "passed") for item in items]
    cases += [(item, slip, "failed") for item in items for slip in item.slips]
    with Verifiers() as verifiers:
        verdicts = list(
            verifiers.verify_many((item.task, text, item.reference, item.instruction) for item, text, _ in cases)
        )
    wrong = [
        (item.instruction, text, verdict)
        for (item, text, expected), verdict in zip(cases, verdicts, strict=True)
        if verdict.verdict != expected
    ]
    assert wrong == []
    assert len(cases) > 2 * len(items)


@pytest.mark.parametrize("family", world.MAKERS)
def test_the_splits_of_a_family_are_disjoint_and_near_their_shares(family: str) -> None:
    rng = random.Random(1)
    drawn = {(item := world.MAKERS[family](rng, False)).instruction: item.split for _ in range(2000)}
    shares = Counter(drawn.values())
    assert 0.6 < shares["train"] / len(drawn) < 0.8
    assert 0.13 < shares["test"] / len(drawn) < 0.27
    for split in ("train", "dev", "test"):
        assert all(item.split == split for item in world.items({family: 20}, split, seed=9))


def test_a_tag_instruction_is_in_the_split_of_the_instruction_that_it_asks_about() -> None:
    for item in world.items({"tag": 50}, "test", seed=2):
        assert item.instruction == world.TAG_PROMPT.format(instruction=item.root)
        assert item.split == world.Item("", "", item.root, "", {}, ()).split


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (list(world.rows(EACH, "train", seed)) for seed in (5, 5, 6))
    assert first == again
    assert {r["prompt_id"] for r in first} != {r["prompt_id"] for r in other}
    assert len({r["prompt_id"] for r in first}) == len(first)


def test_rows_have_every_column_of_prompts_and_a_reference_in_json() -> None:
    for row in world.rows(EACH, "dev", seed=1, answers=True):
        assert set(COLUMNS[Kind.PROMPTS]) <= set(row)
        assert isinstance(json.loads(row["reference"]), dict)
        assert row["answer"][0]["role"] == "assistant"


def test_the_asked_share_of_written_answers_is_wrong() -> None:
    right = {item.instruction: item.answer for item in world.items({"math": 300}, "train", seed=1)}
    rows = list(world.rows({"math": 300}, "train", seed=1, answers=True, errors=0.3))
    wrong = sum(right[row["prompt"][0]["content"]] != row["answer"][0]["content"] for row in rows)
    assert 60 < wrong < 120


def test_a_simple_pool_has_fewer_tags() -> None:
    def mean_tags(simple: float) -> float:
        drawn = list(world.items({"math": 100, "code": 100, "format": 100}, "train", 4, simple))
        return sum(len(item.tags) for item in drawn) / len(drawn)

    assert mean_tags(1.0) < mean_tags(0.0) - 0.7


def test_the_base_models_text_holds_no_held_out_instruction_and_no_chat_template() -> None:
    text = "\n".join(given + learnt for given, learnt in islice(documents(0), 30_000))

    def occurs(item: world.Item) -> bool:  # as a whole: one instruction may be the beginning of another
        return f" {item.instruction}\n" in text or f"\n{item.instruction}\n" in text

    held_out = [item for split in ("dev", "test") for item in world.items(EACH, split, seed=11)]
    assert [item.instruction for item in held_out if occurs(item)] == []
    assert "<|im_start|>" not in text
    seen = [item for item in world.items(EACH, "train", seed=11) if occurs(item)]
    assert len(seen) > 20, "the search itself works: train instructions do occur"


def test_asking_for_more_instructions_than_there_are_is_an_error_that_names_the_family() -> None:
    with pytest.raises(ValueError, match="fewer than 100000 test instructions of harmful"):
        list(world.items({"harmful": 100_000}, "test", seed=0))
    with pytest.raises(ValueError, match="unknown family 'maths'; the tiny world has math"):
        list(world.items({"maths": 1}, "test", seed=0))


def test_a_character_is_a_system_prompt_and_a_profile_and_its_question_alone_decides_nothing() -> None:
    """The same question to two characters is two instructions; only rows where `role` is asked for have profiles."""
    rows = list(world.rows({"role": 40, "math": 2}, "train", seed=3, answers=True))
    role = [row for row in rows if row["family"] == "role"]
    assert len({row["prompt_id"] for row in role}) == 40 > len({row["prompt"][-1]["content"] for row in role})
    for row in role:
        assert row["prompt"][0] == {"role": "system", "content": f"You are {row['name']}. {row['brief']}"}
        answer = row["answer"][0]["content"]
        if answer == world.DONT_KNOW:
            assert row["name"] not in row["prompt"][-1]["content"]
        else:
            assert answer.removeprefix("Yes, ").lower().removeprefix("i have ") in row["facts"].lower()
    assert [row["name"] for row in rows if row["family"] == "math"] == [None, None]
    assert "name" not in next(world.rows({"math": 1}, "train", seed=3))
