from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core import readers
from align.core.errors import DataError
from align.core.readers import count_records, read_records

ROWS = [{"a": i, "text": "x" * i + '\n€"\\'} for i in range(5)]


def written(tmp_path: Path, name: str, text: str | bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def records(file: Path) -> list[object]:
    return [record for _, record in read_records(file)]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.ndjson", "lines.json", "array.json", "pretty.json", "rows.parquet"]
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str):
    file = tmp_path / name
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif name.endswith("y.json"):
        file.write_text(json.dumps(ROWS, indent=2 if name == "pretty.json" else None))
    else:
        file.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    assert records(file) == ROWS
    assert count_records(file) == 5


def test_an_array_larger_than_the_buffer_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    rows = [{"a": i, "b": "]},{[" * (i % 3)} for i in range(50)]
    assert records(written(tmp_path, "x.json", json.dumps(rows, indent=1))) == rows
    with pytest.raises(DataError, match=r"x\.json, line 7, row 2: is no JSON, or the file was cut short"):
        records(written(tmp_path, "x.json", '[{"a": 1},\n\n\n{"a":\n 2}\n,\n{"a": 3'))


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path):
    assert records(written(tmp_path, "x.jsonl", b'\xef\xbb\xbf{"a": 1}\n')) == [{"a": 1}]
    assert records(written(tmp_path, "x.json", b'\xef\xbb\xbf[{"a": 1}]')) == [{"a": 1}]
    assert records(written(tmp_path, "x.csv", b"\xef\xbb\xbfa,b\n1,2\n")) == [{"a": "1", "b": "2"}]


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path: Path):
    file = written(tmp_path, "x.csv", 'q,a\n"one, ""two""\nthree",4\n\nfive,6\n')
    assert records(file) == [{"q": 'one, "two"\nthree', "a": "4"}, {"q": "five", "a": "6"}]
    assert records(written(tmp_path, "x.tsv", "q\ta\none, two\t3\n")) == [{"q": "one, two", "a": "3"}]


def test_a_cell_longer_than_the_csv_modules_limit_is_read(tmp_path: Path):
    assert len(str(records(written(tmp_path, "x.csv", f"a\n{'y' * 200_000}\n"))[0])) > 200_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl, line 2: is no JSON \(Expecting value at column 7\)"),
        ("x.jsonl", '{"a": 1}\n\n[1]\n', r"x\.jsonl, line 3: list was found, an object"),
        ("x.jsonl", b'{"a": "\xff"}\n', r"x\.jsonl, line 1: is no JSON"),
        ("x.jsonl", "", r"x\.jsonl: is empty"),
        ("x.jsonl", "\n\n", r"x\.jsonl: holds no rows"),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl, line 1: is no JSON"),
        ("x.json", '{\n "data": []\n}', r"x\.json: is neither an array of objects nor one object a line"),
        ("x.json", "[]", r"x\.json: holds no rows"),
        ("x.json", "[1, 2]", r"x\.json, line 1, row 0: int was found"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x\.csv, line 3: 3 cells were found, the header has 2 columns \(a, b\)"),
        ("x.csv", "a,b\n1\n", r"x\.csv, line 2: 1 cells"),
        ("x.csv", "a,a\n1,2\n", r"x\.csv, line 1: a name for each column was expected, once each"),
        ("x.csv", 'a\n"open\n', r"x\.csv, line 2: is no CSV"),
        ("x.csv", b"a\n\xff\n", r"x\.csv: is no UTF-8 text"),
        ("x.parquet", b"PAR1 nothing PAR1", r"x\.parquet: is damaged, or no parquet"),
        ("x.arrow", b"nothing", r"x\.arrow: is damaged, or no Arrow stream"),
        ("x.xlsx", b"PK", r"x\.xlsx: \.xlsx is no format known here"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_name_and_line(tmp_path: Path, name: str, content: str | bytes, says: str):
    with pytest.raises(DataError, match=says):
        records(written(tmp_path, name, content))


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 1000), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"x\.parquet: is damaged"):
        records(file)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.jsonl: can't be read \(No such file"):
        records(tmp_path / "gone.jsonl")
