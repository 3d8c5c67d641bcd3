"""Stage `verify`: verdicts for completions that were made elsewhere.

Reads rows with `task`, `completion` and `reference` (and whatever else) and gives every row back in order, with
`verdict`, `reward` and `detail`. Prompt and completion may be text or messages, a reference an object or its JSON text.
One bad row never stops the others: a line that is no JSON, a missing column or a value of the wrong type is a row with
the verdict `error`. A program that ran out of time is an `error` whose detail begins with "timeout".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import tee
from typing import Any

from pydantic import Field

from align.core.columns import stored
from align.core.errors import DataError
from align.core.formats import messages
from align.core.locate import Part, locate, our_split
from align.core.readers import Record
from align.core.records import COLUMNS, Kind, Row, Verdict, message_text
from align.core.sandbox import Accept
from align.core.stage import Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from align.core.writer import DatasetWriter
from reward.verifiers import TASKS, Verifiers, VerifyRow

PROBLEM = "unverifiable"
"""Column of the prepared rows, not of the result: why a row can't even be handed to a verifier."""

_NEW = ("verdict", "reward", "detail", "sandbox_level")
_ALSO_MESSAGES = ("chosen", "rejected", "answer")


class VerifyConfig(StageConfig):
    """Settings of `verify`."""

    data: str = Field(
        description="a file (jsonl, json, csv, parquet), folder, glob or Hub id with the columns task "
        f"({', '.join(TASKS)}), completion and reference; all other columns are kept"
    )
    accept: Accept = Field(
        "isolated", description="what isolation is enough to run code of the task `code`; unsafe runs it without any"
    )
    cpu_s: float = Field(8.0, gt=0, description="CPU seconds for all tests of one program")
    memory_mb: int = Field(512, ge=16, description="memory of one program beyond the interpreter's own, MiB")
    compile_cpu_s: float = Field(30.0, gt=0, description="CPU seconds for compiling one program (not Python)")


def run(config: VerifyConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every row with its verdict; the summary counts verdicts by task and says how code was isolated."""
    # Columns of mixed types must become one type before the result is written; the store does that for outside rows.
    prepared = tools.work / "rows"
    with DatasetWriter(prepared, Kind.COMPLETIONS, lenient=True) as writer:
        for row in _rows(config.data):
            writer.write(row)
    summary: dict[str, Any] = {"verdicts": {}}
    return Result(_verified(config, Table.open(prepared), tools, summary), summary)


def _verified(config: VerifyConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    counts: dict[str, Counter[str]] = {}
    tools.progress.start(len(table), "rows")
    settings = {
        "accept": config.accept, "cpu_s": config.cpu_s, "memory_mb": config.memory_mb,
        "compile_cpu_s": config.compile_cpu_s,
    }  # fmt: skip
    with Verifiers(settings, tools.progress.say) as verifiers:
        rows, copies = tee(table.rows())  # the copies run ahead by one chunk of the verifiers
        for row, found in zip(rows, verifiers.verify_many(map(_for_verifier, copies)), strict=True):
            problem = row.pop(PROBLEM)
            verdict = Verdict.error(problem) if problem else found
            row |= {"verdict": verdict.verdict, "reward": verdict.reward, "detail": verdict.detail}
            row["sandbox_level"] = verifiers.sandbox_level if row["task"] == "code" else None
            of_task = counts.setdefault(row["task"] if row["task"] in TASKS else "unknown", Counter())
            of_task[verdict.verdict] += 1
            tools.progress.advance(passed=sum(c["passed"] for c in counts.values()))
            yield row
        summary["verdicts"] = {task: dict(of_task) for task, of_task in sorted(counts.items())}
        if verifiers.sandbox_report:
            summary["sandbox"] = verifiers.sandbox_report


def _for_verifier(row: Row) -> VerifyRow:
    if row[PROBLEM]:
        return None, None, None, None
    return row["task"], message_text(row["completion"]), row["reference"], row["prompt"]


def _rows(data: str) -> Iterator[Row]:
    """Every record as a row whose columns can be stored, with the reason where it can't be verified."""
    for part in locate(data, None, None, None):
        for number, (where, record, problem) in enumerate(_records(part)):
            given = {name: value for name, value in record.items() if name not in (*_NEW, "prompt", "completion")}
            prompt, _ = _messages(record.get("prompt"), "user", "prompt", where)
            completion, misread = _messages(record.get("completion"), "assistant", "completion", where)
            for name in ("reference", "task"):
                if record.get(name) is None:
                    problem = problem or f"{name}: missing"
            if not isinstance(record.get("task"), str):
                problem = problem or f"task: expected one of {', '.join(TASKS)}, found {record.get('task')!r:.80}"
            row: Row = dict.fromkeys(COLUMNS[Kind.COMPLETIONS])
            row |= {"source": part.label, "source_row": number}
            row |= stored(given, None, where)
            row |= {"prompt": prompt, "completion": completion, PROBLEM: problem or misread}
            row |= {name: _messages(row[name], "assistant", name, where)[0] for name in _ALSO_MESSAGES if row.get(name)}
            row["family"] = row["family"] or row["task"]
            row["prompt_id"] = row["prompt_id"] or prompt_id_of(prompt or [{"role": "", "content": where}])
            row["split"] = our_split(row["split"] or part.split or "") or "train"
            yield row


def _records(part: Part) -> Iterator[tuple[str, Record, str | None]]:
    """The records of a part with their places; a line of a jsonl file that is no record comes with the reason."""
    if part.file is None or part.file.suffix not in (".jsonl", ".ndjson"):
        for where, record in part.records():
            yield where, record, None
        return
    with part.file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{part.label}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as problem:
                yield where, {"line": line.rstrip("\n")}, f"{where}: is no JSON ({problem})"
                continue
            if isinstance(record, dict):
                yield where, _storable(record) if "\\ud" in line.lower() else record, None
            else:
                kind = type(record).__name__
                yield where, {"line": line.rstrip("\n")}, f"{where}: {kind} was found, an object was expected"


def _messages(value: Any, role: str, column: str, where: str) -> tuple[Any, str | None]:
    """Text or messages as messages, and why not; a value that is neither is kept as its JSON text."""
    if value is None:
        return [], f"{column}: missing"
    if isinstance(value, str):
        return [{"role": role, "content": value}], None
    try:
        found = messages(value, role, column, where)
    except DataError as problem:
        return [{"role": role, "content": json.dumps(value, default=str)}], str(problem)
    if not any(turn["role"] == role for turn in found):
        return found, f"{column}: has no message of the {role}"
    return found, None


def _storable(value: Any) -> Any:
    r"""The value with lone surrogates (`\ud800`), which no file can hold, replaced by question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value


STAGE = Stage(
    name="verify",
    summary="verdicts for completions that were made elsewhere",
    config=VerifyConfig,
    needs={},
    gives=Kind.COMPLETIONS,
    run=run,
    reads=("data",),
)
