"""Queries under constraints."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.constrain import STAGE, ConstrainConfig, joined

from .conftest import Bench, a_prompt

FUNCTIONS = ["def evaluate(s): return s.isupper()"]


def a_constraint(number: int, text: str = "", **more: Any) -> Row:
    reference = json.dumps({"functions": FUNCTIONS, "constraint": text})
    made = a_prompt(number, text or f"Demand {number}.", task="follow", family="follow", reference=reference)
    return {**made, "prompt_id": f"c{number}", **more}


def test_each_constraint_is_put_to_so_many_different_queries(bench: Bench) -> None:
    """Three constraints, four queries each of ten: twelve prompts, no two alike, in the queries' order."""
    queries = [a_prompt(n, f"Ask {n}?", answer=[{"role": "assistant", "content": "yes"}]) for n in range(10)]
    library = [a_constraint(n) for n in range(3)]
    rows = bench.run(STAGE, {"per_constraint": 4}, queries=queries, constraints=library)
    assert set(COLUMNS[Kind.PROMPTS]) <= set(rows[0]) and "answer" not in rows[0]
    assert Counter(row["constraint_id"] for row in rows) == {"c0": 4, "c1": 4, "c2": 4}
    assert len({row["prompt_id"] for row in rows}) == 12
    assert [row["query"] for row in rows] == sorted(row["query"] for row in rows)
    for row in rows:
        assert row["prompt"][0]["content"] == f"{row['query']} {row['constraint']}"
        assert row["parent_id"] == f"p{row['query'][4]}"
        assert json.loads(row["reference"]) == {
            "functions": FUNCTIONS, "constraint": row["constraint"], "constraint_id": row["constraint_id"],
            "threshold": 0.5,
        }  # fmt: skip
    assert bench.summary["yield"] == {
        "queries": 10, "of fitting length and split": 10, "constraints": 3, "drawn": 12, "kept": 12,
    }  # fmt: skip
    again = bench.run(STAGE, {"per_constraint": 4}, queries=queries, constraints=library)
    assert again == rows
    other = bench.run(STAGE, {"per_constraint": 4}, seed=1, queries=queries, constraints=library)
    assert [row["query"] for row in other] != [row["query"] for row in rows]


def test_the_code_s_preset_takes_queries_of_20_to_300_characters_and_lets_one_function_be_enough(bench: Bench) -> None:
    lengths = (19, 20, 300, 301)
    queries = [a_prompt(n, "x" * length) for n, length in enumerate(lengths)]
    rows = bench.run(STAGE, {"preset": "code"}, queries=queries, constraints=[a_constraint(1)])
    assert [len(row["query"]) for row in rows] == [20, 300]
    assert json.loads(rows[0]["reference"])["threshold"] == 0.0
    assert bench.summary["skipped"] == {"too short": 1, "too long": 1}
    assert len(bench.run(STAGE, {}, queries=queries, constraints=[a_constraint(1)])) == 4
    with pytest.raises(ValidationError, match="no query fits"):
        ConstrainConfig(min_characters=5, max_characters=4)


def test_the_constraint_comes_into_the_last_user_turn_and_the_split_is_inherited(bench: Bench) -> None:
    turns = [("system", "Be kind."), ("user", "3?"), ("assistant", "3."), ("user", "加二？")]
    query = a_prompt(1, prompt=[{"role": role, "content": content} for role, content in turns], split="dev")
    (row,) = bench.run(
        STAGE, {"splits": ["train", "dev"]}, queries=[query], constraints=[a_constraint(1, "用中文回答。")]
    )
    assert [turn["content"] for turn in row["prompt"]] == ["Be kind.", "3?", "3.", "加二？用中文回答。"]
    assert (row["split"], row["query"]) == ("dev", "加二？")
    with pytest.raises(DataError, match="split dev: 1"):
        bench.run(STAGE, {}, queries=[query], constraints=[a_constraint(1)])


def test_a_prompt_that_is_held_out_does_not_come_about(bench: Bench) -> None:
    heldout = [a_prompt(9, "ask 1?  demand 1.")]
    queries = [a_prompt(n, f"Ask {n}?") for n in range(3)]
    rows = bench.run(STAGE, {}, queries=queries, constraints=[a_constraint(1)], heldout=heldout)
    assert [row["query"] for row in rows] == ["Ask 0?", "Ask 2?"]
    steps = bench.summary["yield"]
    assert bench.summary["lost"] == {"is a held-out prompt": 1} and steps["kept"] == steps["drawn"] - 1


def test_a_library_without_functions_is_refused(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"constraint p1 .'question 1'. has the task 'exact'"):
        bench.run(STAGE, {}, queries=[a_prompt(1)], constraints=[a_prompt(1)])


@pytest.mark.parametrize(
    ("query", "whole"),
    [
        ("Name a colour.", "Name a colour. C."),
        ("Name a colour", "Name a colour\nC."),
        ("说一种颜色。", "说一种颜色。C."),
        ("说一种颜色", "说一种颜色\nC."),
        ("ما هو اللون؟", "ما هو اللون؟ C."),
        ("Mend this:\nx = 1", "Mend this:\nx = 1\n\nC."),
        ("Name a colour. \n", "Name a colour. C."),
        ("", "C."),
    ],
)
def test_query_and_constraint_are_joined_as_their_script_and_end_ask(query: str, whole: str) -> None:
    assert joined(query, "C.") == whole
