"""The sandbox's promises about harm: what a solution may reach, what stays behind, and how it says no."""

# ruff: noqa: E501

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core.errors import SandboxError
from align.core.sandbox import MECHANISM, Limits, Sandbox, Slot, Trouble
from align.core.sandbox.inside.codec import MAX_BYTES, MAX_DEPTH
from align.core.sandbox.inside.isolation import DESCRIPTORS, SCRATCH_BYTES, SCRATCH_FILES, THREADS
from align.core.sandbox.slot import KEPT_OUTPUT, LIGHT_HASHED, MAX_OUTPUT, TRIES
from align.core.sandbox.zygotes import Refusal, Zygote
from reward.code_tests import _verify
from reward.verifiers import Verifiers
from tests.core.sandbox.hostile import HOSTILE
from tests.core.sandbox.places import ROOT, run_python, slot_or_skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built for Linux")


@pytest.fixture(scope="module", params=[4, 3, 2], ids=["level 4", "level 3", "level 2"])
def slot(request: pytest.FixtureRequest) -> Iterator[Slot]:
    made = slot_or_skip(request.param)
    yield made
    made.close()


def outcome(slot: Slot, body: str) -> object:
    """What a function with this body returns inside, or the name of the exception that it raises."""
    code = "import os, socket\ndef f():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    answers = slot.call(code, [("f", (), {})])
    return answers.raised["type"] if answers.raised else answers.values[0] if answers.values else answers


def test_a_file_of_the_user_can_not_be_read_or_listed_or_changed(slot: Slot, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("secret")
    tmp_path.chmod(0o755)
    canary.chmod(0o666)
    errors = ("PermissionError", "FileNotFoundError")
    assert outcome(slot, f"return open({str(canary)!r}).read()") in errors
    assert outcome(slot, f"return os.listdir({str(tmp_path)!r})") in errors
    assert outcome(slot, f"open({str(canary)!r}, 'w').write('x')") in (*errors, "OSError")
    assert outcome(slot, f"os.remove({str(canary)!r})") in errors
    assert outcome(slot, f"os.truncate({str(canary)!r}, 0)") in errors
    assert outcome(slot, "return open('/etc/passwd').read()") in errors
    assert outcome(slot, "return os.listdir(os.path.expanduser('~root'))") in errors
    assert canary.read_text() == "secret"


def test_the_environment_is_clean(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CANARY", "secret")
    with Sandbox(1) as sandbox:
        found = sandbox.run(lambda s: outcome(s, "return sorted(os.environ)"))
    assert found == outcome(slot, "return sorted(os.environ)")
    assert set(found) <= {"LANG", "HOME", "PATH", "PYTHONHASHSEED", "LC_CTYPE"}  # type: ignore[call-overload]


def test_the_network_is_out_of_reach(slot: Slot) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.05)
        port = listener.getsockname()[1]
        assert outcome(slot, f"socket.create_connection(('127.0.0.1', {port}), 1)") == "PermissionError"
        assert outcome(slot, "socket.socketpair()") == "PermissionError"
        with pytest.raises(TimeoutError):
            listener.accept()


def test_no_other_process_can_be_signalled_or_traced_or_started(slot: Slot) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        for body in (
            f"os.kill({child.pid}, 9)",
            f"os.kill({os.getpid()}, 0)",
            "os.kill(-1, 9)",
            "os.kill(0, 9)",
            "os.kill(os.getppid(), 9)",
            "os.fork()",
            "os.execv('/bin/true', ['true'])",
            "import subprocess; subprocess.run(['/bin/true'])",
            "import multiprocessing; p = multiprocessing.get_context('fork').Process(); p.start()",
            "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, 1)",
            "import os; os.pidfd_open(1)",
        ):
            assert outcome(slot, body) in ("PermissionError", "ProcessLookupError", "OSError", "FileNotFoundError"), (
                body
            )
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_system_calls_that_change_privileges_are_refused(slot: Slot) -> None:
    for call in ("unshare(0x10000000)", "setns(3, 0)", "ptrace(16, 1, 0, 0)", "mount(0, 0, 0, 0, 0)", "chroot(b'/')",
                 "setuid(0)", "memfd_create(b'x', 0)", "syscall(425, 1, 0)", "syscall(321, 0, 0, 0)"):  # fmt: skip
        body = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nreturn [libc.{call}, ctypes.get_errno()]"
        assert outcome(slot, body) == [-1, 1], call


def test_threads_and_the_standard_library_work(slot: Slot) -> None:
    body = """
    import threading, sqlite3, lzma, zoneinfo, csv, concurrent.futures, numbers, hashlib, secrets, time, signal
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        squares = list(pool.map(lambda x: x * x, range(4)))
    signal.signal(signal.SIGALRM, lambda *_: squares.append('rung'))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.05)
    return squares + [hashlib.md5(b'').hexdigest()[:4], len(secrets.token_bytes(3))]
    """
    assert outcome(slot, body) == [0, 1, 4, 9, "rung", "d41d", 3]


def test_scratch_files_are_private_to_one_execution() -> None:
    slot = slot_or_skip(4)
    try:
        assert outcome(slot, "open('/tmp/a', 'w').write('x'); return os.listdir('/tmp')") == ["a"]
        assert outcome(slot, "return os.listdir('/tmp')") == []
        assert outcome(slot, "open('/a', 'w')") in ("OSError", "PermissionError")
        assert outcome(slot, "return sorted(os.listdir('/dev'))") == ["null", "urandom", "zero"]
        root = outcome(slot, "return os.listdir('/')")
        assert isinstance(root, list)
        assert not {"proc", "sys", "etc", "home", "run", "var", "boot"} & set(root)
        assert outcome(slot, "return [os.getpid(), os.getuid()]") == [1, 65534]
        site = "import sysconfig\nd = sysconfig.get_path('stdlib') + '/site-packages'\nreturn os.path.isdir(d) and os.listdir(d) or []"
        assert outcome(slot, site) == []
    finally:
        slot.close()


def test_limits_hold_inside(slot: Slot) -> None:
    slot.call("def f(): pass", [("f", (), {})])
    limits = outcome(
        slot, "import resource as r\nreturn [r.getrlimit(w) for w in (r.RLIMIT_CPU, r.RLIMIT_NOFILE, r.RLIMIT_CORE)]"
    )
    assert limits == [(4, 4), (64, 64), (0, 0)]
    raised = outcome(slot, "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (9, 9))")
    assert raised in ("ValueError", "PermissionError", "OSError")
    assert outcome(slot, "return len(bytearray(1 << 31))") == "MemoryError"


def test_a_hard_limit_that_is_there_already_is_kept(tmp_path: Path) -> None:
    """Asking for more than an existing hard limit would fail, and with it every execution."""
    slot_or_skip(4).close()
    result = run_python(
        """
import resource
from align.core.sandbox import Sandbox
for what, most in ((resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 40), (resource.RLIMIT_AS, 3 << 30)):
    resource.setrlimit(what, (most, most))
code = "import resource\\ndef f(): return [resource.getrlimit(w) for w in (1, 7)]"
with Sandbox(1, memory_mb=100_000) as sandbox:
    answers = sandbox.run(lambda slot: slot.call(code, [("f", (), {}), ("f", (), {})]))
    print(sandbox.level, answers.values[1])
"""
    )
    assert result.stderr == ""
    assert result.stdout.strip() == f"4 [({1 << 20}, {1 << 20}), (40, 40)]"


def test_the_limits_are_those_of_the_documents() -> None:
    page = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    assert (SCRATCH_BYTES, SCRATCH_FILES, DESCRIPTORS, THREADS) == (16 << 20, 4096, 64, 64)
    assert (KEPT_OUTPUT, MAX_OUTPUT, MAX_BYTES, MAX_DEPTH, LIGHT_HASHED, TRIES) == (
        64 << 10,
        64 << 20,
        8 << 20,
        200,
        2000,
        3,
    )
    for said in ("16 MiB", "4,096 files", "64 descriptors", "64 threads", "64 KiB", "64 MiB", "8 MiB", "200 deep",
                 "2,000 hashed", "three times"):  # fmt: skip
        assert said in page, said


def test_the_documents_figures_are_the_benchmarks() -> None:
    page = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks" / "results" / "sandbox.json").read_text())
    assert dict(re.findall(r"^\| ([a-z][^|]*?) \| ([\d.]+) \|$", page, re.MULTILINE)) == {
        way: f"{cpu_ms:.1f}" for way, cpu_ms in measured["cpu_ms"].items()
    }
    assert measured["date"][:10] in page
    assert f"The {len(HOSTILE)} hostile programs" in page
    for level, mechanism in MECHANISM.items():
        assert f"| {level} | " in page, mechanism


def test_output_is_kept_up_to_a_limit_and_a_flood_is_ended() -> None:
    slot = slot_or_skip(4)
    try:
        output = slot.program("print('x' * 200_000)", b"", keep=1000)
        assert (output.text, output.cut, output.ended) == (b"x" * 1000, True, "")
        flood = slot.program("while True: print('x' * 100_000)", b"")
        assert flood.timeout
        assert slot.program("import sys; print(sys.stdin.read()[::-1])", b"abc").text == b"cba\n"
    finally:
        slot.close()


def test_results_come_in_order_while_slow_items_hold_one_worker_only() -> None:
    with Sandbox(2, cpu_s=2) as sandbox:
        code = "import time\ndef f(x):\n    time.sleep(x)\n    return x"
        delays = [0.3, 0, 0.01, 0, 0, 0.1, 0]
        drawn = []

        def items() -> Iterator[float]:
            for delay in delays * 3:
                drawn.append(delay)
                yield delay

        results = sandbox.map(lambda s, x: s.call(code, [("f", (x,), {})]).values, items(), ahead=4)
        assert next(results) == [0.3]
        assert len(drawn) <= 5
        assert list(results) == [[x] for x in (delays * 3)[1:]]


def test_a_killed_zygote_is_replaced_and_the_execution_repeated() -> None:
    slot = slot_or_skip(4, Limits(cpu_s=5, wall_s=20))
    try:
        code = "import time\ndef f():\n    time.sleep(0.3)\n    return 1"
        threading.Timer(0.1, slot.zygotes["runner"].process.kill).start()
        assert slot.call(code, [("f", (), {})]).values == [1]
    finally:
        slot.close()


def test_nine_kills_of_workers_among_250_executions_cost_no_verdict_and_no_two_seconds() -> None:
    """Zygotes, what runs in their namespaces, and executions themselves are killed from outside, at uneven times."""
    slot_or_skip(4).close()
    tests = [{"tests": ["assert f(3) == 9", "assert f(4) == 16"]}, {"tests": ["y = f(3)\nassert y == 9"]}]
    programs = [
        "def f(x): return x * x",
        "def f(x): return x + x",
        "import time\ntime.sleep(0.02)\ndef f(x): return x * x",
    ]
    work = [(programs[i % 3], tests[i % 2]) for i in range(250)]
    chosen = random.Random(0)
    killed = 0

    def timed(slot: Slot, item: tuple[str, dict[str, list[str]]]) -> tuple[str, float]:
        began = time.monotonic()
        return _verify(slot, *item).verdict, time.monotonic() - began

    with Sandbox(2) as sandbox:
        found = []
        for number, outcome_ in enumerate(sandbox.map(timed, work, ahead=8)):
            found.append(outcome_)
            if number % 25 == 12 and killed < 9:
                running = sandbox_processes()
                while running:
                    pid = running.pop(chosen.randrange(len(running)))
                    with contextlib.suppress(ProcessLookupError):  # an execution that has ended meanwhile
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                        break
        journal = sandbox.report["journal"]
    assert killed == 9
    assert [verdict for verdict, _ in found] == ["failed" if i % 3 == 1 else "passed" for i in range(250)]
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others at work here slow every start of a worker
    assert max(seconds for _, seconds in found) < 2 * busy
    assert (journal["executions"], journal["given_up"]) == (250, 0)
    assert 1 <= journal["repeated"] <= 9
    assert journal["troubles"]


def test_an_execution_that_can_not_be_confined_is_the_machines_failure_and_says_why() -> None:
    slot_or_skip(4).close()
    slot = Slot(4, Limits(memory_mb=1 << 60))  # more than the limit can be told
    try:
        for ask in (
            lambda: slot.call("def f(): pass", [("f", (), {})]),
            lambda: slot.check("def f(): pass", ["f()"]),
            lambda: slot.program("print(1)", b""),
        ):
            with pytest.raises(Trouble, match=r"could not be set up: .*int too"):
                ask()
        assert slot.journal.given_up == 3
        assert slot.journal.repeated == 3 * 2
        assert slot.journal.replaced == 0
    finally:
        slot.close()


def test_nothing_is_left_behind() -> None:
    running = set(sandbox_processes())
    before = (Path("/proc/self/mountinfo").read_text(), _names("/tmp"), _names("/proc/self/fd"))
    with Sandbox(2, cpu_s=1) as sandbox:
        pids = [str(s.zygotes[n].process.pid) for s in sandbox._slots for n in s.zygotes]
        code = "import threading, time\ndef f():\n    open('/tmp/left', 'w')\n    threading.Thread(target=time.sleep, args=(99,)).start()"
        list(sandbox.map(lambda s, _: s.check(code, ["f()"]), range(4)))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and set(sandbox_processes()) - running:
        time.sleep(0.05)
    assert set(sandbox_processes()) == running
    assert not any(Path("/proc", pid).exists() for pid in pids)
    after = (Path("/proc/self/mountinfo").read_text(), _names("/tmp"), _names("/proc/self/fd"))
    assert after[0] == before[0]
    assert not {name for name in after[1] - before[1] if name == "left"}
    assert after[2] == before[2]


def _names(folder: str) -> set[str]:
    return {p.name for p in Path(folder).iterdir()}


def sandbox_processes(parent: int | None = None) -> list[int]:
    """The processes that this one, or another, started as zygotes, and their children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(status[1]), []).append(int(entry.name))
    found, todo = [], [parent or os.getpid()]
    while todo:
        pid = todo.pop()
        for child in children.get(pid, []):
            todo.append(child)
            try:
                command = Path("/proc", str(child), "cmdline").read_bytes()
            except OSError:
                continue
            if b"align.core.sandbox.inside.zygote" in command:
                found.append(child)
    return found


LOOPS = """
import sys
from align.core.sandbox import Sandbox
with Sandbox(2, cpu_s=30, levels=(int(sys.argv[1]),)) as sandbox:
    print("started", flush=True)
    list(sandbox.map(lambda s, _: s.call("import time\\ndef f(): time.sleep(99)", [("f", (), {})]), range(4)))
"""


@pytest.mark.parametrize(
    ("number", "level"), [(signal.SIGINT, 4), (signal.SIGKILL, 4), (signal.SIGKILL, 3), (signal.SIGKILL, 2)]
)
def test_an_interrupted_or_killed_run_ends_its_executions(number: int, level: int) -> None:
    slot_or_skip(level).close()
    process = subprocess.Popen(
        [sys.executable, "-c", LOOPS, str(level)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    time.sleep(0.5)
    inside = sandbox_processes(process.pid)
    assert len(inside) >= 3
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    if number == signal.SIGINT:
        assert errors.decode().strip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(_runs(pid) for pid in inside):
        time.sleep(0.05)
    assert not [pid for pid in inside if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return b"align.core.sandbox" in Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return False


def test_what_keeps_the_level_low_is_told_at_the_start_and_kept_for_the_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("align.core.sandbox._probe", lambda slot: ["clone: EPERM"] if slot.level > 1 else [])
    said: list[str] = []
    with Verifiers({"workers": 2, "accept": "allow_degraded"}, said.append) as verifiers:
        assert (said, verifiers.sandbox_level, verifiers.sandbox_report) == ([], None, None)
        verdict = verifiers.verify("code", "def f(x): return x", {"tests": ["assert f(1) == 1"]})
        report = verifiers.sandbox_report
        assert verifiers.sandbox_level == 1
    assert report is not None
    assert verdict.verdict == ("passed" if os.geteuid() == 0 else "error")
    assert said[0] == "sandbox: level 1 (another user id and seccomp), 2 workers"
    assert said[1:4] == [f"sandbox: not reached: level {n}: clone: EPERM" for n in (4, 3, 2)]
    assert said[4] == "sandbox: unprotected: files that every user may read can be read"
    assert "user.max_user_namespaces" in said[-1]
    assert report["failed_probes"] == [f"level {n}: clone: EPERM" for n in (4, 3, 2)]
    assert report["remedy"] in said[-1]
    assert report["unprotected"][0] == "files that every user may read can be read"


def test_closing_twice_or_using_it_closed_is_said_clearly() -> None:
    sandbox = Sandbox(1)
    with pytest.raises(SandboxError, match="used before"):
        sandbox.run(lambda s: None)
    with sandbox:
        assert sandbox.report["level"] == sandbox.level >= 2
    sandbox.close()
    with pytest.raises(SandboxError, match="after its end"):
        sandbox.run(lambda s: None)


def test_where_namespaces_and_landlock_are_missing_it_names_what_failed_and_the_remedy() -> None:
    """A user namespace in which no other may be made stands for a container that forbids them."""
    result = run_python(
        """
import ctypes, os
from align.core.sandbox import Sandbox, SandboxError
import align.core.sandbox.zygotes as slot

class NoLandlock(slot.Zygote):
    def __init__(self, level):
        if level == 2:
            raise slot.Refusal("Landlock ABI 6 (this kernel has 0)", 38)
        super().__init__(level)

import align.core.sandbox as package
package.Zygote = NoLandlock
libc = ctypes.CDLL(None, use_errno=True)
uid = os.getuid()
libc.prctl(4, 1, 0, 0, 0)
assert libc.unshare(0x10000000) == 0
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"1000 {uid} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
try:
    Sandbox(1).__enter__()
except SandboxError as error:
    print(error)
with Sandbox(1, accept="unsafe") as sandbox:
    print(sandbox.report)
    print(sandbox.run(lambda s: s.call("def f(x): return x + 1", [("f", (1,), {})])).values)
""",
        as_nobody=os.geteuid() == 0,
    )
    if "Permission" in result.stderr or "AssertionError" in result.stderr:
        pytest.skip("user namespaces can't be made or forbidden here: " + result.stderr[-200:])
    assert result.stderr == ""
    message, report, values = result.stdout.strip().rsplit("\n", 2)
    assert "level 4: unshare(user, mount, pid, ipc, net, uts, cgroup): ENOSPC" in message
    assert "level 2: Landlock ABI 6 (this kernel has 0): ENOSYS" in message
    assert "user.max_user_namespaces" in message
    assert "allow_degraded" in message
    assert "'level': 0" in report
    assert "the network" in report
    assert values == "[2]"


def test_level_1_needs_root_and_keeps_its_promises() -> None:
    if os.geteuid() != 0:
        with pytest.raises(Refusal, match="root"):
            Zygote(1)
        return
    slot = slot_or_skip(1)
    try:
        assert outcome(slot, "return os.getuid()") == 65534
        assert outcome(slot, "open('/tmp/align-canary', 'w')") == "PermissionError"
        assert outcome(slot, "socket.socket()") in ("PermissionError", "ModuleNotFoundError")
    finally:
        slot.close()
    assert not Path("/tmp/align-canary").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
def test_an_ordinary_user_gets_the_same_isolation() -> None:
    slot_or_skip(4).close()
    result = run_python(
        """
import os
from reward.code_tests import CodeVerifier
assert os.getuid() == 65534
with CodeVerifier(1) as verifier:
    print(verifier.report["level"])
    for code in ("def f(x): return x * x", "def f(x): return open('/etc/passwd').read()", "import os; os._exit(0)"):
        print(verifier.verify(code, {"tests": ["assert f(2) == 4"]}).verdict)
    print(verifier.verify("def f(x): return {x}", {"tests": ["y = f(2)", "assert y.pop() == 2"]}).verdict)
""",
        as_nobody=True,
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["4", "passed", "failed", "failed", "passed"]


def test_importing_it_starts_nothing_and_needs_no_system() -> None:
    result = run_python(
        "import sys\nsys.platform = 'darwin'\nimport align.core.sandbox, reward.code_tests\nprint('torch' in sys.modules)"
    )
    assert (result.stdout.strip(), result.stderr) == ("False", "")


def test_a_broken_interpreter_is_trouble_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.core.sandbox.zygotes._BOOT", "raise RuntimeError('no such thing')")
    with pytest.raises(Trouble, match="no such thing"):
        Zygote(4)
