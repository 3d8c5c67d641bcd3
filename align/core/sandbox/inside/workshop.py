"""The workshop: a small interpreter that isolates itself with a toolchain, then has programs compiled and run.

It serves one program at a time. A compiler, and each run of the program, is a process in namespaces of its own that
dies with all its descendants; the program lies in a file system in memory that only its compiler can write to.

Protocol of the control socket, one JSON object a line: the workshop says `{"ready": …}` or `{"refused": …}` once. The
broker sends
    `{"begin": file}` with a descriptor of the source; answered by `{"begun": true}` or `{"refused": …}`
    `{"step": settings}` with the child's input, output and errors; answered by `{"ended": status, "over": whether it
    used up its CPU time, "cpu_s": …, "refused": why the child could not be confined, or null}`
    `{"kill": true}` perhaps, and `{"finish": true}`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from align.core.sandbox.inside import Refused, isolation, landlock, program_calls, seccomp
from align.core.sandbox.inside.isolation import _MS_NODEV, _MS_NOEXEC, _MS_NOSUID, _MS_RDONLY, _MS_REMOUNT, _mount
from align.core.sandbox.inside.zygote import cpu_used

BUILD = "/build"
BUILD_BYTES, BUILD_FILES = 256 << 20, 8192
DESCRIPTORS, PROCESSES, STACK_BYTES = 256, 192, 16 << 20


def main(control_fd: int, level: int, role: str) -> NoReturn:
    """Serve until the broker closes the control socket.

    Args:
        control_fd: its descriptor.
        level: of isolation; only 4 has what is needed.
        role: JSON, the files and folders to be `shown`.
    """
    control = socket.socket(fileno=control_fd)
    for name in [n for n in sys.modules if n.split(".")[0] == "align"]:
        del sys.modules[name]
    os.environ.pop("LD_LIBRARY_PATH", None)
    "x".encode("idna")  # attacks look for it where there is no library any more
    shown = [*isolation.outermost(json.loads(role)["shown"]), "/dev/null", "/dev/urandom"]
    try:
        if level != 4:
            raise Refused("level 4 for a program that is compiled", 95)
        isolation.enter(level, shown)
    except Refused as refused:
        _say(control, {"refused": [refused.step, refused.code]})
        os._exit(3)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    for forks in (True, False):  # made once for all children
        program_calls.program(platform.machine(), forks=forks)
    gc.collect()
    gc.freeze()
    _say(control, {"ready": os.getpid()})
    _Workshop(control, woken).serve()


class _Workshop:
    """What is under way: a build, and perhaps a step of it."""

    def __init__(self, control: socket.socket, woken: socket.socket) -> None:
        self.control, self.woken = control, woken
        self.mounted = self.sealed = False
        self.child, self.cpu_limit, self.over, self.refusal = 0, 0.0, False, -1

    def serve(self) -> NoReturn:
        lines, held = b"", list[int]()
        while True:
            patience = None
            if self.child:
                patience = self.cpu_limit - cpu_used(self.child)
                if patience <= 0 and not self.over:
                    self.over = True
                    os.kill(self.child, signal.SIGKILL)
                patience = max(patience, 0.05)
            ready, _, _ = select.select([self.control, self.woken], [], [], patience)
            if self.woken in ready:
                with contextlib.suppress(BlockingIOError):
                    self.woken.recv(64)
            if self.control in ready:
                data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
                if not data:
                    os._exit(0)  # as process 1 of the namespace, which ends everything in it
                lines += data
                held += descriptors
                while b"\n" in lines:
                    line, lines = lines.split(b"\n", 1)
                    self.take(json.loads(line), held)
                    while held:
                        os.close(held.pop())
            if self.child:
                pid, status, usage = os.wait4(self.child, os.WNOHANG)
                if pid:
                    self.tell_end(status, usage.ru_utime + usage.ru_stime)

    def take(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Do what the broker asks for."""
        if "begin" in request:
            try:
                self.begin(request["begin"], descriptors[0])
                _say(self.control, {"begun": True})
            except Refused as refused:
                _say(self.control, {"refused": [refused.step, refused.code]})
            except OSError as error:
                _say(self.control, {"refused": ["write the source", error.errno or 0]})
        elif "step" in request:
            self.step(request["step"], descriptors)
        elif "finish" in request:
            self.finish()
        elif self.child:
            os.kill(self.child, signal.SIGKILL)

    def begin(self, name: str, source: int) -> None:
        """A new file system with the source in it. No program has run in it yet, so it can be written to safely."""
        self.finish()
        options = f"size={BUILD_BYTES},nr_inodes={BUILD_FILES},mode=700"
        _mount("mount the build folder", "tmpfs", BUILD, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
        self.mounted = True
        with open(source, "rb", closefd=False) as given:
            Path(BUILD, name).write_bytes(given.read())

    def finish(self) -> None:
        """Forget the program."""
        if self.mounted:
            assert isolation.libc is not None
            isolation.libc.umount2(BUILD.encode(), 2)
        self.mounted = self.sealed = False

    def step(self, settings: dict[str, Any], descriptors: list[int]) -> None:
        """Start a child that compiles or runs."""
        if not settings["compiles"] and self.mounted and not self.sealed:
            flags = _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
            _mount("seal the build folder", "tmpfs", BUILD, "tmpfs", flags)
            self.sealed = True
        self.refusal, theirs = os.pipe2(os.O_CLOEXEC)
        self.cpu_limit, self.over = settings["cpu_s"], False
        self.child = isolation.fork(4)
        if self.child == 0:
            try:
                _child(settings, descriptors, theirs)
            finally:
                os._exit(1)
        os.close(theirs)

    def tell_end(self, status: int, cpu_s: float) -> None:
        """Report a child that has been reaped."""
        refused = os.read(self.refusal, 4096)
        os.close(self.refusal)
        self.child = 0
        why = json.loads(refused) if refused else None
        _say(self.control, {"ended": status, "over": self.over, "cpu_s": cpu_s, "refused": why})


def _child(settings: dict[str, Any], descriptors: list[int], refusal: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    for target, source in enumerate(descriptors):  # all above 2, so none is overwritten
        os.dup2(source, target)
    os.closerange(3, refusal)
    os.closerange(refusal + 1, 1024)
    try:
        _confine(settings)
        if "attacks" in settings:
            _attack(settings["attacks"])
        else:
            os.execve(settings["argv"][0], settings["argv"], settings["environment"])
    except Refused as refused:
        os.write(refusal, json.dumps([refused.step, refused.code]).encode())
    except OSError as error:
        os.write(refusal, json.dumps([f"execute {settings['argv'][0]}", error.errno or 0]).encode())
    os._exit(3)


def _confine(settings: dict[str, Any]) -> None:
    """The last steps of a child before it executes anything.

    Raises:
        Refused: the step and its errno.
    """
    libc = isolation.libc
    assert libc is not None
    os.setsid()
    compiles = settings["compiles"]
    if compiles:
        writable = BUILD
    else:
        writable = "/tmp"
        options = f"size={isolation.SCRATCH_BYTES},nr_inodes={isolation.SCRATCH_FILES},mode=700"
        _mount("mount the scratch folder", "tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir(writable)
    seconds = max(1, -int(-settings["cpu_s"] // 1))
    for what, wanted in (
        (resource.RLIMIT_CORE, 0),
        # of each process; for a run, which is one process, the workshop looks first
        (resource.RLIMIT_CPU, seconds + 1 if compiles else 2 * seconds),
        (resource.RLIMIT_FSIZE, BUILD_BYTES if compiles else isolation.SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_STACK, STACK_BYTES),
        *([(resource.RLIMIT_NPROC, PROCESSES)] if _counts_by_namespace() else []),
        (resource.RLIMIT_DATA, settings["data_bytes"]),
        (resource.RLIMIT_AS, settings["address_bytes"]),
    ):
        isolation._limit(what, wanted)
    isolation._try("no_new_privs", libc.prctl(isolation._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if landlock.abi(libc) >= landlock.ABI:
        landlock.restrict(libc, ["/"], [writable, "/dev/null"], execute=True)
    isolation._drop_capabilities(libc)
    try:
        seccomp.install(libc, program_calls.program(platform.machine(), forks=compiles))
    except OSError as error:
        raise Refused("seccomp filter", error.errno or 0) from None


def _counts_by_namespace() -> bool:
    """Whether the kernel counts a user's processes in this namespace alone, not all that the user has (Linux 5.14)."""
    return tuple(int(x) for x in os.uname().release.split(".")[:2] if x.isdigit()) >= (5, 14)


def _attack(attacks: dict[str, Any]) -> None:
    """Try attacks from where a program would stand, and write which of them succeeded."""
    namespace: dict[str, Any] = {}
    exec(attacks["code"], namespace)
    outcomes = [namespace["attempt"](name, argument) for name, argument in attacks["attempts"]]
    os.write(1, json.dumps([outcomes, namespace["environment"]()]).encode())
    os._exit(0)


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # the broker is gone, and so is the need to go on
        os._exit(0)
