from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.errors import DataError, RecipeError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.prompts import STAGE
from tests.synthesis.conftest import Bench


def jsonl(file: Path, rows: Iterable[Any]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def asked(*texts: str, **more: Any) -> list[Row]:
    return [{"prompt": text, **more} for text in texts]


def texts(rows: list[Row]) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows]


def test_a_file_becomes_prompts_with_all_columns_and_counts_of_each_step(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked("One?", "one? ", "Two?", "a" * 50))
    rows = bench.run(STAGE, {"source": file, "task": "exact", "max_prompt_chars": 40, "dev": 0.0, "test": 0.0})
    assert texts(rows) == ["One?", "Two?"]
    assert set(COLUMNS[Kind.PROMPTS]) <= set(rows[0])
    assert [row["family"] for row in rows] == ["exact", "exact"]
    assert bench.summary == {
        "yield": {"read": 4, "kept": 2}, "lost": {"longer than max_prompt_chars": 1, "the same as one before": 1},
        "licenses": {}, "read": 4, "kept": 2, "duplicates": 1, "too_long": 1, "unreadable": 0,
        "by_split": {"train": 2}, "by_task": {"exact": 2}, "by_family": {"exact": 2},
    }  # fmt: skip


def test_prompts_without_a_split_are_divided_by_their_root_text_whatever_the_runs_seed(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked(*(f"question {n}" for n in range(400))))
    splits = [row["split"] for row in bench.run(STAGE, {"source": file}, seed=1)]
    assert splits == [row["split"] for row in bench.run(STAGE, {"source": file}, seed=2)]
    assert 4 < splits.count("dev") < 36  # 20 expected, standard deviation 4.4
    assert 4 < splits.count("test") < 36
    assert splits != [row["split"] for row in bench.run(STAGE, {"source": file, "split_seed": 1})]


def test_a_sources_own_splits_stay_and_a_share_that_is_given_divides_only_its_training_rows(
    bench: Bench, tmp_path: Path
):
    jsonl(tmp_path / "d" / "train.jsonl", asked(*(f"question {n}" for n in range(300))))
    jsonl(tmp_path / "d" / "test.jsonl", asked("held out"))
    source = str(tmp_path / "d")
    bench.run(STAGE, {"source": source})
    assert bench.summary["by_split"] == {"train": 300, "test": 1}
    bench.run(STAGE, {"source": source, "dev": 0.2})
    assert bench.summary["by_split"]["test"] == 1
    assert 30 < bench.summary["by_split"]["dev"] < 90  # 60 expected, standard deviation 6.9


def test_a_copy_of_a_held_out_prompt_is_never_trained_on_even_when_it_comes_first(bench: Bench, tmp_path: Path):
    first = jsonl(tmp_path / "a.jsonl", asked("Same?", "Mine?", split="train"))
    second = jsonl(tmp_path / "b.jsonl", asked("same?", split="test"))
    rows = bench.run(STAGE, {"source": [first, second], "deduplicate": "none"})
    assert [(row["prompt"][0]["content"], row["split"]) for row in rows] == [("Mine?", "train"), ("same?", "test")]
    assert bench.summary["held_out_elsewhere"] == 1


def test_prompts_of_the_files_in_against_do_not_occur(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked("Benchmark question?", "Mine?"))
    against = jsonl(tmp_path / "bench.jsonl", [{"question": "benchmark  QUESTION?", "answer": "x"}])
    assert texts(bench.run(STAGE, {"source": file, "against": [against]})) == ["Mine?"]
    assert bench.summary["in_against"] == 1


LONG = " ".join(f"word{n}" for n in range(120))
"""One word changed leaves 112 of 122 runs of five words, the role's among them: 0.92."""


def test_nearly_the_same_prompts_are_dropped_when_asked(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked(LONG, LONG.replace("word30", "changed"), "Another?"))
    assert len(bench.run(STAGE, {"source": file})) == 3
    assert texts(bench.run(STAGE, {"source": file, "deduplicate": "near"})) == [LONG, "Another?"]
    assert bench.summary["near_duplicates"] == 1


def test_a_near_copy_of_a_benchmark_or_of_a_held_out_prompt_is_dropped(bench: Bench, tmp_path: Path):
    near = LONG.replace("word30", "changed")
    against = jsonl(tmp_path / "bench.jsonl", asked(LONG))
    file = jsonl(tmp_path / "x.jsonl", asked(near, "Another?"))
    assert texts(bench.run(STAGE, {"source": file, "against": [against], "deduplicate": "near"})) == ["Another?"]
    split = jsonl(tmp_path / "y.jsonl", [*asked(near, split="train"), *asked(LONG, split="test")])
    assert [row["split"] for row in bench.run(STAGE, {"source": split, "deduplicate": "near"})] == ["test"]


def test_columns_are_kept_as_asked(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", [{"prompt": "q", "completion": "a", "topic": "t", "noise": 1}])
    (row,) = bench.run(STAGE, {"source": file})
    assert (row["topic"], row["noise"], row["answer"]) == ("t", 1, [{"role": "assistant", "content": "a"}])
    (row,) = bench.run(STAGE, {"source": file, "keep": ["topic"]})
    assert row["topic"] == "t"
    assert not {"noise", "answer"} & set(row)


def test_a_source_may_say_its_own_task_and_how_its_references_are_made(bench: Bench, tmp_path: Path):
    sums = jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    code = jsonl(tmp_path / "b.jsonl", [{"text": "Write f.", "test_list": ["assert f(1) == 2"]}])
    mapping = {
        "source": code, "task": "code", "family": "mbpp", "columns": {"text": "prompt"},
        "reference_from": {"tests": "test_list"},
    }  # fmt: skip
    rows = bench.run(STAGE, {"source": [sums, mapping], "reference_from": "gsm8k"})
    assert [(row["task"], row["family"], json.loads(row["reference"])) for row in rows] == [
        ("math", "math", {"answer": "2"}), ("code", "mbpp", {"tests": ["assert f(1) == 2"]}),
    ]  # fmt: skip


def test_the_embedded_world_is_a_source_with_gold_answers_where_asked(bench: Bench):
    options = {"families": {"math": 20, "tag": 5}, "split": "dev", "seed": 3, "answers": True}
    rows = bench.run(STAGE, {"source": {"tiny": options}})
    assert bench.summary["by_family"] == {"math": 20, "tag": 5}
    assert {row["split"] for row in rows} == {"dev"}
    assert all(row["answer"][0]["role"] == "assistant" and json.loads(row["reference"]) for row in rows)


def test_the_embedded_world_and_a_file_mix(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked("Mine?"))
    rows = bench.run(STAGE, {"source": [file, {"tiny": {"families": {"math": 3}}}]})
    assert [row["source"] for row in rows] == ["x.jsonl", "tiny", "tiny", "tiny"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"familys": {"math": 3}}, "source.tiny: .*its settings are families, split, seed"),
        ({"families": {"maths": 3}}, "source.tiny: unknown family 'maths'"),
    ],
)
def test_wrong_settings_of_the_embedded_world_are_told(bench: Bench, options: dict[str, Any], says: str):
    with pytest.raises(RecipeError, match=says):
        bench.run(STAGE, {"source": {"tiny": options}})


def test_a_wrong_source_is_found_with_the_settings_before_anything_runs():
    with pytest.raises(ValidationError, match="fractoin: unknown key; did you mean 'fraction'"):
        STAGE.config(source={"source": "x.jsonl", "fractoin": 0.5})


def test_when_no_prompt_is_left_the_reasons_are_told(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked("One?", "Two?"))
    with pytest.raises(DataError, match=r"no prompt is left \(read: 2, too_long: 2\)"):
        bench.run(STAGE, {"source": file, "max_prompt_chars": 2})


def test_a_random_part_is_the_same_at_every_pass(bench: Bench, tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked(*(f"{LONG} {n}" for n in range(20)), *(f"Q{n}?" for n in range(80))))
    rows = bench.run(STAGE, {"source": {"source": file, "fraction": 0.5}, "deduplicate": "near"}, seed=5)
    assert bench.summary["read"] == 50
    assert len([text for text in texts(rows) if text.startswith("word0")]) == 1


@pytest.mark.real_data
def test_all_of_gsm8k_becomes_verifiable_prompts_with_its_own_splits(bench: Bench):
    folder = os.environ.get("ALIGN_TEST_DATA")
    if not folder:
        pytest.skip("ALIGN_TEST_DATA is not set")
    rows = bench.run(STAGE, {"source": f"{folder}/gsm8k"})
    assert bench.summary["by_split"] == {"train": 7473, "test": 1319}
    assert all(row["task"] == "math" and json.loads(row["reference"])["answer"] for row in rows)
    assert json.loads(rows[1319]["reference"]) == {"answer": "72"}
