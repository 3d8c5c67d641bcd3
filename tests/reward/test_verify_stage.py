"""The stage `verify`: every row of a file comes back in order with its verdict, whatever is wrong with some."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core.errors import AlignError
from align.core.records import COLUMNS, Kind, Row
from align.core.stage import Tools
from align.core.store import Table
from align.core.writer import DatasetWriter
from align.progress import Silent
from reward import formulas
from reward.verify import STAGE, VerifyConfig

GOOD: dict[str, Any] = {
    "id": 1,
    "task": "math",
    "prompt": "How many?",
    "completion": "#### 72",
    "reference": {"answer": "72"},
}


def _run(data: Path, folder: Path, **settings: Any) -> tuple[list[Row], dict[str, Any]]:
    """The rows as a reader of the result gets them, and the summary."""
    work = folder / "work"
    work.mkdir()
    tools = Tools(seed=0, engines={}, progress=Silent(), work=work, out=folder)
    result = STAGE.run(VerifyConfig(data=str(data), **settings), {}, tools)
    assert result.rows is not None
    with DatasetWriter(folder / "out", Kind.COMPLETIONS, lenient=result.lenient) as writer:
        for row in result.rows:
            writer.write(row)
    return list(Table.open(folder / "out").rows()), result.summary


def _write(folder: Path, lines: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def test_rows_of_all_shapes_get_their_verdicts_in_order(tmp_path: Path) -> None:
    message = [{"role": "assistant", "content": "#### 72"}]
    rows, summary = _run(
        _write(
            tmp_path,
            [
                GOOD,
                {**GOOD, "id": 2, "completion": "#### 71"},
                {**GOOD, "id": 3, "prompt": [{"role": "user", "content": "How many?"}], "completion": message},
                {**GOOD, "id": 4, "reference": '{"answer": "72"}'},
                {
                    **GOOD,
                    "id": 5,
                    "task": "code",
                    "completion": "def f():\n    return 2",
                    "reference": {"tests": ["assert f() == 2"]},
                },
                {
                    **GOOD,
                    "id": 6,
                    "task": "code",
                    "completion": "while True: pass",
                    "reference": {"tests": ["assert f()"]},
                },
                {
                    **GOOD,
                    "id": 7,
                    "task": "constraints",
                    "reference": {"constraints": [{"id": "punctuation:no_comma"}]},
                },
            ],
        ),
        tmp_path,
        cpu_s=1.0,
    )
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["verdict"] for row in rows] == ["passed", "failed", "passed", "passed", "passed", "error", "passed"]
    assert [row["reward"] for row in rows] == [1.0, 0.0, 1.0, 1.0, 1.0, None, 1.0]
    assert rows[5]["detail"].startswith("timeout")
    assert "71" in rows[1]["detail"] and "72" in rows[1]["detail"]
    assert summary["verdicts"]["math"] == {"passed": 3, "failed": 1}
    assert summary["sandbox"]["level"] >= 2
    assert set(COLUMNS[Kind.COMPLETIONS]) <= set(rows[0])


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("this is no JSON", "rows.jsonl, line 2: is no JSON"),
        ("[1, 2]", "object was expected"),
        ({"id": 2}, "missing"),
        ({**GOOD, "completion": None}, "completion: missing"),
        ({key: value for key, value in GOOD.items() if key != "completion"}, "completion: missing"),
        ({key: value for key, value in GOOD.items() if key != "reference"}, "reference: missing"),
        ({key: value for key, value in GOOD.items() if key != "task"}, "task: missing"),
        ({**GOOD, "task": 5}, "task"),
        ({**GOOD, "task": "maths"}, "did you mean 'math'"),
        ({**GOOD, "completion": 17}, "completion"),
        ({**GOOD, "completion": ["#### 72"]}, "completion"),
        ({**GOOD, "completion": [{"role": "assistant"}]}, "completion"),
        ({**GOOD, "completion": [{"role": "user", "content": "#### 72"}]}, "no message of the assistant"),
        ({**GOOD, "completion": []}, "completion"),
        ({**GOOD, "reference": "{broken"}, "reference"),
        ({**GOOD, "reference": 8}, "reference"),
        ({**GOOD, "reference": {"result": "72"}}, "reference.answer"),
    ],
)
def test_a_bad_row_is_an_error_and_stops_no_other(bad: Any, named: str, tmp_path: Path) -> None:
    rows, _ = _run(_write(tmp_path, [GOOD, bad, {**GOOD, "id": "three"}]), tmp_path)
    assert [row["verdict"] for row in rows] == ["passed", "error", "passed"]
    assert rows[1]["reward"] is None
    assert named in rows[1]["detail"]


def test_all_columns_are_kept_though_their_types_change_from_row_to_row(tmp_path: Path) -> None:
    lines = [
        {
            **GOOD,
            "extra": 1,
            "nested": {"a": 1},
            "answer": "72",
            "score": 1,
            "verdict": "old",
            "reward": 9,
            "split": "test",
        },
        {**GOOD, "extra": "two", "nested": [1, "2"], "answer": None, "score": 0.5, "split": "banana"},
        {**GOOD, "extra": [3], "tags": 4, "sample_index": "x", "text": "lone \ud800 surrogate"},
    ]
    rows, _ = _run(_write(tmp_path, lines), tmp_path)
    assert [row["verdict"] for row in rows] == ["passed"] * 3
    assert [row["extra"] for row in rows] == ["1", "two", "[3]"]
    assert [row["nested"] for row in rows] == ['{"a": 1}', '[1, "2"]', None]
    assert [row["score"] for row in rows] == [1.0, 0.5, None]
    assert [row["split"] for row in rows] == ["test", "train", "train"]
    assert rows[0]["answer"] == [{"role": "assistant", "content": "72"}]
    assert rows[2]["text"] == "lone ? surrogate"
    assert rows[0]["reference"] == '{"answer": "72"}'


def test_parquet_with_references_as_objects_is_read(tmp_path: Path) -> None:
    """A struct column gives every reference the keys of all, null where a row has none."""
    lines = [
        {**GOOD, "reference": {"answer": "72", "constraints": None}},
        {
            **GOOD,
            "task": "constraints",
            "reference": {
                "answer": None,
                "constraints": [{"id": "punctuation:no_comma", "kwargs": {"num_words": None, "relation": None}}],
            },
        },
    ]
    code = {"task": "code", "completion": "def f():\n    return 2", "prompt": "Write f."}
    lines += [
        {**code, "reference": {"tests": ["assert f() == 2"], "io": None}},
        {**code, "completion": "print(input())", "reference": {"io": [{"stdin": "a", "stdout": "a"}], "tests": None}},
    ]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "rows.parquet")
    rows, _ = _run(tmp_path / "rows.parquet", tmp_path)
    assert [(row["verdict"], row["detail"]) for row in rows[2:]] == [
        ("passed", "1 tests passed"),
        ("passed", "1 inputs passed"),
    ]
    assert [row["verdict"] for row in rows[:2]] == ["passed", "passed"]


@pytest.mark.skipif(formulas.version() is None, reason="the extra `math` isn't installed")
def test_formulas_that_math_verify_was_asked_about_are_counted_in_the_summary(tmp_path: Path) -> None:
    answers = [r"\boxed{x \le 3}", r"\boxed{x \le 4}", "#### 3"]
    lines = [{**GOOD, "completion": answer, "reference": {"answer": r"(-\infty, 3]"}} for answer in answers]
    rows, summary = _run(_write(tmp_path, lines), tmp_path)
    assert [row["verdict"] for row in rows] == ["passed", "failed", "failed"]
    assert summary["formulas"] == {"asked": 2, "undecided": 0, "math_verify": formulas.version()}


def test_without_the_extra_the_summary_says_once_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "version", lambda: None)
    lines = [{**GOOD, "completion": r"\boxed{x \le 3}", "reference": {"answer": r"(-\infty, 3]"}}] * 3
    rows, summary = _run(_write(tmp_path, lines), tmp_path)
    assert [row["verdict"] for row in rows] == ["error"] * 3
    assert summary["formulas"] == {"asked": 3, "undecided": 3, "math_verify": None, "hint": formulas.NO_EXTRA}


def test_a_missing_file_is_told_before_anything_is_verified(tmp_path: Path) -> None:
    with pytest.raises(AlignError, match=r"nothing\.jsonl"):
        _run(tmp_path / "nothing.jsonl", tmp_path)
