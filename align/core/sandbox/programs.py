"""Programs of compiled and other languages, seen from outside: built once in a workshop, then run once per input.

What a program writes is all that comes back; it is compared by whoever asked. Programs of Python run in `slot`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from align.core.sandbox.attacks import CODE, attacks, described, foreign
from align.core.sandbox.slot import KEPT_OUTPUT, MAX_OUTPUT, REPORT_TIMEOUT_S, Closed, Slot, _Drain
from align.core.sandbox.toolchains import MissingToolchain, Plan, Toolchain
from align.core.sandbox.zygotes import Child, Limits, Refusal, Trouble, Zygote

T = TypeVar("T")

LEVEL = 4
"""Programs that execute files need it: below, nothing hides the machine's files and ends what was started."""

COMPILING = Limits(cpu_s=30.0, wall_s=180.0, memory_mb=1024)
"""What compiling one program may use; memory for each of the compiler's processes."""

_COMPILERS_RESERVE_MB = 3072


@dataclass(frozen=True)
class Ran:
    """One run of a program, or of its compiler.

    Attributes:
        output: the beginning of what it wrote, and whether there was more (`cut`).
        errors: the beginning of what it wrote to its standard error.
        timeout: empty, or what ran out.
        ended: how it ended, unless with exit status 0.
        cpu_s: CPU seconds that it took.
    """

    output: bytes
    cut: bool
    errors: bytes
    timeout: str
    ended: str
    cpu_s: float


class Workshop(Zygote):
    """A toolchain in isolation.

    Raises:
        Refusal: it can't be isolated on this machine.
        Trouble: it did not start, or one of the attacks that it is tried by succeeded.
    """

    module = "workshop"

    def __init__(self, toolchain: Toolchain) -> None:
        shown = [path for path in dict.fromkeys(toolchain.shown) if os.path.exists(path)]  # noqa: PTH110
        super().__init__(LEVEL, json.dumps({"shown": shown}))
        self.toolchain = toolchain
        self.plan: Plan | None = None
        try:
            for compiles in (True, False):
                found = self._successful_attacks(compiles)
                if found:
                    raise Trouble(f"an attack succeeded: {found[0]}")
        except BaseException:
            self.close()
            raise

    def prove(self) -> None:
        """Find out whether the toolchain works here, if nobody has.

        Raises:
            MissingToolchain: it does not, and how that showed.
        """
        toolchain = self.toolchain
        with toolchain.proof.lock:
            if toolchain.proof.problem is None:
                limits = Limits(cpu_s=COMPILING.cpu_s, wall_s=COMPILING.wall_s, memory_mb=512)
                self.begin(toolchain.proof.program, limits.memory_mb)
                ran = self.compile(COMPILING)
                if not ran.ended:
                    ran = self.run(b"", limits)
                works = not ran.ended and ran.output == b"ok"
                said = (ran.errors or ran.output).decode("utf-8", "replace").strip()[:200]
                toolchain.proof.problem = "" if works else said or ran.timeout or ran.ended or "it writes nothing"
        if toolchain.proof.problem:
            raise MissingToolchain(
                f"language {toolchain.language!r}: the toolchain ({toolchain.version}) can't build and run a trivial "
                f"program in the sandbox: {toolchain.proof.problem}; install it anew, or another one"
            )

    def begin(self, source: str, memory_mb: int) -> None:
        """Take a program in; the one before is forgotten."""
        self.toolchain.ready(source)
        self.plan = self.toolchain.plan(source, memory_mb)
        with _sealed(source.encode("utf-8", "replace")) as file:
            self._send({"begin": self.plan.file}, [file])
        answer = self._answer(time.monotonic() + REPORT_TIMEOUT_S)
        if "begun" not in answer:
            raise Trouble(f"a program could not be taken in: {answer}")

    def compile(self, limits: Limits) -> Ran:
        """Compile it."""
        assert self.plan is not None
        data = limits.memory_mb << 20
        with _sealed(b"") as nothing:
            ran = self._step(self.plan.compile, nothing, limits, data, data + (_COMPILERS_RESERVE_MB << 20), True)
        # A compiler that starts others may end by itself when one of them is out of time.
        if ran.ended and not ran.timeout and ran.cpu_s >= limits.cpu_s:
            return Ran(ran.output, ran.cut, ran.errors, f"{limits.cpu_s:g} s of CPU", ran.ended, ran.cpu_s)
        return ran

    def run(self, stdin: bytes, limits: Limits, keep: int = KEPT_OUTPUT) -> Ran:
        """Run it on an input, and keep the first `keep` bytes that it writes."""
        assert self.plan is not None
        data = limits.memory_mb + self.toolchain.runtime_mb << 20
        with _sealed(stdin) as file:
            return self._step(self.plan.run, file, limits, data, data + (self.toolchain.reserved_mb << 20), False, keep)

    def finish(self) -> None:
        """Forget the program, and free what it takes."""
        self._send({"finish": True}, [])

    def _step(
        self, argv: Sequence[str], stdin: int, limits: Limits, data_bytes: int, address_bytes: int, compiles: bool,
        keep: int = KEPT_OUTPUT, attempts: Mapping[str, Any] | None = None,
    ) -> Ran:  # fmt: skip
        folder = "/build" if compiles else "/tmp"
        environment = {"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, **self.toolchain.environment}
        if self.plan and not compiles:
            environment.update(self.plan.environment)
        settings: dict[str, Any] = {
            "compiles": compiles, "cpu_s": limits.cpu_s, "data_bytes": data_bytes, "address_bytes": address_bytes,
            "argv": list(argv), "environment": environment,
        }  # fmt: skip
        if attempts:
            settings["attacks"] = attempts
        with contextlib.ExitStack() as stack:
            drains = []
            ends = []
            for kept in (keep, KEPT_OUTPUT):
                reading, writing = os.pipe()
                stack.callback(os.close, reading)
                drains.append(_Drain(reading, kept))
                ends.append(writing)
            try:
                self._send({"step": settings}, [stdin, *ends])
            finally:
                for writing in ends:
                    os.close(writing)
            output, errors = drains
            child, timeout = self._watch(drains, limits)
            if child.out_of_cpu(limits):
                timeout = timeout or f"{limits.cpu_s:g} s of CPU"
            if not timeout and child.killed_by_others():
                raise Trouble("a program was killed from outside, perhaps for want of memory on this machine")
            ended = "" if child.status == 0 else child.how()
            return Ran(bytes(output.kept), output.total > keep, bytes(errors.kept), timeout, ended, child.cpu_s)

    def _watch(self, drains: Sequence[_Drain], limits: Limits) -> tuple[Child, str]:
        """Read what a child writes until it has ended; it is killed when it runs out of time or writes too much."""
        child, timeout = Child(self), ""
        deadline = time.monotonic() + limits.wall_s
        poll = select.poll()
        for descriptor in (self.control.fileno(), *(d.descriptor for d in drains)):
            poll.register(descriptor, select.POLLIN)
        while child.status is None or any(d.open for d in drains):
            left = deadline - time.monotonic()
            if left <= 0 and child.killed:
                raise Trouble("the sandbox's interpreter does not answer")
            if left <= 0:
                timeout = f"{limits.wall_s:g} s of time"
            elif sum(d.total for d in drains) > MAX_OUTPUT and not child.killed:
                timeout = f"{MAX_OUTPUT >> 20} MiB of output"
            if timeout and not child.killed:
                child.killed = True
                self.kill()
                deadline = time.monotonic() + REPORT_TIMEOUT_S
                continue
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            for drain in drains:
                if drain.descriptor in ready:
                    drain.read()
                    if not drain.open:
                        poll.unregister(drain.descriptor)
            if self.control.fileno() in ready:
                answer = self._answer(deadline)
                if answer.get("refused"):
                    step, code = answer["refused"]
                    raise Trouble(f"a program could not be set up: {step}: {errno.errorcode.get(code, code)}")
                child.status, child.over, child.cpu_s = answer["ended"], answer["over"], answer["cpu_s"]
        return child, timeout

    def _successful_attacks(self, compiles: bool) -> list[str]:
        """The attacks that get through from where a compiler, or a program, stands."""
        limits = Limits(cpu_s=10, wall_s=60, memory_mb=512)
        with attacks() as attempts, _sealed(b"") as nothing:
            # compilers start others, and `execute` finds nothing to execute
            tried = [a for a in attempts if not (compiles and a[0] == "start_process")]
            job = {"code": CODE, "attempts": tried}
            ran = self._step((), nothing, limits, 1 << 30, 2 << 30, compiles, attempts=job)
        try:
            outcomes, environment = json.loads(ran.output)
        except ValueError:
            return [f"the probe did not finish ({ran.timeout or ran.ended}: {ran.errors[-300:]!r})"]
        return described(tried, outcomes) + foreign(environment)

    def _send(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        try:
            socket.send_fds(self.control, [json.dumps(request).encode() + b"\n"], list(descriptors))
        except OSError as error:
            raise Trouble(f"the sandbox's interpreter is gone: {error}") from None

    def _answer(self, deadline: float) -> dict[str, Any]:
        self.control.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            while (message := self.report()) is None:
                if not self.fill():
                    raise Trouble("the sandbox's interpreter is gone")
        except TimeoutError:
            raise Trouble("the sandbox's interpreter does not answer") from None
        return message


def in_workshop(slot: Slot, toolchain: Toolchain, work: Callable[[Workshop], T]) -> T:
    """Do work in a slot's workshop for a toolchain, which is started if need be; again in a new one if the
    machinery failed (`_tries`).

    Raises:
        MissingToolchain: the toolchain does not work here.
        Trouble: the machinery failed every time.
    """

    def once() -> T:
        name = f"workshop {toolchain.language}"
        workshop = slot.zygotes.get(name)
        if not isinstance(workshop, Workshop):
            try:
                workshop = slot.zygotes[name] = Workshop(toolchain)
            except Refusal as refusal:
                code = errno.errorcode.get(refusal.code, refusal.code)
                raise Trouble(f"it can't be set up for {toolchain.language}: {refusal.step}: {code}") from None
            if slot.closed:
                raise Closed("the sandbox is closed")
        try:
            workshop.prove()
            return work(workshop)
        finally:
            with contextlib.suppress(Trouble):
                workshop.finish()

    return slot._tries(once)


@contextlib.contextmanager
def _sealed(data: bytes) -> Iterator[int]:
    """A descriptor of a file in memory with this content, which nobody can change."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)
