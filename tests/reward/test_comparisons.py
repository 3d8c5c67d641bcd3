"""Which completions are compared: distinct ones, better against worse, of prompts that may be trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from reward.comparisons import Group, both_sides, groups_on_disk, read_groups
from tests.train.steps import table
from tests.train.tiny import make_tokenizer


def row(name: str, text: str, verdict: str | None, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": name,
        "prompt": [{"role": "user", "content": f"question {name}"}],
        "split": "train",
        "family": "math",
        "completion": [{"role": "assistant", "content": text}],
        "verdict": verdict,
        "reward": None if verdict is None else float(verdict == "passed"),
        "finish_reason": "stop",
        **more,
    }


def read(tmp_path: Path, rows: list[dict[str, Any]], share: float = 0.5) -> tuple[list[Group], Counter[str]]:
    counts: Counter[str] = Counter()
    groups = list(read_groups(table(tmp_path / "rows.parquet", rows), tmp_path, share, False, counts))
    return groups, counts


def test_equal_completions_are_one_and_are_counted(tmp_path: Path) -> None:
    rows = [
        row("a", "7", "passed"),
        row("a", "8", "failed"),
        row("a", " 7\n", "passed"),
        row("d", "1", "passed", split="dev"),
    ]
    groups, _ = read(tmp_path, rows)
    assert groups[0].values == [1.0, 0.0]
    assert groups[0].counts == [2, 1]
    assert [group.held_out for group in groups] == [False, True]


def test_errors_truncated_and_empty_completions_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        row("a", "7", "passed"),
        row("a", "8", "error"),
        row("a", "9 and", "failed", finish_reason="length"),
        row("a", "", "failed"),
    ]
    groups, counts = read(tmp_path, rows)
    assert groups[0].values == [1.0]
    assert counts == {"completions without a verdict": 1, "truncated completions": 1, "empty completions": 1}


def test_test_prompts_are_never_touched(tmp_path: Path) -> None:
    groups, counts = read(tmp_path, [row("a", "7", "passed", split="test"), row("b", "7", "passed")])
    assert len(groups) == 1
    assert counts["of split test"] == 1


def test_without_a_dev_split_a_share_of_the_prompts_is_held_out_by_their_ids(tmp_path: Path) -> None:
    rows = [row(f"p{i}", "7", "passed") for i in range(400)]
    first = [group.held_out for group in read(tmp_path, rows, 0.25)[0]]
    assert 70 <= sum(first) <= 130
    assert [group.held_out for group in read(tmp_path, list(reversed(rows)), 0.25)[0]] == list(reversed(first))


def test_a_gold_answer_stands_in_only_where_no_completion_is_right(tmp_path: Path) -> None:
    rows = [
        row("a", "8", "failed", answer="7"),
        row("b", "7", "passed", answer="never"),
        row("d", "8", "failed", split="dev", answer="7"),
    ]
    filled: Counter[str] = Counter()
    given = table(tmp_path / "rows.parquet", rows)
    groups = list(read_groups(given, tmp_path, 0.5, True, Counter(), filled=filled))
    assert [group.values for group in groups] == [[0.0, 1.0], [1.0], [0.0]]
    assert groups[0].completions[1] == [{"role": "assistant", "content": "7"}]
    assert filled == {"answer": 1}


def test_a_wrong_answer_stands_in_only_where_no_completion_is_wrong(tmp_path: Path) -> None:
    rows = [
        row("a", "7", "passed", wrong_answer="8"),
        row("b", "8", "failed", wrong_answer="9"),
        row("c", "7", "passed", wrong_answer=None),
    ]
    filled: Counter[str] = Counter()
    given = table(tmp_path / "rows.parquet", [*rows, row("d", "1", "passed", split="dev", wrong_answer="2")])
    groups = list(read_groups(given, tmp_path, 0.5, False, Counter(), wrong_answers=True, filled=filled))
    assert [group.values for group in groups] == [[1.0, 0.0], [0.0], [1.0], [1.0]]
    assert groups[0].completions[1] == [{"role": "assistant", "content": "8"}]
    assert filled == {"wrong_answer": 1}


def test_rewards_without_verdicts_are_graded_and_not_absolute(tmp_path: Path) -> None:
    rows = [row("a", text, None, reward=reward) for text, reward in (("x", 0.5), ("y", 2.0))]
    groups, _ = read(tmp_path, rows)
    assert groups[0].values == [0.5, 2.0]
    assert not groups[0].absolute


def test_preferences_are_groups_of_two(tmp_path: Path) -> None:
    rows = [
        {
            "prompt_id": "a",
            "prompt": [{"role": "user", "content": "q"}],
            "split": "train",
            "chosen": [{"role": "assistant", "content": f"good {i}"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "margin": 1.0,
        }
        for i in range(2)
    ]
    groups, _ = read(tmp_path, rows)
    assert [group.values for group in groups] == [[1.0, 0.0]] * 2
    assert not groups[0].absolute


def values(*numbers: float) -> Group:
    return Group([], "math", False, True, [], list(numbers), [1] * len(numbers))


def test_both_sides_take_the_best_and_the_worst() -> None:
    assert both_sides(values(1, 1, 0, 1, 0), 2) == [0, 1, 2, 4]
    assert both_sides(values(1, 1, 1), 2) == []
    assert both_sides(values(0.1, 0.9, 0.5, 0.7), 1) == [1, 0]
    assert both_sides(values(0.1, 0.9, 0.5, 0.7), 3) == [1, 3, 2, 0]


def test_groups_go_to_disk_as_ids_cut_to_both_sides_and_held_out_ones_whole(tmp_path: Path) -> None:
    rows = [row("a", text, verdict) for text, verdict in (("7", "passed"), ("seven", "passed"), ("8", "failed"))]
    rows += [row("b", "7", "passed")]
    rows += [row("d", text, "failed", split="dev") for text in ("1", "2")]
    counts: Counter[str] = Counter()
    groups = read_groups(table(tmp_path / "rows.parquet", rows), tmp_path, 0.1, False, counts)
    train, held_out = groups_on_disk(tmp_path / "groups", groups, make_tokenizer(), 1, 64, counts)
    assert [row["values"] for row in train] == [[1.0, 0.0]]
    assert [row["values"] for row in held_out] == [[0.0, 0.0]]
    assert counts["prompts with one side only"] == 1
    tokenizer = make_tokenizer()
    ids, labels = train[0]["ids"][0], train[0]["labels"][0]
    assert tokenizer.decode(ids).endswith("assistant\n7<|im_end|>")
    assert tokenizer.decode([label for label in labels if label != -100]) == "7<|im_end|>"
    assert train[0]["length"] == max(len(one) for one in train[0]["ids"])


def test_completions_that_are_too_long_are_left_out_whole_and_counted(tmp_path: Path) -> None:
    """Of prompt a a right one is too long and another is not; prompt b has only its wrong one left."""
    long = "7 " * 99
    rows = [row("a", text, verdict) for text, verdict in ((long, "passed"), ("7", "passed"), ("8", "failed"))]
    rows += [row("b", long, "passed"), row("b", "8", "failed"), row("d", "7", "passed", split="dev")]
    counts: Counter[str] = Counter()
    groups = read_groups(table(tmp_path / "rows.parquet", rows), tmp_path, 0.1, False, counts)
    train, _ = groups_on_disk(tmp_path / "groups", groups, make_tokenizer(), 3, 64, counts)
    assert [group["values"] for group in train] == [[1.0, 0.0]]
    assert counts["completions longer than max_length"] == 2
    assert counts["prompts left with one side only"] == 1


def test_nothing_to_compare_is_an_error_that_says_what_was_left_out(tmp_path: Path) -> None:
    rows = [row("a", "7", "passed"), row("d", "7", "passed", split="dev")]
    counts: Counter[str] = Counter()
    groups = read_groups(table(tmp_path / "rows.parquet", rows), tmp_path, 0.1, False, counts)
    with pytest.raises(DataError, match="1 prompts with one side only"):
        groups_on_disk(tmp_path / "groups", groups, make_tokenizer(), 3, 64, counts)
    rows = [row("a", "7", "passed"), row("a", "8", "failed"), row("d", "7 " * 99, "passed", split="dev")]
    groups = read_groups(table(tmp_path / "rows.parquet", rows), tmp_path, 0.1, False, Counter())
    with pytest.raises(DataError, match=r"none of the 1 prompts is held out.*1 completions longer than max_length"):
        groups_on_disk(tmp_path / "groups", groups, make_tokenizer(), 3, 64, Counter())


def test_of_a_ranking_the_rewards_count_since_only_its_best_has_passed(tmp_path: Path) -> None:
    rows = [
        {**row("a", text, verdict, reward=reward), "rank": rank}
        for text, verdict, reward, rank in (("x", "passed", 1.0, 1), ("y", "failed", 0.5, 2), ("z", "failed", 0.0, 3))
    ]
    groups, _ = read(tmp_path, rows)
    assert groups[0].values == [1.0, 0.5, 0.0]
    assert not groups[0].absolute
