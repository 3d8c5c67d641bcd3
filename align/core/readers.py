"""Reading data files as people have them: records one at a time, with the place of each for messages."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.core.errors import DataError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXTS = (".txt", ".md", ".rst")
"""Files that are one text: a record with the column `text`. Read only where any rows will do, as passages do."""
_CHUNK = 1 << 20


def read_records(file: Path) -> Iterator[tuple[str, Record]]:
    """Yields each record of a file with its place ("train.jsonl, line 7"), in bounded memory.

    Raises:
        DataError: the file is missing, empty, damaged, or of an unknown format; the message names file and line.
    """
    readers = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv,
        ".parquet": _parquet, ".arrow": _arrow, **dict.fromkeys(TEXTS, _text),
    }  # fmt: skip
    if file.suffix not in readers:
        found = file.suffix or "a file without suffix"
        raise DataError(f"{file}: {found} is no format known here ({', '.join(SUFFIXES)})")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty")
        empty = True
        for record in readers[file.suffix](file):
            empty = False
            yield record
    except OSError as problem:
        raise DataError(f"{file}: can't be read ({problem.strerror or problem})") from problem
    except UnicodeDecodeError as problem:
        raise DataError(f"{file}: is no UTF-8 text ({problem.reason} at byte {problem.start}); convert it") from problem
    if empty:
        raise DataError(f"{file}: holds no rows")


def count_records(file: Path) -> int:
    """The number of records that `read_records` would give; quick for parquet and jsonl."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(file).num_rows)
        except Exception:  # the reader below says what is wrong with it
            return sum(1 for _ in read_records(file))
    if file.suffix in (".jsonl", ".ndjson") and file.is_file():
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return sum(1 for _ in read_records(file))


def _json_lines(file: Path) -> Iterator[tuple[str, Record]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                place = f"{file}, line {number}"
                yield place, _record(_parse(line, place), place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        what = f"{problem.msg} at column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else str(problem)
        raise DataError(f"{place}: is no JSON ({what}): {line[:60].decode('utf-8', 'replace').strip()}") from problem


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: {type(value).__name__} was found, an object with a name for each column was expected"
        )
    return value


def _json(file: Path) -> Iterator[tuple[str, Record]]:
    """An array of objects, read piece by piece; or one object a line under another name."""
    with file.open(encoding="utf-8-sig") as text:
        if text.read(4096).lstrip().startswith("["):
            text.seek(0)
            yield from _array(file, text)
            return
        text.seek(0)
        first = text.readline()
    try:
        json.loads(first)
    except ValueError as problem:
        raise DataError(
            f"{file}: is neither an array of objects nor one object a line; if the rows are inside an object, take "
            "them out of it (jq '.data' does that for an object whose rows are under \"data\")"
        ) from problem
    yield from _json_lines(file)


def _array(file: Path, text: Any) -> Iterator[tuple[str, Record]]:
    decoder = json.JSONDecoder()
    buffer, at, line, number, chunk, ended = text.read(_CHUNK), 0, 1, 0, _CHUNK, False
    at = buffer.index("[") + 1
    while True:
        start = at
        while at < len(buffer) and (buffer[at].isspace() or (buffer[at] == "," and number > 0)):
            at += 1
        line += buffer.count("\n", start, at)
        place = f"{file}, line {line}, row {number}"
        if buffer[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as problem:
            more = "" if ended else text.read(chunk)
            if not more:
                raise DataError(
                    f"{place}: is no JSON, or the file was cut short: {buffer[at : at + 60]!r}"
                ) from problem
            buffer, at, chunk = buffer[at:] + more, 0, chunk * 2
            continue
        yield place, _record(value, place)
        line += buffer.count("\n", at, end)
        at, number, chunk = end, number + 1, _CHUNK
        if at > _CHUNK:
            buffer, at = buffer[at:], 0


def _csv(file: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells of more than 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names) or not all(names):
                raise DataError(f"{file}, line 1: a name for each column was expected, once each: {', '.join(names)}")
            for row in rows:
                place = f"{file}, line {rows.line_num}"
                if row and len(row) != len(names):
                    raise DataError(
                        f"{place}: {len(row)} cells were found, the header has {len(names)} columns "
                        f"({', '.join(names)}); is a comma or a line break outside quotes?"
                    )
                if row:
                    yield place, dict(zip(names, row, strict=True))
        except csv.Error as problem:
            raise DataError(f"{file}, line {rows.line_num}: is no CSV ({problem})") from problem


def _text(file: Path) -> Iterator[tuple[str, Record]]:
    """The whole file as one record, its line breaks as they are, so that places in it are places in the text."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        yield str(file), {"text": text.read()}


def _parquet(file: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"{file}: is damaged, or no parquet ({problem}); was it cut short? copy it again") from problem


def _arrow(file: Path) -> Iterator[tuple[str, Record]]:
    """A file of the `datasets` library's own (Arrow's stream format)."""
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(file)) as data, pa.ipc.open_stream(data) as stream:
            for batch in stream:
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"{file}: is damaged, or no Arrow stream ({problem}); copy it again") from problem
