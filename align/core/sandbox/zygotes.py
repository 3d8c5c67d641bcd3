"""A zygote seen from outside: a fresh interpreter that isolates itself, and the children that it forks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.sandbox import bubblewrap
from align.core.sandbox.inside import Refused

START_TIMEOUT_S = 60.0
MEND_TIMEOUT_S = 5.0

_BOOT = """
import sys, types
for name, path in {packages!r}:
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from align.core.sandbox.inside.{module} import main
main({control}, {level}, {role!r})
"""


@dataclass(frozen=True)
class Limits:
    """What one execution may use.

    Attributes:
        cpu_s: seconds of CPU time; what decides about a timeout.
        wall_s: seconds of the clock, the backstop for programs that sleep.
        memory_mb: address space beyond the interpreter's own, MiB.
    """

    cpu_s: float = 8.0
    wall_s: float = 32.0
    memory_mb: int = 512


class Trouble(Exception):  # noqa: N818
    """The machinery failed, whatever the solution: worth one more try."""


class Refusal(Exception):  # noqa: N818
    """A zygote could not isolate itself: the step and the errno."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(step, code)
        self.step, self.code = step, code


class Zygote:
    """A fresh interpreter that has isolated itself and forks once per execution.

    Raises:
        Refusal: it can't reach the level on this machine.
        Trouble: it did not start.
    """

    module = "zygote"

    def __init__(self, level: int, role: str = "runner") -> None:
        here = Path(__file__).resolve().parent
        stubs = [("align", here.parents[1]), ("align.core", here.parent), ("align.core.sandbox", here)]
        self.control, theirs = socket.socketpair()
        code = _BOOT.format(
            packages=[(n, str(p)) for n, p in stubs],
            module=self.module,
            control=theirs.fileno(),
            level=level,
            role=role,
        )
        environment = {"LANG": "C.UTF-8", "HOME": "/tmp", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # Not -I: it would drop the fixed hash seed, which makes verdicts repeatable; the environment is clean anyway.
        python, arguments = getattr(sys, "_base_executable", "") or sys.executable, ["-s", "-P", "-S", "-B", "-c", code]
        try:
            command = bubblewrap.command(python, arguments) if level == 3 else [python, *arguments]
        except Refused as refused:
            self.control.close()
            theirs.close()
            raise Refusal(refused.step, refused.code) from None
        with theirs:
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        self.lines = b""
        self.busy = False
        self.control.settimeout(START_TIMEOUT_S)
        try:
            while (message := self.report()) is None:
                if not self.fill():
                    said = self.process.communicate()[1].decode(errors="replace").strip()[-500:]
                    raise Trouble(f"the sandbox's interpreter did not start: {said}")
        except TimeoutError:
            self.close()
            raise Trouble(f"the sandbox's interpreter did not start within {START_TIMEOUT_S:g} s") from None
        except Trouble:
            self.close()
            raise
        if "refused" in message:
            self.close()
            raise Refusal(*message["refused"])

    def fill(self) -> bool:
        """Read what it said; False if it is gone."""
        try:
            data = self.control.recv(4096)
        except ConnectionError:
            data = b""
        self.lines += data
        return bool(data)

    def report(self) -> dict[str, Any] | None:
        """Its next message of those read."""
        if b"\n" not in self.lines:
            return None
        line, self.lines = self.lines.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        self.busy = self.busy and "ended" not in message
        return message

    def spawn(self, limits: Limits, descriptors: Mapping[int, int]) -> None:
        """Have it fork a child with these descriptors, `{its: ours}`; those below that are not given lead to its own
        `/dev/null`."""
        child = {"cpu_s": limits.cpu_s, "memory_bytes": limits.memory_mb << 20, "at": list(descriptors)}
        try:
            socket.send_fds(self.control, [json.dumps({"spawn": child}).encode() + b"\n"], list(descriptors.values()))
        except OSError as error:
            raise Trouble(f"the sandbox's interpreter is gone: {error}") from None
        self.busy = True

    def rid(self) -> bool:
        """Have its child ended, if it has one; whether it answers, and so can go on."""
        if self.process.poll() is not None:
            return False
        try:
            if self.busy:
                self.kill()
            while self.busy:
                self.control.settimeout(MEND_TIMEOUT_S)
                if not self.fill():
                    return False
                while self.report() is not None:
                    pass
            self.control.setblocking(False)
            return self.fill()  # only its end can be there to read
        except BlockingIOError:
            return True
        except OSError:
            return False

    def kill(self) -> None:
        """Have it kill its child."""
        with contextlib.suppress(OSError):
            self.control.sendall(b'{"kill": true}\n')

    def hang_up(self) -> None:
        """End the conversation, from any thread; the zygote and its child then end."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it and its child, and wait until they are gone."""
        self.hang_up()
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


@dataclass
class Child:
    """How one child ended."""

    zygote: Zygote
    status: int | None = None
    over: bool = False
    cpu_s: float = 0.0
    killed: bool = False
    refused: str = ""

    def how(self) -> str:
        """For a person: the exit status or the signal."""
        if self.status is None:
            return "it vanished"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
            return f"killed by {name}"
        return f"exit status {os.WEXITSTATUS(self.status)}"

    def out_of_cpu(self, limits: Limits) -> bool:
        """Whether it was ended for its CPU time."""
        return self.over or (self._sigkill() and self.cpu_s >= limits.cpu_s)

    def killed_by_others(self) -> bool:
        """Whether something that is neither the solution nor the sandbox ended it."""
        return self._sigkill() and not self.killed and not self.over

    def _sigkill(self) -> bool:
        status = self.status
        return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
