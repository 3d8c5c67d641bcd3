"""`align` in a process of its own that is a fork of this one: its libraries are there already, so it starts at once.

What a user's process does is the same: its arguments, environment, folder, output, signals and exit status are its own.
Where the start or the end of the interpreter is what is tried, a real start is needed instead.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow

import align.report.page
from align import cli

pyarrow.array([0])  # at its first use it loads more


class Forked:
    """A forked process, handled as one of `subprocess.Popen`."""

    def __init__(self, work: Callable[[], object], cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts it, in a process group of its own.

        Args:
            work: what it does; how it ends decides the exit status, as at the end of a script.
            cwd: the folder it starts in.
            environment: variables besides those of this process.
        """
        self.returncode: int | None = None
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            self.said = [os.dup(out.fileno()), os.dup(errors.fileno())]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _be(work, self.said, cwd, environment or {})

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            self.poll(0)
        else:
            until = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired(["align"], timeout)
                time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its output and to its standard error, when it has ended."""
        self.wait(timeout)
        texts = []
        for descriptor in self.said:
            with os.fdopen(descriptor, "rb") as file:
                file.seek(0)
                texts.append(file.read().decode())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: object, cwd: Path, **environment: str) -> Forked:
    """`align ARGUMENTS`, running."""
    words = [str(argument) for argument in arguments]

    def work() -> None:
        sys.argv = ["align", *words]
        cli.main()

    return Forked(work, cwd, environment)


def align(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`align ARGUMENTS`, when it has ended."""
    process = start(*arguments, cwd=cwd, **environment)
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(["align", *map(str, arguments)], process.returncode, out, errors)


def _be(work: Callable[[], object], said: list[int], cwd: Path, environment: Mapping[str, str]) -> None:
    """The forked process, which never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        atexit._clear()  # what this process was to do at its end is not the fork's
        nothing = os.open(os.devnull, os.O_RDONLY)
        for place, descriptor in enumerate([nothing, *said]):
            os.dup2(descriptor, place)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        sys.path.insert(0, "")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(environment)
        os.chdir(cwd)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
