"""The broker's side of the sandbox: slots that have executions done, and never believe what comes back."""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import IO, Any, TypeVar

from align.core.errors import SandboxError
from align.core.sandbox.inside.codec import MAX_BYTES, Channel, CodecError, Reader, TooHeavy, to_json
from align.core.sandbox.zygotes import START_TIMEOUT_S, Child, Limits, Refusal, Trouble, Zygote

T = TypeVar("T")

TRIES = 3
END_PATIENCE_S = 0.1
REPORT_TIMEOUT_S = 20.0
KEPT_OUTPUT, MAX_OUTPUT = 64 << 10, 64 << 20
# A value up to this size is rebuilt and compared in the broker; a larger one where it can be killed.
LIGHT_BYTES, LIGHT_TOTAL, LIGHT_HASHED = 1 << 20, 4 << 20, 2_000


class Closed(SandboxError):  # noqa: N818
    """The sandbox was closed while an execution was under way."""


@dataclass(frozen=True)
class Answers:
    """What a solution's functions gave back.

    Attributes:
        values: of the calls, in order, up to the first that gave none.
        raised: the exception that ended the calls, as plain data, and where ("setup", "code" or "call").
        missing: the function that does not exist.
        heavy: a value can't be rebuilt here (too large, or not plain data): the checker must look at it.
        timeout: empty, or what ran out.
        ended: how the process ended, if before its last answer.
    """

    values: list[Any]
    raised: Mapping[str, Any] | None = None
    where: str = ""
    missing: str = ""
    heavy: bool = False
    timeout: str = ""
    ended: str = ""


@dataclass(frozen=True)
class Checked:
    """What tests said: the checker's last frame, or what ran out, or how the checker ended."""

    frame: Mapping[str, Any]
    timeout: str = ""
    ended: str = ""


@dataclass(frozen=True)
class Output:
    """What a program wrote, up to the limit that was asked for."""

    text: bytes
    cut: bool
    raised: Mapping[str, Any] | None = None
    timeout: str = ""
    ended: str = ""


@dataclass
class Journal:
    """What became of the executions of one slot, so that nothing which was repeated or replaced goes unseen.

    Attributes:
        executions: that came to an end, whatever it was.
        timeouts: those of them that ran out of CPU time, time or output.
        repeated: tries that were lost because the machinery failed (a worker was killed), and made again.
        given_up: executions that got no result in `TRIES` tries.
        replaced: zygotes that were ended and replaced for it.
        troubles: how the machinery failed, the last few.
    """

    executions: int = 0
    timeouts: int = 0
    repeated: int = 0
    given_up: int = 0
    replaced: int = 0
    troubles: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    @staticmethod
    def sum(journals: Iterable[Journal]) -> dict[str, Any]:
        """All of them together, as plain data."""
        total: dict[str, Any] = {f.name: 0 for f in fields(Journal)} | {"troubles": []}
        for journal in journals:
            for name in total:
                total[name] += list(journal.troubles) if name == "troubles" else getattr(journal, name)
        return total | {"troubles": total["troubles"][-5:]}


class Slot:
    """One worker's zygotes: one for solutions, one for tests, started when first needed."""

    def __init__(self, level: int, limits: Limits) -> None:
        self.level = level
        self.limits = limits
        self.zygotes: dict[str, Zygote] = {}
        self.closed = False
        self.journal = Journal()

    def call(
        self, code: str, calls: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]], setup: str = ""
    ) -> Answers:
        """Run code, then call its functions on plain arguments.

        Args:
            code: the solution.
            calls: function name, positional and named arguments.
            setup: runs before the code, in the same namespace.

        Raises:
            Trouble: the machinery failed `TRIES` times.
            CodecError: an argument is too large to send.
        """
        packed = [[name, to_json(list(args)), to_json(dict(kwargs))] for name, args, kwargs in calls]
        job = {"role": "call", "code": code, "setup": setup, "calls": packed}

        def once() -> Answers:
            channel, theirs = self._pair(LIGHT_BYTES, LIGHT_TOTAL)
            with closing(channel):
                child = self._spawn("runner", theirs)
                self._send(channel, job)
                frames, timeout = self._listen(channel, [child], len(calls), ("end", "opaque", "unreadable"))
            last = frames[-1] if frames else {}
            try:
                reader = Reader(max_hashed=LIGHT_HASHED)
                values = [reader.value(f["value"]) for f in frames if "value" in f]
            except TooHeavy:
                return Answers([], heavy=True)
            except CodecError as error:
                return Answers([], ended=f"it sent {error}")
            if timeout:
                return Answers(values, timeout=timeout)
            if "raised" in last and isinstance(last["raised"], dict):
                return Answers(values, raised=last["raised"], where=str(last.get("in")))
            if "missing" in last:
                return Answers(values, missing=str(last["missing"]))
            if {"opaque", "unreadable", "heavy"} & last.keys():
                return Answers(values, heavy=True)
            if "breach" in last:
                return Answers(values, ended=f"it sent {last['breach']}")
            if last.get("end") == len(calls) == len(values):
                return Answers(values)
            return Answers(values, ended=child.how())

        return self._tries(once)

    def check(
        self, code: str, tests: Sequence[str], *, setup: str = "", setup_after: str = "", given: str = "",
        entry_point: str | None = None,
    ) -> Checked:  # fmt: skip
        """Run tests against a solution in two processes that share nothing.

        Args:
            code: the solution.
            tests: sources, each run in the tests' own namespace.
            setup: runs before the solution, and for its functions and imports also on the tests' side.
            setup_after: runs before the tests, on their side.
            given: a trusted beginning of the solution, whose helper functions the tests use instead of the solution's.
            entry_point: call the tests' function `check` with this function of the solution.

        Raises:
            Trouble: the machinery failed `TRIES` times.
            CodecError: the sources are too large to send.
        """
        solving = {"role": "serve", "code": code, "setup": setup}
        testing = {
            "code": code, "setup": setup, "setup_after": setup_after, "given": given,
            "tests": list(tests), "entry_point": entry_point,
        }  # fmt: skip

        def once() -> Checked:
            line, far = self._pair()
            channel, theirs = self._pair()
            with closing(line), closing(channel), far, theirs:
                runner = self._spawn("runner", far)
                self._send(line, solving)
                checker = self._spawn("checker", theirs, {4: line.fileno()})
                line.close()
                self._send(channel, testing)
                frames, timeout = self._listen(channel, [checker, runner], 1, ("passed", "failed", "opaque", "broken"))
            last = frames[-1] if frames else {}
            return Checked(last, timeout, "" if last else f"the tests' process: {checker.how()}")

        return self._tries(once)

    def program(self, code: str, stdin: bytes, keep: int = KEPT_OUTPUT) -> Output:
        """Run a program on standard input, and keep the first `keep` bytes that it writes.

        Raises:
            Trouble: the machinery failed `TRIES` times.
            CodecError: the source is too large to send.
        """
        job = {"role": "program", "code": code}

        def once() -> Output:
            channel, theirs = self._pair(LIGHT_BYTES)
            reading, writing = os.pipe()
            with closing(channel), theirs, os.fdopen(reading, "rb", 0):
                with os.fdopen(writing, "wb", 0), _input(stdin) as file:
                    child = self._spawn("runner", theirs, {0: file.fileno(), 1: writing})
                self._send(channel, job)
                output = _Drain(reading, keep)
                frames, timeout = self._listen(channel, [child], 1, (), output)
            last = frames[-1] if frames else {}
            raised = last.get("raised") if isinstance(last.get("raised"), dict) else None
            ended = "" if last.get("end") == 0 or raised else child.how()
            return Output(bytes(output.kept), output.total > keep, raised, timeout, ended)

        return self._tries(once)

    def hang_up(self) -> None:
        """Make an execution that is under way in another thread end."""
        self.closed = True
        for zygote in list(self.zygotes.values()):
            zygote.hang_up()

    def close(self) -> None:
        """End the zygotes; no execution may be under way."""
        self.hang_up()
        for zygote in self.zygotes.values():
            zygote.close()
        self.zygotes.clear()

    def _tries(self, once: Callable[[], T]) -> T:
        """Do it, and again where the machinery failed, `TRIES` times in all."""
        for left in reversed(range(TRIES)):
            if self.closed:
                raise Closed("the sandbox is closed")
            try:
                found = once()
                self.journal.executions += 1
                return found
            except Trouble as trouble:
                self._mend()
                if not self.closed:
                    self.journal.troubles.append(str(trouble))
                    self.journal.repeated += bool(left)
                    self.journal.given_up += not left
                if not left and not self.closed:
                    raise
            except BaseException:
                self._drop()
                raise
        raise Closed("the sandbox was closed during an execution")

    def _mend(self) -> None:
        """End what is left of an execution; zygotes that can't go on are ended too, and replaced when needed."""
        for name, zygote in list(self.zygotes.items()):
            if not zygote.rid():
                zygote.close()
                del self.zygotes[name]
                self.journal.replaced += 1

    def _drop(self) -> None:
        for zygote in self.zygotes.values():
            zygote.close()
        self.zygotes.clear()

    def zygote(self, name: str) -> Zygote:
        """The zygote of a role, started if need be."""
        if name not in self.zygotes:
            try:
                self.zygotes[name] = Zygote(self.level, name)
            except (Refusal, OSError) as error:
                raise Trouble(f"the sandbox can't be set up any more: {error}") from None
            if self.closed:
                self.zygotes[name].hang_up()
        return self.zygotes[name]

    def _pair(self, max_bytes: int = MAX_BYTES, max_total: int | None = None) -> tuple[Channel, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.settimeout(START_TIMEOUT_S)
        return Channel(ours, max_bytes, max_total), theirs

    def _spawn(self, name: str, theirs: socket.socket, others: Mapping[int, int] | None = None) -> Child:
        """A new child of a zygote, which takes over `theirs` as its 3; `others` are more descriptors for it."""
        with theirs:
            zygote = self.zygote(name)
            zygote.spawn(self.limits, {3: theirs.fileno(), **(others or {})})
        return Child(zygote)

    def _send(self, channel: Channel, job: Mapping[str, Any]) -> None:
        try:
            channel.send(job)
        except OSError as error:
            raise Trouble(f"an execution did not take its job: {error}") from None

    def _listen(
        self, channel: Channel, children: list[Child], most: int, final: tuple[str, ...], output: _Drain | None = None
    ) -> tuple[list[dict[str, Any]], str]:
        """Collect frames until the sender is done or out of time; then see that every child has ended.

        Returns:
            The frames, and what ran out, if anything. A frame that is malformed is `{"breach": why}`, one that is too
            large `{"heavy": true}`; they are the last.

        Raises:
            Trouble: a zygote is gone, or the child that sends could not be set up.
        """
        deadline = time.monotonic() + self.limits.wall_s
        frames: list[dict[str, Any]] = []
        timeout, open_ = "", True
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        for child in children:
            poll.register(child.zygote.control, select.POLLIN)
        if output:
            poll.register(output.descriptor, select.POLLIN)
        while open_ or (output and output.open):
            left = deadline - time.monotonic()
            if left <= 0:
                timeout = f"{self.limits.wall_s:g} s of time"
                break
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if output and output.descriptor in ready:
                output.read()
                if not output.open:
                    poll.unregister(output.descriptor)
                elif output.total > MAX_OUTPUT:
                    timeout = f"{MAX_OUTPUT >> 20} MiB of output"
                    break
            if channel.fileno() in ready and open_:
                open_ = channel.fill()
                for frame in _frames(channel):
                    frames.append(frame if len(frames) < most else {"breach": "more answers than there were questions"})
                    if any(word in frame for word in (*final, "breach", "heavy")) or len(frames) > most:
                        open_ = False
                        break
                if not open_:
                    poll.unregister(channel)
            for child in children:
                if child.zygote.control.fileno() in ready:
                    self._note(child)
                    if child.status is not None:
                        poll.unregister(child.zygote.control)
        self._finish(children, 0 if timeout else END_PATIENCE_S)
        for child in children:
            if child.refused:
                raise Trouble(f"an execution could not be set up: {child.refused}")
        done = bool(frames) and any(word in frames[-1] for word in final)
        if not done and any(child.out_of_cpu(self.limits) for child in children):
            timeout = f"{self.limits.cpu_s:g} s of CPU"
        if not done and not timeout and any(child.killed_by_others() for child in children):
            raise Trouble("an execution was killed from outside, perhaps for want of memory on this machine")
        self.journal.timeouts += bool(timeout)
        return frames, timeout

    def _note(self, child: Child) -> None:
        """Take what a zygote said about its child."""
        if not child.zygote.fill():
            raise Trouble("the sandbox's interpreter is gone")
        while (message := child.zygote.report()) is not None:
            child.status, child.over, child.cpu_s = message["ended"], message["over"], message["cpu_s"]
            child.refused = message["refused"] or ""

    def _finish(self, children: list[Child], patience_s: float) -> None:
        """See every child dead: none outlives its execution, but the first has a moment to end by itself."""
        deadline = time.monotonic() + REPORT_TIMEOUT_S
        for child in children:
            if child.status is None and child is children[0] and _readable(child.zygote.control, patience_s):
                self._note(child)
            if child.status is None:
                child.killed = True
                child.zygote.kill()
            while child.status is None:
                child.zygote.control.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    self._note(child)
                except TimeoutError:
                    raise Trouble("the sandbox's interpreter does not answer") from None


def _input(data: bytes) -> IO[bytes]:
    """A file with this content, which no program can change: in memory and sealed, where the system has that."""
    if sys.platform != "linux":
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    else:
        file = os.fdopen(os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(data)
    file.seek(0)
    if sys.platform == "linux":
        import fcntl

        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


class _Drain:
    """Reads a pipe to its end and keeps the beginning."""

    def __init__(self, descriptor: int, keep: int) -> None:
        self.descriptor = descriptor
        self.keep = keep
        self.kept = bytearray()
        self.total = 0
        self.open = True

    def read(self) -> None:
        data = os.read(self.descriptor, 1 << 16)
        self.open = bool(data)
        self.total += len(data)
        self.kept += data[: max(0, self.keep - len(self.kept))]


def _frames(channel: Channel) -> Iterator[dict[str, Any]]:
    """The frames that have arrived whole."""
    try:
        while (frame := channel.take()) is not None:
            yield frame
    except TooHeavy:
        yield {"heavy": True}
    except CodecError as error:
        yield {"breach": str(error)}


def _readable(end: socket.socket, patience_s: float) -> bool:
    """Whether something arrives in time; by `poll`, since a trainer may hold more descriptors than `select` takes."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))
