"""Rows made to hang, crash or fill the verifiers: each costs bounded CPU time and memory, and only its own verdict."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.core.records import Kind, Row
from align.core.stage import Tools
from align.core.store import Table
from align.core.writer import DatasetWriter
from align.progress import Silent
from reward.verifiers import CHUNK_CHARACTERS, Verifiers, VerifyRow, chunks
from reward.verify import STAGE, VerifyConfig
from tests.reward.test_constraints import CASES

MB = 1_000_000
GOOD: dict[str, Any] = {"task": "math", "completion": "#### 72", "reference": {"answer": "72"}}
REFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("math", {"answer": "72"}),
    ("math", {"answer": r"\frac{x}{2}"}),
    ("exact", {"answer": "x"}),
    ("tags", {"tags": ["a"]}),
    ("principle", {"kind": "benign", "any": ["zz"], "none": ["qq"]}),
    (
        "constraints",
        {
            "constraints": [{"id": name, "kwargs": cases[0][0]} for name, cases in CASES.items()],
            "mode": "loose",
        },
    ),
]


@pytest.mark.parametrize(
    "piece",
    ["9", " ", "\n", "{", "\\boxed{", "#### 1\n", "1,", "1 000 ", "\\text{a", "\\frac", "=", "\ud800", "\0", "٣",
     "A'B ", "<<", "\\pm"],
)  # fmt: skip
def test_a_million_characters_of_anything_cost_no_time_and_never_an_exception(piece: str) -> None:
    """Every task in turn, as the whole completion and as its final answer; 60,000 characters for IFEval's 25."""
    text = piece * (MB // len(piece))
    began = time.process_time()
    with Verifiers() as verifiers:
        for task, reference in REFERENCES[:-1]:
            verdict = verifiers.verify(task, text, reference)
            assert verdict.verdict == "failed", f"{task}: {verdict.detail}"
            assert len(verdict.detail) < 1000
        for wrapped in (f"#### {text}", f"\\boxed{{{text}}}", f"The answer is {text}"):
            for task, reference in REFERENCES[:2]:
                assert verifiers.verify(task, wrapped, reference).verdict == "failed"
        verifiers.verify("constraints", text[:60_000], REFERENCES[-1][1])
    assert time.process_time() - began < 4


@pytest.mark.parametrize("piece", ["a ", "\\boxed{", "the answer is "])
def test_ten_million_characters_take_ten_times_as_long_and_not_a_hundred_times(piece: str) -> None:
    text = piece * (10 * MB // len(piece))
    began = time.process_time()
    with Verifiers() as verifiers:
        assert verifiers.verify("math", text, {"answer": "72"}).verdict == "failed"
    assert time.process_time() - began < 6


@pytest.mark.parametrize("text", ["9" * MB, "1e999999", "-1e-999999", "9**9**9", "{" * MB, "\\frac{" * 1000, "\ud800"])
def test_a_hostile_reference_costs_no_time_and_passes_nothing(text: str) -> None:
    with Verifiers() as verifiers:
        began = time.process_time()
        assert verifiers.verify("math", "#### 72", {"answer": text}).verdict != "passed"
        assert verifiers.verify("math", r"\boxed{\frac{x}{2}}", {"answer": f"#### {text}"}).verdict != "passed"
        assert time.process_time() - began < 2


def test_long_rows_are_held_a_few_at_a_time() -> None:
    rows: list[VerifyRow] = [("exact", "x" * (CHUNK_CHARACTERS // 4 + 1), {"answer": "x"}, "")] * 10
    assert [len(chunk) for chunk in chunks(rows)] == [4, 4, 2]
    assert [len(chunk) for chunk in chunks([("exact", None, {}, "")] * 600)] == [256, 256, 88]


HOSTILE_LINES = [
    '{"task": "math", "completion": "#### 72", "reference": {"answer": 72}, "x": NaN, "sample_index": Infinity}',
    '{"task": "math", "completion": "#### 72", "reference": {"answer": -Infinity}, "sample_index": 1e999}',
    '{"task": "math", "completion": "#### 72", "reference": {"answer": "72"}, "sample_index": 1' + "0" * 30 + "}",
    '{"task": "math", "completion": "#### 72", "reference": {"answer": "72"}, "margin": 1' + "0" * 400 + "}",
    '{"task": "math", "completion": "#### 72", "reference": {"answer": "72"}, "x": 1' + "0" * 400 + "}",
    '{"x": 1' + "0" * 5000 + "}",
    '{"task": "math", "completion": "#### 72", "reference": {"answer": "72"}, "x": ' + "[" * 900 + "]" * 900 + "}",
    '{"x": ' + '{"a": ' * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"task": "math", "completion": "#### \\ud800", "reference": {"answer": "\\udfff"}, "\\ud800": "\\ud800"}',
    '{"task": "math", "completion": "#### 72", "reference": {"answer": "72"}, "": 1, "a\\u0000b": 2, "x": {"": {}}}',
    '{"task": "\\u0000", "completion": "\\u0000", "reference": "\\u0000"}',
    '{"task": ["math"], "completion": {"role": 5}, "reference": [[]], "prompt": {"a": []}, "tags": {"a": 1}}',
    '{"task": "math", "completion": [{"role": "assistant", "content": null}], "reference": {}, "split": []}',
    '{"task": "math", "completion": "#### 72", "reference": {}, "chosen": {}, "rejected": 5, "answer": []}',
    '{"task": "math", "completion": "#### 72", "reference": {}, "prompt_id": 5, "source": 5, "family": [1]}',
    "\x00\x01\x02",
    "null",
    '"',
]  # fmt: skip


def _verified(lines: list[str], folder: Path) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines) + b"\xff\xfe\n")
    tools = Tools(seed=0, engines={}, progress=Silent(), work=folder, out=folder)
    result = STAGE.run(VerifyConfig(data=str(path)), {}, tools)
    assert result.rows is not None
    with DatasetWriter(folder / "out", Kind.COMPLETIONS, lenient=result.lenient) as writer:
        for row in result.rows:
            writer.write(row)
    return list(Table.open(folder / "out").rows())


def test_hostile_lines_get_a_verdict_each_and_so_does_every_row_between_them(tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    lines = [line for hostile in HOSTILE_LINES for line in (hostile, good)]
    began = time.process_time()
    rows = _verified(lines, tmp_path)
    assert time.process_time() - began < 10
    assert len(rows) == len(lines) + 1
    assert [row["verdict"] for row in rows[1::2]] == ["passed"] * len(HOSTILE_LINES)
    assert {row["verdict"] for row in rows} <= {"passed", "failed", "error"}
    assert rows[-1]["verdict"] == "error"
    assert rows[4]["verdict"] == "passed" and rows[4]["sample_index"] is None  # more than 64 bits


def test_a_column_may_change_its_type_after_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer fixes types with each group of rows; lists, numbers and texts then still share a column, as text."""
    monkeypatch.setattr("align.core.writer.GROUP_ROWS", 2)
    values: list[Any] = [[1, 2], [3], ["a"], ["b"], 2**62, 1, 0.5, 0.5, "b", {"c": 1}, None, True, False]
    rows = _verified([json.dumps({**GOOD, "extra": value}) for value in values], tmp_path)[:-1]
    assert {row["verdict"] for row in rows} == {"passed"}
    assert [row["extra"] for row in rows] == [
        "[1, 2]", "[3]", '["a"]', '["b"]', str(2**62), "1", "0.5", "0.5", "b", '{"c": 1}', None, "true", "false",
    ]  # fmt: skip


MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "align.cli", "verify", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def _peak_memory_mib(rows: int, folder: Path) -> float:
    """Of the process that verifies so many rows, started from a small one, whose memory it would count as its own."""
    data = folder / f"{rows}.jsonl"
    data.write_text(
        "".join(json.dumps({**GOOD, "id": i, "prompt": f"{i}? " + "x" * 300}) + "\n" for i in range(rows)), "utf-8"
    )
    command = [sys.executable, "-c", MEASURE, f"data={data}", f"out={folder / str(rows)}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """30,000 more rows are 14 MB of text; holding them as Python objects would take more than 50 MiB.

    Two groups of 10,000 rows, which the writer holds, are the least that reach the peak.
    """
    few, many = _peak_memory_mib(20_000, tmp_path), _peak_memory_mib(50_000, tmp_path)
    assert many - few < 25
    assert many < 512
