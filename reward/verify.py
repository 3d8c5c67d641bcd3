"""Stage `verify`: verdicts for completions that were made elsewhere.

Reads rows with `task`, `completion` and `reference` (and whatever else) and gives every row back in order, with
`verdict`, `reward` and `detail`. Prompt and completion may be text or messages, a reference an object or its JSON text.
One bad row never stops the others: a line that is no JSON, a missing column or a value of the wrong type is a row with
the verdict `error`. A program that ran out of time is an `error` whose detail begins with "timeout". The tasks `judge`
and `compare` need a model in the role `judge` (see `reward.judged`).
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from align.core.columns import stored
from align.core.errors import DataError
from align.core.formats import messages
from align.core.locate import Part, locate, our_split
from align.core.readers import Record
from align.core.records import COLUMNS, Kind, Row, Verdict, message_text
from align.core.sandbox import Accept
from align.core.stage import Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from reward.judge_references import as_comparison
from reward.judged import JudgedConfig, judged
from reward.verifiers import SANDBOXED, TASKS, Verifiers, VerifyRow

_OWN = ("verdict", "reward", "detail", "sandbox_level", "prompt", "completion")
_ALL_TASKS = ", ".join(TASKS)
_EMPTY: Row = dict.fromkeys(COLUMNS[Kind.COMPLETIONS])
_ALSO_MESSAGES = ("chosen", "rejected", "answer")


class VerifyConfig(JudgedConfig):
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
    summary: dict[str, Any] = {"verdicts": {}}
    parts = locate(config.data, None, None, None)
    rows = _verified(config, parts, tools, summary)
    return Result(judged(rows, config, tools, summary), summary, lenient=True)


def _verified(config: VerifyConfig, parts: Sequence[Part], tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    counts: dict[str, Counter[str]] = {}
    passed = 0
    tools.progress.start(sum(part.count() for part in parts), "rows")
    settings = {
        "accept": config.accept, "cpu_s": config.cpu_s, "memory_mb": config.memory_mb,
        "compile_cpu_s": config.compile_cpu_s,
    }  # fmt: skip
    waiting: deque[tuple[Row, str | None]] = deque()  # handed to the verifiers, which run ahead by one chunk

    def for_verifiers() -> Iterator[VerifyRow]:
        for row, reference, problem in _rows(parts):
            waiting.append((row, problem))
            task, text = row["task"], message_text(row["completion"])
            yield (None, None, None, None) if problem else (task, text, reference, row["prompt"])

    with Verifiers(settings, tools.progress.say) as verifiers:
        for found in verifiers.verify_many(for_verifiers()):
            row, problem = waiting.popleft()
            verdict = Verdict.error(problem) if problem else found
            row["verdict"], row["reward"], row["detail"] = verdict.verdict, verdict.reward, verdict.detail
            row["sandbox_level"] = verifiers.sandbox_level if row["task"] in SANDBOXED else None
            of_task = counts.setdefault(row["task"] if row["task"] in TASKS else "unknown", Counter())
            of_task[verdict.verdict] += 1
            passed += verdict.verdict == "passed"
            tools.progress.advance(passed=passed)
            yield row
        summary["verdicts"] = {task: dict(of_task) for task, of_task in sorted(counts.items())}
        if verifiers.sandbox_report:
            summary["sandbox"] = verifiers.sandbox_report
        if formulas := verifiers.formulas_report:
            summary["formulas"] = formulas
            if formulas["undecided"]:
                hint = f": {formulas['hint']}" if "hint" in formulas else ""
                tools.progress.say(f"{formulas['undecided']} pairs of formulas could not be compared{hint}")


def _rows(parts: Sequence[Part]) -> Iterator[tuple[Row, Any, str | None]]:
    """Every record as a row that can be stored, its reference as it was read, and why it can't be verified."""
    for part in parts:
        split = our_split(part.split or "") or "train"
        for number, (where, record, problem) in enumerate(_records(part)):
            given = {"source": part.label, "source_row": number, "split": split}
            try:
                record, unpaired = as_comparison(record, where)
                problem = problem or unpaired
                row, found = _row(record, given, where)
            except (RecursionError, ValueError, TypeError, OverflowError) as trouble:  # nested too deeply, for one
                reason = f"{where}: can't be stored ({type(trouble).__name__}: {trouble!s:.80})"
                row, found = _row({}, given, where)[0], reason
            yield row, record.get("reference"), problem or found


def _row(record: Record, given: Row, where: str) -> tuple[Row, str | None]:
    """The row of a record, and what is wrong with it; `given` is what the record itself need not say."""
    prompt, _ = _messages(record.get("prompt"), "user", "prompt", where)
    completion, misread = _messages(record.get("completion"), "assistant", "completion", where)
    task = record.get("task")
    if not isinstance(task, str):
        misread = f"task: {'missing' if task is None else f'expected one of {_ALL_TASKS}, found {task!r:.80}'}"
    elif record.get("reference") is None:
        misread = "reference: missing"
    row: Row = _EMPTY | given
    row |= stored({name: value for name, value in record.items() if name not in _OWN}, None, where)
    row["prompt"], row["completion"] = prompt, completion
    for name in _ALSO_MESSAGES:
        if row.get(name) is not None:
            row[name] = _messages(row[name], "assistant", name, where)[0]
    row["family"] = row["family"] or row["task"]
    row["prompt_id"] = row["prompt_id"] or prompt_id_of(prompt or [{"role": "", "content": where}])
    if row["split"] != given["split"]:
        row["split"] = our_split(row["split"] or "") or given["split"]
    return row, misread


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
    version=2,
    engines={"judge": "a model that judges rows of the tasks judge and compare"},
    optional_engines=("judge",),
    reads=("data", "judge_template", "compare_template"),
)
