"""Rows of one prompt together, wherever in a dataset they are, in bounded memory."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import numpy as np

from align.core.records import Row
from align.core.store import Table

BLOCK_ROWS = 50_000
"""Rows held in memory at once where a prompt's rows are apart (more, if one prompt alone has more)."""


def by_prompt(
    table: Table, work: Path, columns: Sequence[str] | None = None, block_rows: int = BLOCK_ROWS
) -> Iterator[list[Row]]:
    """Yields the rows of each prompt as one list, prompts in order of first appearance, rows in the table's order.

    A step writes a prompt's rows one after the other, and then this only streams. Where several steps' completions were
    put together a prompt's rows are apart: they go through temporary files in `work`, a block of prompts each.

    Args:
        table: rows with a `prompt_id`.
        work: a folder for temporary files; nothing stays there.
        columns: the columns to read, `prompt_id` among them; all by default.
        block_rows: rows of a block.
    """
    keys = np.fromiter((_key(row["prompt_id"]) for row in table.rows(["prompt_id"])), dtype=np.uint64)
    if not len(keys):
        return
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if len(np.unique(keys[starts])) == len(starts):
        for _, rows in groupby(table.rows(columns), key=lambda row: row["prompt_id"]):
            yield list(rows)
        return
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))  # the groups' numbers by first appearance
    sizes = np.bincount(place[group])
    block_of = (np.cumsum(sizes) - sizes) // block_rows
    with ExitStack() as stack:
        count = int(block_of[-1]) + 1
        files = [stack.enter_context(tempfile.TemporaryFile(dir=work)) for _ in range(count)]
        for row, number in zip(table.rows(columns), block_of[place[group]], strict=True):
            pickle.dump(row, files[int(number)])
        for file, rows_here in zip(files, np.bincount(block_of, weights=sizes, minlength=count), strict=True):
            file.seek(0)
            groups: dict[str, list[Row]] = {}
            for _ in range(int(rows_here)):
                row = pickle.load(file)  # written a moment ago by this very function
                groups.setdefault(row["prompt_id"], []).append(row)
            yield from groups.values()


def _key(prompt_id: str) -> int:
    return int.from_bytes(blake2b(prompt_id.encode(), digest_size=8).digest(), "little")
