"""Formulas that our own comparison can't evaluate, compared by math-verify in a process that may be killed.

math-verify (the extra `math`) parses LaTeX into sympy. It stops itself by a signal, which threads can't have, and what
it is asked to simplify comes from a model: `9^{9^{9^9}}` must not hang us or eat our memory. So it runs in one worker
process with limits of CPU time and memory, used again and again, and replaced when it dies. Only two formulas are
handed over, never a whole solution, in which it picks wrong numbers.

It is asked both ways round, and believed where both agree: each way is lenient on the other side (`x^2 = 5` is taken
for 5 when it is the answer, and not when it is the reference).
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("formula_worker.py")
CPU_S = 3
"""CPU seconds for one pair of formulas."""
MEMORY_MB = 512
"""Address space of the worker, MiB; it takes about 60 for itself."""
_MOST_PAIRS = 5000
"""Pairs after which the worker is replaced: what it keeps grows by about 20 KiB a pair."""
_PATIENCE = 20
"""The backstop in seconds of the clock, as a multiple of `CPU_S`: for a machine that has no time for the worker."""
_MOST_CHARACTERS = 600
_MOST_KNOWN = 10_000

NO_EXTRA = "math-verify, which compares such formulas, isn't installed (pip install 'align-toolkit[math]')"


@cache
def version() -> str | None:
    """The version of math-verify; None where it isn't installed."""
    return metadata.version("math-verify") if util.find_spec("math_verify") else None


class Formulas:
    """Compares formulas; a context manager, since its worker is a process to end. The first question starts it.

    Attributes:
        asked: how many pairs it was asked about.
        undecided: how many of them it could not tell.
        problem: why the last one could not be told; empty where it could.
    """

    def __init__(self, cpu_s: int = CPU_S, memory_mb: int = MEMORY_MB) -> None:
        """Takes the limits of one question."""
        self.asked = self.undecided = 0
        self.problem = ""
        self._limits = (str(cpu_s), str(memory_mb))
        self._cpu_s = cpu_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._answered = 0
        self._known: dict[tuple[str, str], tuple[bool | None, str]] = {}

    def __enter__(self) -> Formulas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def report(self) -> dict[str, Any] | None:
        """What was asked and could not be told, for manifests; None where nothing was asked."""
        if not self.asked:
            return None
        found: dict[str, Any] = {"asked": self.asked, "undecided": self.undecided, "math_verify": version()}
        return found if version() else found | {"hint": NO_EXTRA}

    def same(self, answer: str, expected: str) -> bool | None:
        """Whether two formulas mean the same; None where that can't be told, and `problem` says why."""
        self.asked += 1
        found, self.problem = self._found(answer, expected)
        self.undecided += found is None
        return found

    def _found(self, answer: str, expected: str) -> tuple[bool | None, str]:
        if version() is None:
            return None, NO_EXTRA
        if len(expected) > _MOST_CHARACTERS:
            return None, f"the expected formula has more than {_MOST_CHARACTERS} characters"
        if len(answer) > _MOST_CHARACTERS:
            return False, ""  # no way to write what takes so much less
        pair = (answer, expected)
        if pair not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[pair] = self._ask(answer, expected)
        return self._known[pair]

    def _ask(self, answer: str, expected: str) -> tuple[bool | None, str]:
        if self._worker is not None and (self._worker.poll() is not None or self._answered >= _MOST_PAIRS):
            self._end()  # it may have been ended while it had nothing to do
        worker = self._worker or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps([answer, expected]).encode() + b"\n")
            worker.stdin.flush()
            waiting = select.poll()
            waiting.register(worker.stdout, select.POLLIN)
            line = worker.stdout.readline() if waiting.poll(1000 * _PATIENCE * self._cpu_s) else b""
        except OSError:
            line = b""
        if not line:
            return None, self._why_ended(worker)
        self._answered += 1
        found = json.loads(line)
        return found["same"], found["problem"]

    def _why_ended(self, worker: subprocess.Popen[bytes]) -> str:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        status = worker.returncode
        self._end()
        if status in (None, -signal.SIGPROF):
            return f"timeout: comparing the formulas takes more than {self._cpu_s} s of CPU"
        return f"the process of math-verify ended (status {status}); it may take {self._limits[1]} MiB of memory"

    def _start(self) -> subprocess.Popen[bytes]:
        self._answered = 0
        command = [sys.executable, "-P", str(WORKER), *self._limits]
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return self._worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was written and never read
                    pipe.close()
