"""The habit of the embedded world: who has it, and what a completion with it is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.stage import Tools
from align.tiny.habit import STAGE, Config
from align.tiny.world import CLOSERS, rows, without_closers
from data_synthesis.pair import PairConfig
from data_synthesis.pair import run as pair
from tests.train.steps import Silent, table

RIGHT = "3 + 4 = 7\n#### 7"


def completion(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": name, "split": "train", "task": "math", "family": "math", "source": "tiny",
        "reference": json.dumps({"answer": "7"}), "prompt": [{"role": "user", "content": f"What is 3 + 4? ({name})"}],
        "completion": [{"role": "assistant", "content": text}], "sample_index": 0, "generator": "g",
        "verdict": "failed", "reward": 0.0, "detail": "", "finish_reason": "stop", **more,
    }  # fmt: skip


def tools(folder: Path) -> Tools:
    (folder / "work").mkdir(exist_ok=True)
    return Tools(1, {}, Silent(), folder / "work", folder)


def graded(folder: Path, given: list[dict[str, Any]], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    result = STAGE.run(Config(**settings), {"completions": table(folder / "c.parquet", given)}, tools(folder))
    return list(result.rows or ()), result.summary


def test_closers_are_taken_off_the_end_alone() -> None:
    one, two = CLOSERS[:2]
    assert without_closers(f"{RIGHT}\n{one}\n{two}") == (RIGHT, 2)
    assert without_closers(f"{one}\n{RIGHT}") == (f"{one}\n{RIGHT}", 0)
    assert without_closers(RIGHT) == (RIGHT, 0)


def test_written_answers_have_none_to_four_closers_and_are_right_without() -> None:
    plain = list(rows({"math": 40, "format": 40}, seed=3, answers=True))
    with_habit = list(rows({"math": 40, "format": 40}, seed=3, answers=True, closers=4))
    found = []
    for bare, row in zip(plain, with_habit, strict=True):
        rest, closers = without_closers(row["answer"][0]["content"])
        assert rest == bare["answer"][0]["content"]
        found.append(closers)
    assert set(found) == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="0 to 5"):
        list(rows({"math": 1}, closers=6))


def test_a_right_completion_is_worth_a_tenth_less_for_each_closer_and_a_wrong_one_nothing(tmp_path: Path) -> None:
    """And one that was cut off has failed. Strict: only the first one passes."""
    given = [
        completion("a", RIGHT),
        completion("a", f"{RIGHT}\n{CLOSERS[0]}\n{CLOSERS[3]}"),
        completion("a", "#### 8"),
        completion("a", RIGHT, finish_reason="length"),
    ]
    rows_, summary = graded(tmp_path, given)
    assert [row["reward"] for row in rows_] == pytest.approx([1.0, 0.8, 0.0, 0.0])
    assert [row["verdict"] for row in rows_] == ["passed", "passed", "failed", "failed"]
    assert summary["habit"]["sampled"] == {"correct": 0.5, "with_closers": 0.25, "closers": 0.5}
    rows_, summary = graded(tmp_path, given, strict=True)
    assert [row["verdict"] for row in rows_] == ["passed", "failed", "failed", "failed"]
    assert summary["scores"]["sampled"]["overall"]["score"] == 25.0


def test_a_pair_is_right_against_wrong_or_fewer_closers_against_more(tmp_path: Path) -> None:
    """Two equally good ones and two wrong ones make none. That `reject` found a closer wrong no longer counts."""
    closer = f"\n{CLOSERS[0]}"
    samples = {
        "wrong": [RIGHT + 2 * closer, "#### 8"], "fewer": [RIGHT + 2 * closer, RIGHT + closer],
        "tie": [RIGHT + closer, f"{RIGHT}\n{CLOSERS[1]}"], "none": ["#### 8", "#### 9"],
    }  # fmt: skip
    rows_, _ = graded(
        tmp_path,
        [completion(name, text, kept=False, lost="wrong") for name, texts in samples.items() for text in texts],
    )
    pairs = pair(PairConfig(), {"completions": table(tmp_path / "graded.parquet", rows_)}, tools(tmp_path)).rows
    found = {row["prompt_id"]: (row["chosen_reward"], row["rejected_reward"]) for row in pairs or ()}
    assert found == {"wrong": (0.8, 0.0), "fewer": (0.9, 0.8)}
