"""Writing datasets: parquet shards as the rows come, with one schema, and a dataset card.

`datasets.load_dataset(str(folder))` gives back what was written here.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from align.core.card import Card, card_text
from align.core.errors import RunError
from align.core.records import Kind, Row

if TYPE_CHECKING:
    from align.core.schema import Schema

GROUP_ROWS = 10_000
GROUP_CHARACTERS = 32_000_000
SHARD_BYTES = 256_000_000
_COUNTED = ("split", "source", "task", "verdict")
_MOST_VALUES = 50


def write_rows(folder: Path, rows: Iterable[Row], kind: Kind, card: Card | None = None) -> int:
    """Writes all the rows and gives their number; see `DatasetWriter`."""
    with DatasetWriter(folder, kind, card) as writer:
        for row in rows:
            writer.write(row)
    return writer.count


class DatasetWriter:
    """Writes rows of one kind to `folder/data/part-00000.parquet` … and a card to `folder/README.md`.

    Use it as a context manager. A shard gets its name when it is complete; the card is written last, and not at all
    when the block ends with an exception. Shards of an earlier attempt are removed at the start. Columns that the kind
    doesn't have get the type that their values show; where later rows widen a type or bring a column, the shards
    written before are rewritten at the end, so that all have one schema.

    Args:
        folder: the dataset's folder.
        kind: of the rows.
        card: what its card says.
        shard_bytes: a shard is complete when it has grown to this size.
        lenient: for rows from outside: a column of mixed types becomes text, and nothing is required.

    Attributes:
        card: what the card says; read at the end.
        count: rows taken so far.

    Raises:
        DataError: a value doesn't fit its column; the message names row and column.
        RunError: the disk is full, or the folder can't be written to.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        card: Card | None = None,
        shard_bytes: int = SHARD_BYTES,
        lenient: bool = False,
    ) -> None:
        from align.core.schema import Schema

        self.folder = folder
        self.kind = kind
        self.count = 0
        self.card = card or Card(title=folder.name)
        self._shard_bytes = shard_bytes
        self._schema: Schema = Schema(kind, lenient)
        self._rows: list[Row] = []
        self._characters = 0
        self._writer: Any = None
        self._shards: list[Any] = []  # the arrow schema of each shard, in order
        self._counts: dict[str, Counter[str]] = {}
        with disk_errors(folder):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            for old in [*(folder / "data").glob("*.parquet"), *(folder / "data").glob("*.parquet.part")]:
                old.unlink()
            (folder / "README.md").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException:
                self._abandon()
                raise
        else:
            self._abandon()

    def write(self, row: Row) -> None:
        """Takes one row; it reaches the disk with its row group."""
        self._rows.append(row)
        self._characters += _characters(row)
        self.count += 1
        for name in _COUNTED:
            if isinstance(value := row.get(name), str):
                self._count(name, value)
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def _count(self, name: str, value: str) -> None:
        counter = self._counts.get(name)
        if counter is None:
            counter = self._counts[name] = Counter()
        counter[value if value in counter or len(counter) < _MOST_VALUES else "(others)"] += 1

    def _flush(self) -> None:
        """Writes the rows held as one row group, and completes the shard when it is large enough."""
        import pyarrow.parquet as pq

        if not self._rows and self._shards:
            return
        table, changed = self._schema.table(self._rows, first_row=self.count - len(self._rows))
        self._rows = []
        self._characters = 0
        if changed and self._writer is not None:
            self._complete()
        with disk_errors(self.folder):
            if self._writer is None:
                self._file = self._shard(len(self._shards)).with_suffix(".parquet.part").open("wb")
                self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
            self._writer.write_table(table)
            if self._file.tell() >= self._shard_bytes:
                self._complete()

    def _shard(self, number: int) -> Path:
        return self.folder / "data" / f"part-{number:05d}.parquet"

    def _complete(self) -> None:
        with disk_errors(self.folder):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            shard = self._shard(len(self._shards))
            shard.with_suffix(".parquet.part").rename(shard)
            self._shards.append(self._writer.schema)
            self._writer = None

    def _finish(self) -> None:
        if self._rows or not self._shards:
            self._flush()
        if self._writer is not None:
            self._complete()
        for number, schema in enumerate(self._shards):
            if not schema.equals(self._schema.arrow):
                self._rewrite(self._shard(number))
        columns = {column.name: str(column.type) for column in self._schema.arrow}
        text = card_text(self.card, self.kind, columns, self._counts, self.count)
        replace_file(self.folder / "README.md", text)

    def _rewrite(self, shard: Path) -> None:
        """Gives a shard written before the schema grew the columns and types that it has now."""
        import pyarrow.parquet as pq

        part = shard.with_suffix(".parquet.part")
        with (
            disk_errors(self.folder),
            pq.ParquetFile(shard) as old,
            pq.ParquetWriter(part, self._schema.arrow, compression="zstd") as new,
        ):
            for number in range(old.num_row_groups):
                new.write_table(self._schema.widen(old.read_row_group(number)))
        with disk_errors(self.folder):
            part.replace(shard)

    def _abandon(self) -> None:
        """Leaves nothing behind that looks complete."""
        self._rows = []
        if self._writer is not None:
            try:
                self._writer.close()
                self._file.close()
            except OSError:
                pass  # the disk is full: what was written is removed next
            self._writer = None
        for part in (self.folder / "data").glob("*.parquet.part"):
            part.unlink(missing_ok=True)


def _characters(value: Any) -> int:
    """About how much memory a row takes, counted in characters."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return len(value) if isinstance(value, str) else 8
    total = 0
    for part in value:
        total += len(part) if part.__class__ is str else 8 if part is None else _characters(part)
    return total


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, or a folder that can't be written to, into a `RunError` with its remedy."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"{folder}: no space left to write to ({problem.strerror}); nothing half-written counts as done: "
                "free some space or give another folder, and run the same command again to go on"
            ) from problem
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise RunError(f"{folder}: can't be written to ({problem.strerror}); give another folder") from problem
        raise


def replace_file(path: Path, text: str) -> None:
    """Writes a small text file so that a reader sees the old content or the new, never half of it.

    Raises:
        RunError: the disk is full, or the folder can't be written to.
    """
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path.parent):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
