from __future__ import annotations

import json
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.records import Kind, Row
from data_synthesis.distil_tags import STAGE
from data_synthesis.tag import read_tags
from tests.synthesis.conftest import Bench, a_prompt

EXPLAINED = json.dumps(
    [{"tag": "Poem", "explanation": "It asks for verse."}, {"tag": "winter", "explanation": "Snow."}]
)


def tagged(number: int, raw: str, **more: Any) -> Row:
    return a_prompt(number, tags=read_tags(raw), raw_tags=raw, **more)


def completions(rows: list[Row]) -> list[Any]:
    return [json.loads(row["completion"][0]["content"]) for row in rows]


def test_a_tagged_instruction_becomes_the_taggers_question_and_its_strict_json(bench: Bench):
    (row,) = bench.run(STAGE, {"template": "Tag: {instruction}"}, prompts=[tagged(1, f"```json\n{EXPLAINED}\n```")])
    assert row["prompt"] == [{"role": "user", "content": "Tag: question 1"}]
    assert row["completion"] == [{"role": "assistant", "content": EXPLAINED}]
    assert read_tags(row["completion"][0]["content"]) == ["Poem", "winter"] == row["tags"]
    assert (row["split"], row["parent_id"]) == ("train", "p1") and row["prompt_id"] != "p1"
    assert bench.summary == {"yield": {"turns": 1, "kept": 1}, "lost": {}, "with_explanations": 1}


def test_without_explanations_it_is_a_list_of_texts(bench: Bench):
    prompts = [tagged(1, EXPLAINED), tagged(2, '["诗", "poem"]'), a_prompt(3, tags=["a"], raw_tags=None)]
    assert completions(bench.run(STAGE, {}, prompts=prompts))[1:] == [["诗", "poem"], ["a"]]
    assert bench.summary["with_explanations"] == 1
    assert completions(bench.run(STAGE, {"explanations": False}, prompts=prompts))[0] == ["Poem", "winter"]


def test_with_an_ontology_the_atomic_tags_are_learned_and_dropped_ones_are_not(bench: Bench):
    members = {"verse": ["Poem", "poetry"], "season": ["spring"]}
    rows = [{"tag": tag, "count": 1, "members": raw, "parent": None, "examples": []} for tag, raw in members.items()]
    prompts = [tagged(1, EXPLAINED), tagged(2, '["winter"]')]
    (row,) = bench.run(STAGE, {}, prompts=prompts, ontology=bench.table(rows, Kind.ONTOLOGY))
    assert completions([row]) == [[{"tag": "verse", "explanation": "It asks for verse."}]]
    assert bench.summary["lost"] == {"no tag of the ontology": 1}


def test_each_user_turn_is_a_demonstration_where_each_was_tagged(bench: Bench):
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "اكتب قصيدة"},
        {"role": "assistant", "content": "..."}, {"role": "user", "content": "Now shorter."},
    ]  # fmt: skip
    turn_tags = [[{"tag": "poem", "explanation": "Verse."}], [{"tag": "edit", "explanation": ""}]]
    prompt = a_prompt(1, prompt=talk, tags=["poem", "edit"], raw_tags="[]", turn_tags=turn_tags)
    rows = bench.run(STAGE, {"template": "{earlier}|{instruction}"}, prompts=[prompt])
    assert [row["prompt"][0]["content"].split("|")[1] for row in rows] == ["اكتب قصيدة", "Now shorter."]
    assert "system\nBe brief." in rows[0]["prompt"][0]["content"] and "..." in rows[1]["prompt"][0]["content"]
    assert completions(rows) == [[{"tag": "poem", "explanation": "Verse."}], ["edit"]]
    (row,) = bench.run(STAGE, {"template": "{instruction}"}, prompts=[{**prompt, "turn_tags": turn_tags[1:]}])
    assert row["prompt"][0]["content"] == "Now shorter."


def test_what_is_left_out_is_counted_and_the_counts_add_up(bench: Bench):
    prompts = [
        tagged(1, '["a"]'), a_prompt(2, tags=[], raw_tags="hm"), tagged(3, '["a"]', split="test"),
        tagged(4, '["b"]', prompt=a_prompt(1)["prompt"]),
    ]  # fmt: skip
    assert len(bench.run(STAGE, {}, prompts=prompts)) == 1
    assert bench.summary["yield"] == {"turns": 4, "kept": 1}
    assert bench.summary["lost"] == {"no tags": 1, "split test": 1, "the same instruction again": 1}
    with pytest.raises(DataError, match=r"no turn of table\d+ became a demonstration \(no tags: 1\)"):
        bench.run(STAGE, {}, prompts=prompts[1:2])
