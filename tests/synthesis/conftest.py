"""A stage's tools and inputs for tests: real tables on disk, engines by role, and a progress that only counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Engine
from align.core.records import Kind, Row
from align.core.stage import Stage, Tools
from align.core.store import Table
from align.core.writer import write_rows


class Counted:
    """A `Progress` that keeps what it was told."""

    def __init__(self) -> None:
        self.done = 0
        self.figures: dict[str, Any] = {}
        self.lines: list[str] = []

    def start(self, total: int | None, unit: str) -> None:
        self.done = 0

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        self.done += by
        self.figures.update(figures)

    def say(self, line: str) -> None:
        self.lines.append(line)


class Bench:
    """Runs a stage on rows: writes them as a table, runs, writes what comes as the pipeline would, reads it back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables = 0
        self.summary: dict[str, Any] = {}
        self.out = folder / "out"

    def table(self, rows: Iterable[Row], kind: Kind) -> Table:
        self.tables += 1
        folder = self.folder / f"table{self.tables}"
        write_rows(folder, rows, kind)
        return Table.open(folder)

    def run(
        self,
        stage: Stage,
        settings: Mapping[str, Any],
        engines: Mapping[str, Engine] | None = None,
        seed: int = 0,
        **inputs: Iterable[Row] | Table,
    ) -> list[Row]:
        tables = {}
        for name, rows in inputs.items():
            need = stage.needs[name].kind
            kind = need[0] if isinstance(need, tuple) else need
            tables[name] = rows if isinstance(rows, Table) else self.table(rows, kind or Kind.PROMPTS)
        work = self.folder / "work"
        for folder in (self.out, work):
            folder.mkdir(exist_ok=True)
        progress = Counted()
        self.said = progress.lines
        tools = Tools(seed, engines or {}, progress, work, self.out)
        result = stage.run(stage.config(**settings), tables, tools)
        assert result.rows is not None
        self.tables += 1
        folder = self.folder / f"result{self.tables}"
        write_rows(folder, result.rows, stage.gives)
        self.summary = result.summary
        assert not list(work.iterdir()), "a stage leaves nothing in its work folder"
        return list(Table.open(folder).rows())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def a_prompt(number: int, text: str | None = None, **more: Any) -> Row:
    return {
        "prompt_id": f"p{number}", "prompt": [{"role": "user", "content": text or f"question {number}"}],
        "split": "train", "source": "here", "task": "exact", "family": "exact",
        "reference": '{"answer": "yes"}', **more,
    }  # fmt: skip


def a_completion(number: int, index: int, text: str, passed: bool | None, **more: Any) -> Row:
    verdict = "error" if passed is None else "passed" if passed else "failed"
    reward = None if passed is None else float(passed)
    return {
        **a_prompt(number), "sample_index": index, "completion": [{"role": "assistant", "content": text}],
        "reward": reward, "verdict": verdict, "detail": "", "generator": "policy", "finish_reason": "stop", **more,
    }  # fmt: skip
