"""Records with several answers: samples with verdicts, LLMBar, RewardBench 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.formats import shape_of
from align.core.records import Kind, message_text
from align.core.sources import kind_of_source, open_source
from align.core.store import Table

SAMPLES = {
    "question": "What is 3 plus 4?",
    "response": ["7", "8"],
    "answer": "7",
    "verdict": [True, False],
    "report": [None, None],
}
LLMBAR = {"input": "Name a colour.", "output_1": "Seven.", "output_2": "Red.", "label": 2}
REWARDBENCH2 = {"prompt": "Name a colour.", "chosen": ["Red.", "Blue."], "rejected": ["Seven."], "subset": "Focus"}


def read(folder: Path, record: dict[str, Any], kind: Kind) -> list[dict[str, Any]]:
    file = folder / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    return list(open_source(str(file), kind, folder / "cache").rows())


def test_a_list_of_answers_becomes_completions_with_the_verdict_of_each(tmp_path: Path) -> None:
    rows = read(tmp_path, SAMPLES, Kind.COMPLETIONS)
    assert [message_text(row["completion"]) for row in rows] == ["7", "8"]
    assert [row["verdict"] for row in rows] == ["passed", "failed"]
    assert [row["sample_index"] for row in rows] == [0, 1]
    assert len({row["prompt_id"] for row in rows}) == 1
    assert message_text(rows[1]["answer"]) == "7"
    assert kind_of_source(str(tmp_path / "data.jsonl")) is Kind.COMPLETIONS


def test_as_many_verdicts_as_answers_are_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="response has 2 answers, verdict 1"):
        read(tmp_path, SAMPLES | {"verdict": [True]}, Kind.COMPLETIONS)


def test_llmbar_says_by_number_which_output_is_the_better_one(tmp_path: Path) -> None:
    (row,) = read(tmp_path, LLMBAR, Kind.PREFERENCES)
    assert (message_text(row["chosen"]), message_text(row["rejected"])) == ("Red.", "Seven.")
    assert row["prompt"] == [{"role": "user", "content": "Name a colour."}]
    (other,) = shape_of(list(LLMBAR), Kind.PREFERENCES, "x")(LLMBAR | {"label": "1"}, "x")
    assert message_text(other["chosen"]) == "Seven."
    with pytest.raises(DataError, match="label is 3; 1 or 2 was expected"):
        read(tmp_path, LLMBAR | {"label": 3}, Kind.PREFERENCES)


def test_lists_of_chosen_and_rejected_are_labelled_completions_or_all_pairs(tmp_path: Path) -> None:
    """RewardBench 2: two chosen and one rejected are three completions, or two pairs."""
    rows = read(tmp_path, REWARDBENCH2, Kind.COMPLETIONS)
    assert [(message_text(row["completion"]), row["verdict"], row["reward"]) for row in rows] == [
        ("Red.", "passed", 1.0), ("Blue.", "passed", 1.0), ("Seven.", "failed", 0.0),
    ]  # fmt: skip
    assert kind_of_source(str(tmp_path / "data.jsonl")) is Kind.COMPLETIONS
    pairs = read(tmp_path, REWARDBENCH2, Kind.PREFERENCES)
    assert [(message_text(row["chosen"]), message_text(row["rejected"])) for row in pairs] == [
        ("Red.", "Seven."), ("Blue.", "Seven."),
    ]  # fmt: skip


def test_lists_of_nothing_are_stored_and_read_again(tmp_path: Path) -> None:
    """Many rows with a list of nulls, which Arrow by itself miscounts."""
    from align.core.writer import write_rows

    rows = [
        {"tag": str(i), "count": 1, "members": [], "parent": None, "examples": [], "x": [None] * 8} for i in range(60)
    ]
    write_rows(tmp_path / "rows", rows, Kind.ONTOLOGY)
    found = list(Table.open(tmp_path / "rows").rows())
    assert len(found) == 60 and found[-1]["x"] == []
