"""How long does `align select` take on a million tagged instructions, and how much memory?

Makes tagged prompts and an ontology of 6,000 tags in three levels, Zipf-distributed as InsTag's are, about 4.5 a row;
runs the command as a user would; reads CPU time and peak memory of its process from the system.

    python benchmarks/selection.py [--rows 1000000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from texts import texts

from align.core.records import Kind
from align.core.writer import write_rows

Row = dict[str, Any]
TAGS = 6000
TOPS = 30


def prompts(count: int) -> Iterator[Row]:
    """Instructions of 10 to 60 words with 0 to 15 tags, 4.5 on the average."""
    rng = np.random.default_rng(0)
    words = texts(5000, rng, 10, 60)
    chances = 1 / np.arange(1, TAGS + 1) ** 0.9
    chances /= chances.sum()
    for start in range(0, count, 10_000):
        sizes = np.minimum(rng.poisson(4.5, 10_000), 15)
        drawn = rng.choice(TAGS, int(sizes.sum()), p=chances).tolist()
        place = 0
        for number, size in enumerate(sizes.tolist()):
            tags = list(dict.fromkeys(f"tag {tag}" for tag in drawn[place : place + size]))
            place += size
            text = words[(start + number) % len(words)]
            yield {
                "prompt_id": f"p{start + number}", "prompt": [{"role": "user", "content": text}], "split": "train",
                "source": "made", "task": None, "family": None, "reference": None, "tags": tags,
            }  # fmt: skip


def ontology() -> Iterator[Row]:
    """Tags 0 to 29 at the top, the next 300 under them, the others under those."""
    for tag in range(TAGS):
        parent = None if tag < TOPS else tag % TOPS if tag < 11 * TOPS else TOPS + tag % (10 * TOPS)
        above = None if parent is None else f"tag {parent}"
        yield {"tag": f"tag {tag}", "count": 1, "members": [f"tag {tag}"], "parent": above, "examples": []}


def measure(folder: Path, name: str, *settings: str) -> Row:
    """Seconds of CPU and of the clock, and peak memory in MiB, of one run of the command."""
    out = folder / name
    command = [
        sys.executable,
        "-m",
        "align.cli",
        "select",
        f"prompts={folder / 'prompts'}",
        f"ontology={folder / 'ontology'}",
    ]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *settings, f"out={out}"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    summary = json.loads((out / "manifest.json").read_text())["summary"]
    shown = ("pool", "selected", "tags", "coverage_before", "coverage_after", "complexity_before", "complexity_after")
    return {
        "settings": settings, "cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "wall_s": round(wall, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024), **{key: summary[key] for key in shown},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    tenth = settings.rows // 10
    mixture = "mixture={tag 0: 0.3, tag 1: 0.2, tag 7: 0.1}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "prompts", prompts(settings.rows), Kind.PROMPTS)
        write_rows(folder / "ontology", ontology(), Kind.ONTOLOGY)
        cases = []
        for number, words in enumerate((["count=6000"], [f"count={tenth}"], [f"count={tenth}", mixture])):
            cases.append(measure(folder, str(number), *words))
            print(json.dumps(cases[-1]), flush=True)
    result = {
        "question": "`align select` on tagged rows: CPU and clock seconds, start-up included, and peak memory",
        "rows": settings.rows,
        "cases": cases,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
