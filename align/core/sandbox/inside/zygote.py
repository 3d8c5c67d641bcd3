"""The zygote: a small interpreter that isolates itself, then forks once per execution, and reaps.

It never sees a solution, a test or a value: those pass between its children and the broker over sockets of their own.
Protocol of the control socket, one JSON object a line: the zygote says `{"ready": …}` or `{"refused": …}` once; the
broker sends `{"spawn": limits}` with the child's descriptors, and perhaps `{"kill": true}`; the zygote answers each
spawn with `{"ended": status, "over": whether it used up its CPU time, "cpu_s": …, "refused": why the child could not be
confined, or null}`.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from align.core.sandbox.inside import Refused, isolation, runner
from align.core.sandbox.inside.codec import Channel, Descriptor

# What solutions import most, loaded once before the forks. Every page costs each fork a little, so not all there is.
WARM = (
    "abc", "array", "bisect", "cmath", "collections", "collections.abc", "copy", "datetime", "decimal", "fractions",
    "functools", "heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "struct",
    "sys", "threading", "time", "types", "typing", "warnings",
)  # fmt: skip


Check = Callable[[Channel, Channel, dict[str, Any]], None]


def main(control_fd: int, level: int, role: str) -> NoReturn:
    """Serve until the broker closes the control socket.

    Args:
        control_fd: its descriptor.
        level: of isolation.
        role: "runner" or "checker", what the children will be.
    """
    control = socket.socket(fileno=control_fd)
    check: Check | None = None
    if role == "checker":
        from align.core.sandbox.inside.checker import run as check
    for name in [n for n in sys.modules if n.split(".")[0] == "align"]:
        del sys.modules[name]
    warnings.simplefilter("ignore")
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # `site`, which isn't loaded, would define them
    for name in WARM:
        with contextlib.suppress(ImportError):
            __import__(name)
    os.environ.pop("LD_LIBRARY_PATH", None)  # the interpreter may have needed it to start
    os.environ.pop("PWD", None)  # set by bubblewrap
    in_use = isolation.memory_in_use()
    try:
        isolation.enter(level)
    except Refused as refused:
        _say(control, {"refused": [refused.step, refused.code]})
        os._exit(3)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    _practise()
    gc.collect()
    gc.freeze()
    _say(control, {"ready": os.getpid()})
    lines = b""
    child, refusal, cpu_limit, over = 0, -1, 0.0, False
    while True:
        descriptors: list[int] = []
        patience = None
        if child:
            patience = cpu_limit - cpu_used(child)
            if patience <= 0 and not over:
                over = True
                os.kill(child, signal.SIGKILL)
            patience = max(patience, 0.05)
        ready, _, _ = select.select([control, woken], [], [], patience)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(64)
        if control in ready:
            data, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
            if not data:
                if child:
                    os.kill(child, signal.SIGKILL)
                os._exit(0)
            lines += data
        while b"\n" in lines:
            line, lines = lines.split(b"\n", 1)
            request = json.loads(line)
            if "spawn" in request:
                child, refusal = _spawn(check, level, request["spawn"], in_use, descriptors)
                cpu_limit, over = request["spawn"]["cpu_s"], False
                for descriptor in descriptors:
                    os.close(descriptor)
            elif child:
                os.kill(child, signal.SIGKILL)
        if child:
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid:
                child = 0
                why = os.read(refusal, 4096).decode() or None
                os.close(refusal)
                used = usage.ru_utime + usage.ru_stime
                _say(control, {"ended": status, "over": over, "cpu_s": used, "refused": why})


def cpu_used(child: int) -> float:
    """The CPU seconds of a child that has not been reaped, exact where the system tells; the resource limit, which
    counts timer ticks and so errs on a busy machine, is the backstop."""
    try:
        return time.clock_gettime((~child << 3) | 2)  # CPUCLOCK_SCHED of a process, see clock_getcpuclockid(3)
    except OSError:
        return 0.0


def _practise() -> None:
    """Run a trivial solution a few times, so that the children share what that builds instead of each building it."""
    ours, theirs = socket.socketpair()
    job = {
        "setup": "",
        "code": "def f(x):\n    return x",
        "calls": [["f", [1], {"d": []}], ["f", [{"t": [1]}], {"d": []}]],
    }
    with ours, theirs:
        for _ in range(20):
            Channel(ours).send({"role": "call", **job})
            runner.call(Channel(Descriptor(theirs.fileno())), Channel(Descriptor(theirs.fileno())).receive())
            ours.recv(4096)
    del sys.modules["solution"]


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # the broker is gone, and so is the need to go on
        os._exit(0)


def _spawn(
    check: Check | None, level: int, limits: dict[str, Any], in_use: int, descriptors: list[int]
) -> tuple[int, int]:
    """A child, and where it says why it could not be confined: it closes that before it reads the program, which could
    otherwise pass its own failure off as the machine's."""
    reading, writing = os.pipe()
    pid = isolation.fork(level)
    if pid:
        os.close(writing)
        return pid, reading
    try:
        _child(check, level, limits, in_use, descriptors, writing)
    finally:
        os._exit(1)


def _child(
    check: Check | None, level: int, limits: dict[str, Any], in_use: int, descriptors: list[int], refusal: int
) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # 0 input, 1 output, 2 errors, 3 the broker, 4 the other child (in tests that use the solution's objects)
    first_free = max(limits["at"]) + 2
    wanted = dict(zip(limits["at"], descriptors, strict=True)) | {first_free - 1: refusal}
    high = {target: fcntl.fcntl(d, fcntl.F_DUPFD, first_free) for target, d in wanted.items()}
    null = os.open(os.devnull, os.O_RDWR)  # the one inside, whose mount is read-only
    for target in range(first_free):
        os.dup2(high.get(target, null), target, inheritable=False)
        if target >= 3:
            os.set_blocking(target, True)
    os.closerange(first_free, 1024)
    refusal = first_free - 1
    try:
        isolation.confine(level, limits["cpu_s"], in_use + limits["memory_bytes"])
    except Exception as error:
        os.write(refusal, (": ".join(map(str, error.args)) or repr(error)).encode())
        os._exit(3)
    os.close(refusal)
    channel = Channel(Descriptor(3))
    job = channel.receive()
    if job is None:
        os._exit(4)
    if check is not None:
        check(channel, Channel(Descriptor(4)), job)
    elif job["role"] == "serve":
        runner.serve(channel, job)
    elif job["role"] == "program":
        runner.program(channel, job)
    else:
        runner.call(channel, job)
    os._exit(0)
