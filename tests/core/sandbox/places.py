"""Where the tests of the sandbox run: at each level that this machine reaches, as root and as an ordinary user."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.core.sandbox import Limits, Slot, Trouble
from align.core.sandbox.attacks import successful_attacks

ROOT = Path(__file__).resolve().parents[3]


def slot_or_skip(level: int, limits: Limits | None = None) -> Slot:
    """A slot at a level whose probe succeeds here."""
    slot = Slot(level, limits or Limits(cpu_s=2, wall_s=10))
    try:
        problems = successful_attacks(slot) if level else []
    except Trouble as trouble:
        slot.close()
        pytest.skip(f"level {level} can't be reached on this machine: {trouble}")
    assert problems == []
    return slot


def run_python(code: str, *, as_nobody: bool = False, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter that can import the project; perhaps as the user 65534."""
    become = f"from {__name__} import become_nobody\nbecome_nobody()\n" if as_nobody else ""
    return subprocess.run(
        [sys.executable, "-c", become + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def become_nobody() -> None:
    """From root to user 65534, with the interpreter still in reach: where it lies in a folder that only root may enter,
    this process gets a mount namespace of its own in which that folder shows nothing but the interpreter."""
    prefix = Path(sys.base_prefix)
    closed = [p for p in reversed(prefix.parents) if not p.stat().st_mode & 1]
    if closed:
        libc = ctypes.CDLL(None, use_errno=True)

        def attempt(result: int) -> None:
            if result != 0:
                raise OSError(ctypes.get_errno(), "mount")

        attempt(libc.unshare(0x20000))
        attempt(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x4000 | 1 << 18), None))
        held = os.open(prefix, os.O_PATH)
        attempt(libc.mount(b"tmpfs", str(closed[0]).encode(), b"tmpfs", ctypes.c_ulong(0), b"mode=755"))
        prefix.mkdir(parents=True)
        attempt(libc.mount(f"/proc/self/fd/{held}".encode(), str(prefix).encode(), None, ctypes.c_ulong(0x5000), None))
        os.close(held)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
