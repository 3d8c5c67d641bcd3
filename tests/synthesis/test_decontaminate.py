from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.errors import DataError, RecipeError
from align.core.records import Kind, Row
from align.core.stage import Stage
from align.core.store import Table
from align.core.text import words
from align.pipeline import run
from align.recipe import load_recipe, load_stage
from data_synthesis.decontaminate import STAGE
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.test_prompts import jsonl

ITEM = "A farmer has seven red hens and each of them lays two brown eggs a day so how many eggs are there in a week?"
"""25 words."""
OTHER = (
    "Write a short poem about the wind that blows over the hills at night and tell nobody who has written it for you."
)


def of(kind: Kind) -> Stage:
    """The stage as a recipe makes it of what comes in."""
    return replace(STAGE, gives=kind, needs={**STAGE.needs, "data": replace(STAGE.needs["data"], kind=kind)})


def dropped(bench: Bench) -> list[Row]:
    return [json.loads(line) for line in (bench.out / "dropped.jsonl").read_text().splitlines()]


def test_a_row_that_repeats_a_test_item_is_dropped_and_told_with_item_and_run(bench: Bench, tmp_path: Path):
    """Of the item's 25 words 2 are changed; 23 are common. The first run of 8 begins with "has", the third word."""
    near = ITEM.replace("farmer", "woman").replace("week", "year")
    against = jsonl(tmp_path / "bench.jsonl", [{"id": "q7", "question": ITEM}, {"id": "q8", "question": "Why?"}])
    prompts = [a_prompt(1, OTHER), a_prompt(2, near), a_prompt(3, ITEM, split="test")]
    rows = bench.run(STAGE, {"against": [against]}, data=prompts)
    assert [row["prompt_id"] for row in rows] == ["p1", "p3"]
    (line,) = dropped(bench)
    assert (line["prompt_id"], line["row"], line["set"], line["item"]) == ("p2", 1, "bench.jsonl", "q7")
    assert (line["common"], line["row_words"], line["item_words"], line["share"]) == (23, 25, 25, 0.92)
    assert line["run"] == "has seven red hens and each of them" and line["text"] == near
    summary = bench.summary
    assert (summary["yield"], summary["lost"]) == ({"read": 3, "kept": 2}, {"repeats bench.jsonl": 1})
    assert summary["looked_at"] == 2
    assert summary["cannot_be_flagged"] == "1 of 2 test sequences have fewer than 13 words"
    found = summary["sets"]["bench.jsonl"]
    assert found.pop("examples")[0]["item"] == "q7"
    assert found == {"items": 2, "too_short_to_be_flagged": 1, "items_repeated": 1, "rows_dropped": 1}


def test_every_test_set_has_its_own_count_and_a_row_is_lost_once(bench: Bench, tmp_path: Path):
    one = jsonl(tmp_path / "a" / "test.jsonl", [{"question": ITEM}])
    two = jsonl(tmp_path / "b" / "test.jsonl", [{"question": f"{ITEM} Think well."}, {"question": OTHER}])
    bench.run(STAGE, {"against": [one, two]}, data=[a_prompt(1, ITEM), a_prompt(2, OTHER), a_prompt(3)])
    assert bench.summary["lost"] == {f"repeats {one}": 1, f"repeats {two}": 1}
    assert [found["rows_dropped"] for found in bench.summary["sets"].values()] == [1, 2]
    assert dropped(bench)[0]["others"] == [f"{two} row 0"]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (Kind.PROMPTS, {"answer": assistant(ITEM)}),
        (Kind.DEMONSTRATIONS, {"completion": assistant(ITEM)}),
        (Kind.PREFERENCES, {"chosen": assistant("no"), "rejected": assistant(ITEM), "margin": 1.0}),
        (Kind.COMPLETIONS, {
            "sample_index": 0, "completion": assistant(ITEM), "reward": 1.0, "verdict": "passed", "detail": "",
            "generator": "g",
        }),
    ],
)  # fmt: skip
def test_rows_of_every_kind_stay_of_their_kind_and_both_sides_count(
    bench: Bench, tmp_path: Path, kind: Kind, row: dict[str, Any]
):
    against = jsonl(tmp_path / "bench.jsonl", [{"question": ITEM}])
    clean = {key: assistant("fine") if isinstance(value, list) else value for key, value in row.items()}
    data = bench.table([{**a_prompt(1), **row}, {**a_prompt(2), **clean}], kind)
    rows = bench.run(of(kind), {"against": [against]}, data=data)
    assert rows == list(data.rows())[1:]
    assert len(bench.run(of(kind), {"against": [against], "text": "prompt"}, data=data)) == 2
    assert len(bench.run(of(kind), {"against": [against], "text": "completion"}, data=data)) == 1


def test_the_answers_of_test_items_are_compared_when_asked(bench: Bench, tmp_path: Path):
    against = jsonl(tmp_path / "bench.jsonl", [{"question": "How many eggs?", "answer": f"{ITEM} #### 98"}])
    data = [a_prompt(1, ITEM), a_prompt(2)]
    for which, left in (("prompt", 2), ("answer", 1), ("both", 1)):
        assert len(bench.run(STAGE, {"against": [against], "test_text": which}, data=data)) == left


def test_system_and_earlier_turns_and_chinese_count(bench: Bench, tmp_path: Path):
    chinese = "农夫有七只红色的母鸡每只每天下两个蛋一周共有多少个蛋"
    against = jsonl(tmp_path / "bench.jsonl", [{"question": ITEM}, {"question": chinese}])
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": ITEM},
        {"role": "assistant", "content": "98"}, {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    rows = bench.run(
        STAGE, {"against": [against]}, data=[a_prompt(1, prompt=talk), a_prompt(2, f"问：{chinese}？"), a_prompt(3)]
    )
    assert [row["prompt_id"] for row in rows] == ["p3"]


def test_test_sets_of_another_step_count_by_their_source(bench: Bench):
    tests = bench.table([a_prompt(9, ITEM, source="held.jsonl", split="test")], Kind.PROMPTS)
    assert bench.run(STAGE, {}, data=[a_prompt(1, ITEM)], tests=tests) == []
    assert bench.summary["lost"] == {"repeats held.jsonl": 1}


def test_no_test_set_and_settings_that_can_not_work_are_refused(bench: Bench, tmp_path: Path):
    with pytest.raises(DataError, match="nothing to compare with; name the test sets"):
        bench.run(STAGE, {}, data=[a_prompt(1)])
    against = jsonl(tmp_path / "bench.jsonl", [{"question": ITEM}])
    with pytest.raises(ValidationError, match="run=14 is longer than least=13"):
        bench.run(STAGE, {"against": [against], "run": 14}, data=[a_prompt(1)])
    with pytest.raises(ValidationError, match="colums: unknown key"):
        STAGE.config(against=[{"source": against, "colums": {}}])


def test_on_the_command_line_the_kind_of_the_data_is_found(tmp_path: Path):
    against = jsonl(tmp_path / "bench.jsonl", [{"question": ITEM}])
    for name, row, kind in (
        ("p", {"prompt": OTHER}, Kind.PROMPTS),
        ("d", {"question": OTHER, "answer": "yes"}, Kind.DEMONSTRATIONS),
        ("c", {"prompt": OTHER, "chosen": "a", "rejected": "b"}, Kind.PREFERENCES),
    ):
        data = jsonl(tmp_path / f"{name}.jsonl", [row])
        for out in (tmp_path / name, tmp_path / f"{name} again"):
            run(load_stage("decontaminate", [f"data={data}", f"against=[{against}]", f"out={out}"]))
            assert json.loads((out / "manifest.json").read_text())["gives"] == kind.value
            assert len(Table.open(out)) == 1
            data = str(out)  # and of a step's folder


def test_in_a_recipe_the_kind_goes_on_to_the_next_step(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("""
name: r
steps:
  prompts: {stage: prompts, with: {source: {tiny: {families: {math: 3}, answers: true}}}}
  demonstrations: {stage: demonstrate, in: {completions: prompts}, with: {answers: only}}
  clean: {stage: decontaminate, in: {data: demonstrations, tests: prompts}}
  model: {stage: sft, in: {model: tiny, demonstrations: clean}}
  wrong: {stage: pair, in: {completions: clean}}
  mixed: {stage: decontaminate, in: {data: [prompts, demonstrations], tests: prompts}}
""")
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "r.yaml")
    assert [problem.split(" (line")[0].split(": ", 2)[1:] for problem in refused.value.problems] == [
        ["steps.wrong.in.completions", "'clean' gives DEMONSTRATIONS, COMPLETIONS was expected"],
        ["steps.mixed.in.data[1]", "'demonstrations' gives DEMONSTRATIONS, PROMPTS was expected"],
    ]


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_planted_test_items_are_found_in_gsm8k_and_clean_rows_are_not(bench: Bench):
    """200 items planted as they are, 200 with one word in ten changed, in GSM8K's own training questions.

    A run of 8 words survives in a question of n words with n/10 changed ones unless the changes are spread evenly:
    at least nine in ten are asked for. Of the training questions themselves at most 1 in 200 may go: the ones that do
    are variations of test questions (docs/decontamination.md shows some).
    """
    folder = Path(os.environ["ALIGN_TEST_DATA"]) / "gsm8k"
    items = [json.loads(line)["question"] for line in (folder / "test.jsonl").read_text().splitlines()]
    clean = [json.loads(line)["question"] for line in (folder / "train.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    planted = [item for item in draw.sample(items, 400) if len(words(item)) >= 13]
    texts = [*planted[:200], *(edited(item, draw) for item in planted[200:]), *clean]
    rows = bench.run(
        STAGE, {"against": [str(folder / "test.jsonl")]}, data=[a_prompt(n, t) for n, t in enumerate(texts)]
    )
    left = {int(row["prompt_id"][1:]) for row in rows}
    assert not left & set(range(200))
    assert len(left & set(range(200, len(planted)))) <= 0.1 * (len(planted) - 200)
    assert len([n for n in left if n >= len(planted)]) >= 0.995 * len(clean)


def edited(text: str, draw: random.Random) -> str:
    """One word in ten made another one."""
    parts = text.split()
    for place in draw.sample(range(len(parts)), max(1, len(parts) // 10)):
        parts[place] = "changed"
    return " ".join(parts)
