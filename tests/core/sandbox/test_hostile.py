"""No hostile program passes, every verdict comes in time, the worker goes on, and nothing of the machine is touched."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from align.core.records import Verdict
from align.core.sandbox import Sandbox, Slot
from reward.code_tests import _verify
from tests.core.sandbox.hostile import HONEST, HONEST_PROGRAM, HOSTILE, IO, LITERAL, MARK, WAYS, Hostile
from tests.core.sandbox.places import slot_or_skip

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="isolation is built for Linux"), pytest.mark.slow]

CPU_S, WALL_S, IN_TIME_S = 0.3, 4.0, 15.0
SECRET = "the user's secret"


@dataclass
class Machine:
    """What the programs may try to reach, and how it was before."""

    folder: Path
    canary: Path
    listener: socket.socket
    abstract: socket.socket
    victim: subprocess.Popen[bytes]

    def fill(self, code: str) -> str:
        """The code with the real places."""
        for word, real in (
            ("CANARY", str(self.canary)), ("PORT", str(self.listener.getsockname()[1])), ("PID", str(self.victim.pid)),
            ("SOCKET", self.abstract.getsockname()[1:].decode()),
        ):  # fmt: skip
            code = code.replace(word, real)
        return code

    def state(self) -> dict[str, Any]:
        """All that must be the same afterwards."""
        found = self.canary.stat()
        null = Path("/dev/null").stat()
        moving = ("/dev/pts", "/dev/shm", "/dev/mqueue")  # other programs make and remove things there
        devices = {str(p): p.lstat() for p in Path("/dev").rglob("*") if not str(p).startswith(moving)}
        places = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/", str(Path.home()), str(Path.cwd()))
        return {
            "canary": (self.canary.read_bytes(), oct(found.st_mode), found.st_nlink, found.st_mtime_ns),
            "folder": sorted(p.name for p in self.folder.iterdir()),
            "mounts": Path("/proc/self/mountinfo").read_text(),
            "devices": {p: (s.st_mode, s.st_uid, s.st_gid, s.st_rdev) for p, s in devices.items()},
            "null": (null.st_ino, null.st_mtime_ns),
            "left": [str(p) for d in places if Path(d).is_dir() for p in Path(d).iterdir() if MARK in p.name],
            "open": len(list(Path("/proc/self/fd").iterdir())),
            "limits": os.sched_getaffinity(0),
            "name": platform.node(),
            "victim": self.victim.poll(),
        }


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    canary.chmod(0o666)
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        abstract.bind("")  # the kernel gives it an abstract name
        for each in (listener, abstract):
            each.listen()
            each.settimeout(0.01)
        with subprocess.Popen(["sleep", "600"]) as victim:
            yield Machine(tmp_path, canary, listener, abstract, victim)
            assert victim.poll() is None
            victim.kill()
        for each in (listener, abstract):
            with pytest.raises(TimeoutError):
                each.accept()


@pytest.fixture
def orphans_come_to_us() -> Iterator[None]:
    """Processes whose parents are gone become children of this one, so that none can be missed."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)
    yield
    libc.prctl(36, 0, 0, 0, 0)


def children() -> set[int]:
    """This process's children, and theirs."""
    found: set[int] = set()
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    todo = [os.getpid()]
    while todo:
        new = parents.get(todo.pop(), [])
        found.update(new)
        todo += new
    return found


def references(program: Hostile) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tests that a program is tried with, by name."""
    if program.reference is not None:
        yield "its own tests", program.reference
    for way in program.ways:
        yield way, WAYS[way]


def timed(slot: Slot, work: tuple[str, dict[str, Any]]) -> tuple[Verdict, float]:
    began = time.monotonic()
    return _verify(slot, *work), time.monotonic() - began


def attack(sandbox: Sandbox, machine: Machine, programs: Sequence[Hostile]) -> None:
    """Have all programs verified, an honest one after each, and look at everything."""
    tried = [(p, way, reference) for p in programs for way, reference in references(p)]
    work: list[tuple[str, dict[str, Any]]] = []
    for program, _, reference in tried:
        work.append((machine.fill(program.code), reference))
        work.append((HONEST_PROGRAM, IO) if "io" in reference else (HONEST, LITERAL))
    found = list(sandbox.map(timed, work))
    hostile = {f"{p.category}: {p.name} ({way})": v for (p, way, _), v in zip(tried, found[::2], strict=True)}
    assert {name: v for name, (v, _) in hostile.items() if v.verdict == "passed" or v.reward == 1} == {}
    assert {name: v for name, (v, _) in hostile.items() if SECRET in v.detail or not v.detail} == {}
    assert {name: v for name, (v, _) in hostile.items() if not v.detail.isprintable() or len(v.detail) > 400} == {}
    assert {name: v for name, (v, _) in hostile.items() if "please report" in v.detail} == {}
    assert {name: s for name, (_, s) in hostile.items() if s > IN_TIME_S} == {}
    honest = {name: v for name, (v, _) in zip(hostile, found[1::2], strict=True) if v.verdict != "passed"}
    assert honest == {}


def test_no_hostile_program_passes_or_harms_or_leaves_anything(
    machine: Machine, orphans_come_to_us: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot_or_skip(4).close()
    programs = [p for p in HOSTILE if platform.machine() == "x86_64" or "libc.syscall(" not in p.code]
    monkeypatch.setenv("ALIGN_SECRET", SECRET)
    before, running = machine.state(), children()
    os.utime(machine.canary, ns=(1, before["canary"][3]))  # a read would now set the time of the last access
    with Sandbox(4, levels=(4,), cpu_s=CPU_S, wall_s=WALL_S, memory_mb=256) as sandbox:
        attack(sandbox, machine, programs)
        ours = children() - running
        journal = sandbox.report["journal"]
    assert ours
    assert machine.canary.stat().st_atime_ns == 1
    deadline = time.monotonic() + 5
    while children() - running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() - running == set()
    assert not [pid for pid in ours if Path("/proc", str(pid)).exists()]
    assert machine.state() == before
    assert journal["given_up"] == 0
    assert journal["timeouts"] >= 15


# These would do harm in earnest where a level that has no root folder of its own had a fault.
DESTRUCTIVE = {
    "removes everything", "removes the temporary files", "replaces a device", "removes a device", "kills all",
    "closes a device to others", "closes its inherited files to others", "kills its group", "mounts", "unmounts",
    "makes its root writable", "fork bomb",
}  # fmt: skip
QUICK = {"files", "processes", "network", "encodings", "output", "forgery"}


@pytest.mark.parametrize("level", [3, 2, 1])
def test_nor_at_the_lower_levels(level: int, machine: Machine, orphans_come_to_us: None) -> None:
    """With literal asserts and programs, without those that only use up time; level 1 protects no file from reading."""
    if level == 3 and shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    slot_or_skip(level).close()
    if level == 1:
        machine.canary.chmod(0o600)
    inside_only = {"more than the scratch folder holds", "more files than there may be"}
    open_at = {
        3: set(),
        2: {"more threads than there may be"},
        1: {"more threads than there may be", "reads accounts", "imports installed packages", "imports our own code",
            "looks for the tests", "opens devices", "reaches an old root", "reads the environment of a process",
            "reads the memory of its parent", "reaches a root by a descriptor", "lists the folder of the user"},
    }[level]  # fmt: skip
    programs = [
        Hostile(p.category, p.name, p.code, p.ways[:1], p.reference)
        for p in HOSTILE
        if p.category in QUICK
        and p.name not in DESTRUCTIVE | inside_only | open_at
        and not any(word in p.code for word in ("while True", "threading"))
        and (platform.machine() == "x86_64" or "libc.syscall(" not in p.code)
    ]
    before, running = machine.state(), children()
    with Sandbox(2, accept="allow_degraded", levels=(level,), cpu_s=CPU_S, wall_s=WALL_S, memory_mb=256) as sandbox:
        assert sandbox.report["level"] == level
        attack(sandbox, machine, programs)
    deadline = time.monotonic() + 5
    while children() - running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() - running == set()
    assert machine.state() == before


def test_the_hostile_programs_are_of_every_kind_and_there_are_enough() -> None:
    kinds = Counter(p.category for p in HOSTILE)
    wanted = ("time", "memory", "files", "processes", "network", "output", "encodings", "forgery")
    assert set(kinds) == set(wanted)
    assert min(kinds.values()) >= 14
    assert len({(p.category, p.name) for p in HOSTILE}) == len(HOSTILE) >= 200
    assert {way for p in HOSTILE for way in p.ways} == set(WAYS)
