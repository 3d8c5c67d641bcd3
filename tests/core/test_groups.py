from pathlib import Path

import pytest

from align.core.groups import by_prompt
from align.core.records import Kind
from align.core.store import Table
from align.core.writer import write_rows


def table_of(folder: Path, ids: str) -> Table:
    rows = [
        {"prompt_id": i, "prompt": [{"role": "user", "content": i}], "split": "train", "number": number}
        for number, i in enumerate(ids)
    ]
    write_rows(folder / "t", rows, Kind.PROMPTS)
    return Table.open(folder / "t")


@pytest.mark.parametrize("block_rows", [1, 3, 100])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ("aabccc", [("a", [0, 1]), ("b", [2]), ("c", [3, 4, 5])]),
        ("abcab", [("a", [0, 3]), ("b", [1, 4]), ("c", [2])]),
        ("cbaaabc", [("c", [0, 6]), ("b", [1, 5]), ("a", [2, 3, 4])]),
        ("", []),
    ],
)
def test_rows_of_a_prompt_come_together_in_order(
    tmp_path: Path, ids: str, expected: list[tuple[str, list[int]]], block_rows: int
) -> None:
    groups = by_prompt(table_of(tmp_path, ids), tmp_path, block_rows=block_rows)
    found = [(rows[0]["prompt_id"], [row["number"] for row in rows]) for rows in groups]
    assert found == expected
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    (rows, *_) = by_prompt(table_of(tmp_path, "aba"), tmp_path, ["prompt_id", "number"])
    assert rows == [{"prompt_id": "a", "number": 0}, {"prompt_id": "a", "number": 2}]
