"""How fast does `align verify` go, and does its memory grow with the rows?

Makes rows, runs the command as a user would, and reads CPU time and peak memory of its process from the system. Numeric
maths at three sizes shows whether memory is flat; the other kinds show what a row of them costs.

    python benchmarks/verify.py [--rows 1000000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import machine

Row = dict[str, Any]


def numbers(count: int) -> Iterator[Row]:
    """Worked solutions that end with `#### 1,234`; every third is wrong."""
    draw = random.Random(0)
    for i in range(count):
        a, b = draw.randint(1, 999), draw.randint(1, 999)
        text = f"Ann has {a} shells. She finds {b} more, so she has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} shells."
        yield {
            "id": i,
            "task": "math",
            "prompt": f"Ann has {a} shells and finds {b} more. How many has she now?",
            "completion": f"{text}\n#### {a + b + (i % 3 == 0):,}",
            "reference": {"answer": str(a + b)},
        }


def formulas(count: int) -> Iterator[Row]:
    """LaTeX whose value can be computed without math-verify."""
    for i in range(count):
        answer = rf"\frac{{{i + 2 + (i % 3 == 0)}\sqrt{{3}}}}{{7}} + x"
        reference = {"answer": rf"x + {i + 2}\frac{{\sqrt{{3}}}}{{7}}"}
        yield {"id": i, "task": "math", "completion": rf"So it is $\boxed{{{answer}}}$.", "reference": reference}


def for_math_verify(count: int) -> Iterator[Row]:
    """LaTeX that only math-verify can compare: an inequality with an interval, and no two alike."""
    for i in range(count):
        completion = rf"So $\boxed{{x \le {i + (i % 3 == 0)}}}$."
        yield {"id": i, "task": "math", "completion": completion, "reference": {"answer": rf"(-\infty, {i}]"}}


def constraints(count: int) -> Iterator[Row]:
    """Three of IFEval's instructions on 60 words."""
    wanted = [
        {"id": "punctuation:no_comma", "kwargs": {}},
        {"id": "length_constraints:number_sentences", "kwargs": {"num_sentences": 4, "relation": "at least"}},
        {"id": "keywords:existence", "kwargs": {"keywords": ["river"]}},
    ]
    for i in range(count):
        text = " ".join(f"The river number {i + k} runs down to the sea and nobody knows why." for k in range(5))
        yield {"id": i, "task": "constraints", "completion": text, "reference": {"constraints": wanted}}


def measure(rows: Iterator[Row], folder: Path) -> Row:
    """CPU seconds, peak memory in MiB and seconds of the clock of one run of the command, and its verdicts."""
    data, out = folder / "rows.jsonl", folder / "out"
    with data.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    command = [sys.executable, "-m", "align.cli", "verify", f"data={data}", f"out={out}", "overwrite=true"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    manifest = json.loads((out / "manifest.json").read_text())
    return {
        "rows": manifest["rows"],
        "bytes": data.stat().st_size,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": manifest["seconds"],
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "verdicts": manifest["summary"]["verdicts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    cases: list[tuple[str, Callable[[int], Iterator[Row]], int]] = [
        ("nothing to do", numbers, 1),
        *(("numbers", numbers, settings.rows // part) for part in (100, 10, 1)),
        ("formulas", formulas, settings.rows // 100),
        ("formulas for math-verify", for_math_verify, settings.rows // 5000),
        ("constraints", constraints, settings.rows // 100),
    ]
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make, count in cases:
            found.append({"kind": name, **measure(make(count), Path(folder))})
            start_up = found[0]["cpu_s"]
            spent = found[-1]["cpu_s"] - start_up
            found[-1]["rows_per_cpu_s"] = round(count / spent) if spent > 0 else None
            print(json.dumps(found[-1]), flush=True)
    result = {
        "question": "rows that `align verify` does in a second of CPU (start-up taken off), and its peak memory",
        "cases": found,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
