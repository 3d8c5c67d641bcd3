"""Attacks that the sandbox runs against itself at the start: a level is only claimed if all of them fail."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.core.sandbox.slot import Slot

CODE = """
import os

def system_call(name, *arguments):
    import ctypes
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def read(path): open(path).read()
def write(path): open(path, "w").write("x")
def list_folder(path): os.listdir(path)
def connect(port):
    import socket
    socket.create_connection(("127.0.0.1", port), 2)
def signal_process(pid): os.kill(pid, 0)
def signal_all(_): os.kill(-1, 0)
def start_process(_): os.fork()
def execute(path): os.execv(path, [path])
def trace(pid): system_call("ptrace", 16, pid, 0, 0)
def make_namespace(_): system_call("unshare", 0x10000000)

def attempt(name, argument):
    try:
        globals()[name](argument)
    except Exception:
        return False
    return True

def environment():
    return sorted(os.environ)
"""


@contextlib.contextmanager
def attacks() -> Iterator[list[tuple[str, Any]]]:
    """The attacks, as functions of `CODE` and their arguments; what they aim at is there meanwhile: a file
    of the user's and a listening socket."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(socket.socket()) as listener:
        canary = Path(folder) / "canary"
        canary.write_text("secret")
        canary.chmod(0o600)
        shared = Path(f"/dev/shm/align-sandbox-canary-{os.getpid()}")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        try:
            yield [
                ("read", str(canary)),
                ("write", str(canary)),
                ("write", str(shared)),
                ("list_folder", folder),
                ("connect", listener.getsockname()[1]),
                *([("signal_process", os.getpid())] if os.getpid() != 1 else []),  # which inside is the process itself
                ("signal_all", 0),
                ("start_process", 0),
                ("execute", "/bin/true"),
                ("trace", os.getpid()),
                ("make_namespace", 0),
            ]
        finally:
            shared.unlink(missing_ok=True)  # there only if that attack succeeded


def described(attempts: Sequence[tuple[str, Any]], outcomes: Sequence[bool]) -> list[str]:
    """Those that succeeded, for a person."""
    return [f"{name}({argument!r})" for (name, argument), done in zip(attempts, outcomes, strict=True) if done]


def foreign(environment: Sequence[str]) -> list[str]:
    """What of the user's environment got in, for a person."""
    kept = {"LANG", "HOME", "PATH", "PYTHONHASHSEED", "LC_CTYPE"}
    return [f"environment has {name}" for name in sorted(set(environment) - kept)]


def successful_attacks(slot: Slot) -> list[str]:
    """The attacks that got through.

    Raises:
        Trouble: the slot can't run anything.
    """
    with attacks() as attempts:
        answers = slot.call(CODE, [*(("attempt", a, {}) for a in attempts), ("environment", (), {})])
    if len(answers.values) != len(attempts) + 1:
        return [f"the probe did not finish ({answers.raised or answers.ended or answers.timeout})"]
    *outcomes, environment = answers.values
    return described(attempts, outcomes) + foreign(environment)
