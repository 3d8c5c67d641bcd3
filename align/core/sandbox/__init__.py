"""Running code that a model wrote.

A `Sandbox` owns worker slots. In each, a fresh interpreter (never a fork of this process) isolates itself and forks
once per execution; solutions hand back plain values, and only this side, or tests in a process that the solution does
not share, say what they are worth. So no solution can make itself pass from inside.

| level | mechanism | accepted by |
|---|---|---|
| 4 | own user, mount, pid, network, ipc, uts and cgroup namespaces, and seccomp | "isolated" |
| 3 | the same namespaces, made by bubblewrap, and seccomp | "isolated" |
| 2 | Landlock (ABI 6 or later) and seccomp | "isolated" |
| 1 | seccomp and another user id (needs root) | "allow_degraded" |
| 0 | resource limits | "unsafe" |

The highest level that this machine reaches is found by trying, and then tried by attacks; `Sandbox.report` holds the
outcome.

At levels 4, 3 and 2 a solution can't reach the network, the user's files or environment, other processes, or anything
outside a scratch folder (levels 3 and 2 give no scratch folder), and nothing of it survives. Each execution has limits
of CPU time, time, memory, file size and threads, and can't start processes. `docs/sandbox.md` has the whole of it.

NOT stopped at any level: bugs of the kernel, timing channels, and tests that are vacuous, so that wrong code meets
them. A solution may read the interpreter's own library and the system's shared libraries.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from align.core.errors import SandboxError
from align.core.sandbox.attacks import successful_attacks
from align.core.sandbox.slot import Answers, Checked, Journal, Output, Slot
from align.core.sandbox.zygotes import Limits, Refusal, Trouble, Zygote

__all__ = ["Answers", "Checked", "Journal", "Limits", "Output", "Sandbox", "Slot", "Trouble"]

Accept = Literal["isolated", "allow_degraded", "unsafe"]
LOWEST: dict[Accept, int] = {"isolated": 2, "allow_degraded": 1, "unsafe": 0}

MECHANISM: dict[int, str] = {
    4: "namespaces of its own, and seccomp",
    3: "namespaces made by bubblewrap, and seccomp",
    2: "Landlock and seccomp",
    1: "another user id and seccomp",
    0: "resource limits alone, NO isolation",
}

UNPROTECTED: dict[int, tuple[str, ...]] = {
    4: (),
    3: (),
    2: ("file names and sizes outside the interpreter's library can be asked for (not read)", "the number of threads"),
    1: ("files that every user may read can be read", "file names and sizes can be asked for", "the number of threads"),
    0: (
        "the network", "every file that this user may read or write", "signals to this user's other processes",
        "processes that outlive their execution", "memory beyond one process's limit",
    ),
}  # fmt: skip

REMEDY = (
    "Level 4 needs unprivileged user namespaces: on Ubuntu 24.04 `sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0`, elsewhere `sysctl -w user.max_user_namespaces=10000`; a "
    "container has to run with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined` or "
    "`--privileged`. Level 3 needs the program bwrap (the package bubblewrap). Level 2 needs Linux 6.12 with "
    "Landlock (`lsm=landlock,…` on the kernel's command line). To run "
    'without isolation, at your own risk, set the sandbox to "allow_degraded" (level 1) or "unsafe" (level 0).'
)

T = TypeVar("T")
R = TypeVar("R")


class Sandbox:
    """Worker slots that run untrusted Python; a context manager.

    Args:
        workers: slots that run at the same time; None for the number of usable cores.
        accept: "isolated" refuses below level 2, "allow_degraded" below level 1, "unsafe" nothing.
        cpu_s: CPU seconds of one execution; more is a timeout.
        wall_s: seconds of the clock, the backstop for what sleeps; None for four times `cpu_s`.
        memory_mb: address space of one execution beyond the interpreter's own, MiB.
        levels: those that are tried, in order; fewer than all only in tests.

    Attributes:
        level: the isolation that was reached, 0-4.

    Raises:
        SandboxError: on entry, where this machine does not reach an accepted level.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        accept: Accept = "isolated",
        cpu_s: float = 8.0,
        wall_s: float | None = None,
        memory_mb: int = 512,
        levels: Sequence[int] = (4, 3, 2, 1, 0),
    ) -> None:
        self.workers = workers or _usable_cores()
        self.limits = Limits(cpu_s, wall_s or 4 * cpu_s, memory_mb)
        self.level = -1
        self._accept = accept
        self._levels = levels
        self._failed: list[str] = []
        self._slots: list[Slot] = []
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if sys.platform == "win32":
            raise SandboxError("sandbox: running untrusted code needs Linux, or macOS without isolation")
        self._failed = []
        for level in self._levels:
            if level < LOWEST[self._accept]:
                break
            slot = Slot(level, self.limits)
            try:
                problems = _probe(slot)
            except BaseException:
                slot.close()
                raise
            if not problems:
                self._start(level, slot)
                return self
            slot.close()
            self._failed += [f"level {level}: {p}" for p in problems]
        tried = "\n".join(f"  {f}" for f in self._failed)
        raise SandboxError(
            f"sandbox: this machine does not isolate untrusted code as {self._accept!r} asks (level "
            f"{LOWEST[self._accept]} or higher):\n{tried}\n{REMEDY}"
        )

    @property
    def report(self) -> dict[str, Any]:
        """The level, the failed probes with their remedy, what is unprotected, and the journal of the executions so far
        (see `Journal`); for manifests."""
        if self.level < 0:
            return {}
        return {
            "level": self.level,
            "mechanism": MECHANISM[self.level],
            "failed_probes": list(self._failed),
            "remedy": REMEDY if self._failed else "",
            "unprotected": list(UNPROTECTED[self.level]),
            "journal": Journal.sum(slot.journal for slot in self._slots),
        }

    def lines(self) -> list[str]:
        """What a person should know before untrusted code runs: the level, and what keeps it from being higher."""
        found = [f"sandbox: level {self.level} ({MECHANISM[self.level]}), {len(self._slots)} workers"]
        found += [f"sandbox: not reached: {why}" for why in self._failed]
        found += [f"sandbox: unprotected: {what}" for what in UNPROTECTED[self.level]]
        return [*found, f"sandbox: {REMEDY}"] if self._failed else found

    def _start(self, level: int, first: Slot) -> None:
        self.level = level
        first.journal = Journal()  # the probes are no executions
        self._slots = [first] + [Slot(level, self.limits) for _ in range(self.workers - 1)]
        for slot in reversed(self._slots):
            self._free.put(slot)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs; what is under way gets a `SandboxError`. May be called twice."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is None:
            return
        for slot in self._slots:
            slot.hang_up()
        pool.shutdown(wait=True, cancel_futures=True)
        for slot in self._slots:
            slot.close()

    def run(self, work: Callable[[Slot], R]) -> R:
        """Do one piece of work with a free slot."""
        if self._pool is None:
            raise SandboxError("sandbox: used before `with` or after its end")
        slot = self._free.get()
        try:
            return work(slot)
        finally:
            self._free.put(slot)

    def map(self, work: Callable[[Slot, T], R], items: Iterable[T], *, ahead: int = 256) -> Iterator[R]:
        """Results of `work(slot, item)`, in the order of the items, computed by all workers.

        Args:
            work: what to do with a slot and an item.
            items: read as they are needed, never more than `ahead` before the result that is due.
            ahead: how far the workers may run ahead of a slow item.
        """
        if self._pool is None:
            raise SandboxError("sandbox: used before `with` or after its end")
        pool = self._pool

        def one(item: T) -> R:
            return self.run(lambda slot: work(slot, item))

        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _probe(slot: Slot) -> list[str]:
    """What keeps a slot's level from holding on this machine; empty if it holds."""
    try:
        slot.zygotes["runner"] = Zygote(slot.level)
        return [f"an attack succeeded: {a}" for a in successful_attacks(slot)] if slot.level else []
    except Refusal as refusal:
        return [f"{refusal.step}: {errno.errorcode.get(refusal.code, refusal.code)} ({os.strerror(refusal.code)})"]
    except (Trouble, OSError) as error:
        return [str(error)]


def _usable_cores() -> int:
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
