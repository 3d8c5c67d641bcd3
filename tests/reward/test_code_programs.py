"""Programs in other languages: right ones pass, wrong ones fail, and none reaches what it must not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.core.sandbox import Limits, Slot
from align.core.sandbox.inside import program_calls
from align.core.sandbox.programs import COMPILING, Ran, Workshop, in_workshop
from align.core.sandbox.toolchains import FINDERS, MissingToolchain, Toolchains, java_names
from reward.code_programs import FENCES
from reward.code_tests import CodeVerifier, _verify, extract_code
from tests.core.sandbox.places import ROOT, run_python, slot_or_skip
from tests.e2e.command import align, manifest
from tests.reward.programs import BROKEN, HUNGRY, INCLUDING, SPIES, SUM, WIDE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built for Linux")

LANGUAGES = tuple(FINDERS)
IO = [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "-4 10", "stdout": "6"}]


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    slot_or_skip(4).close()
    os.environ["ALIGN_CANARY"] = "secret"
    with CodeVerifier(1, cpu_s=1.0, wall_s=20.0, memory_mb=128) as made:
        yield made
    del os.environ["ALIGN_CANARY"]


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest, verifier: CodeVerifier) -> str:
    need(verifier, request.param)
    return str(request.param)


def runs(verifier: CodeVerifier, language: str, source: str, inputs: list[tuple[str, Limits]]) -> list[Ran]:
    """The program compiled once and run on each input, within limits."""

    def work(workshop: Workshop) -> list[Ran]:
        workshop.begin(source, inputs[0][1].memory_mb)
        compiled = workshop.compile(COMPILING)
        assert (compiled.ended, compiled.timeout) == ("", ""), compiled.errors.decode()
        return [workshop.run(text.encode(), limits) for text, limits in inputs]

    return verifier.sandbox.run(lambda slot: in_workshop(slot, verifier.toolchains.find(language), work))


def test_a_right_program_passes_and_a_wrong_answer_fails(verifier: CodeVerifier, language: str) -> None:
    reference = {"io": IO, "language": language}
    fence = FENCES[language][-1]
    assert verifier.verify(f"So:\n```{fence}\n{SUM[language]}```\nThat is it.", reference).detail == "2 inputs passed"
    wrong = verifier.verify(SUM[language].replace("a + b", "a - b").replace("sum::", "product::").replace(
        "in.nextLong() + ", "in.nextLong() - "), reference)  # fmt: skip
    assert wrong.verdict == "failed"
    assert wrong.detail in ("input 1: wrote '-1\\n', expected '5\\n'", "input 1: wrote '6\\n', expected '5\\n'")


@pytest.mark.parametrize(
    ("name", "source"),
    [("python", "print('\u6570' * 200_000)"), ("javascript", "console.log('\u6570'.repeat(200_000))")],
)
def test_a_long_output_of_wide_characters_is_compared_whole(verifier: CodeVerifier, name: str, source: str) -> None:
    """Three bytes each, 600,000 in all: more than twice the number of characters and 64 KiB."""
    if name != "python":
        need(verifier, name)
    for count, verdict in ((200_000, "passed"), (199_999, "failed")):
        io = [{"stdin": "", "stdout": "\u6570" * count}]
        assert verifier.verify(source, {"io": io, "language": name}).verdict == verdict


@pytest.mark.slow
def test_a_program_that_uses_much_of_its_language_runs(verifier: CodeVerifier, language: str) -> None:
    source, stdin, expected = WIDE[language]
    [ran] = runs(verifier, language, source, [(stdin, Limits(cpu_s=10.0, wall_s=60.0, memory_mb=256))])
    assert (ran.output.decode().rstrip("\n"), ran.ended) == (expected.rstrip("\n"), ""), ran.errors.decode()


def test_what_does_not_compile_is_told_with_the_compilers_first_message(verifier: CodeVerifier, language: str) -> None:
    source, message = BROKEN[language]
    found = verifier.verify(source, {"io": IO, "language": language})
    assert found.verdict == "failed"
    assert found.detail.startswith("does not compile: ")
    assert message in found.detail.replace("‘", "'").replace("’", "'")


ENDS = {"cpp": "killed by SIG", "java": "exit status 1", "javascript": "exit status 1", "go": "exit status 2",
        "rust": "exit status 101"}  # fmt: skip


@pytest.mark.slow
def test_limits_hold_and_every_run_ends(verifier: CodeVerifier, language: str) -> None:
    words = ("loop", "spin", "memory", "shared", "tables", "threads", "disk", "flood", "errors", "abort")
    what = [word for word in words if f'"{word}"' in HUNGRY[language]]
    limits = Limits(cpu_s=1.0, wall_s=60.0, memory_mb=128)
    inputs = [*((word, limits) for word in what), ("sleep", Limits(cpu_s=5.0, wall_s=1.0, memory_mb=128))]
    *ran, slept = runs(verifier, language, HUNGRY[language], inputs)
    found = dict(zip(what, ran, strict=True))
    assert slept.timeout == "1 s of time"
    for name in {"loop", "spin"} & found.keys():
        assert found[name].timeout == "1 s of CPU"
        assert found[name].cpu_s < 2.6  # the kernel looks once a second
    # C++ stops by itself between 64 and 192 MiB; the others stand on a runtime that says no or dies, at once
    assert (found["memory"].ended != "") == (language != "cpp")
    assert found["memory"].timeout == ""
    if language == "cpp":
        assert found["shared"].ended == "exit status 3"
        for name in ("memory", "tables", "disk"):
            assert (found[name].output, found[name].ended, found[name].timeout) == (b"1\n", "", ""), name
    if language in ("cpp", "java", "rust"):
        assert found["threads"].output.strip() in (b"1", b"true")
    else:
        assert found["threads"].ended or found["threads"].timeout
    for name in {"flood", "errors"} & found.keys():
        assert found[name].timeout in ("64 MiB of output", "1 s of CPU"), name
        assert len(found[name].output) + len(found[name].errors) <= 2 * 64 << 10
    assert found["abort"].ended.startswith(ENDS[language])


def test_nothing_of_the_user_the_system_or_the_network_is_reached(
    verifier: CodeVerifier, language: str, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    canary.write_text("secret")
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    canary.chmod(0o666)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.05)
        text = f"{canary} {listener.getsockname()[1]} {os.getpid()}\n"
        limits = Limits(cpu_s=5.0, wall_s=60.0, memory_mb=128)
        [ran] = runs(verifier, language, SPIES[language], [(text, limits)])
        assert (ran.output.decode(), ran.ended, ran.timeout) == ("done\n", "", ""), ran.errors
        with pytest.raises(TimeoutError):
            listener.accept()
    assert canary.read_text() == "secret"


def test_no_file_of_the_user_is_taken_in_when_a_program_is_compiled(
    verifier: CodeVerifier, language: str, tmp_path: Path
) -> None:
    canary = tmp_path / "canary.h"
    canary.write_text("/* SECRET-OF-THE-USER */ #error SECRET-OF-THE-USER\n")
    for path in (str(canary), "/etc/passwd", "/proc/self/environ"):
        for source in INCLUDING[language]:
            found = verifier.verify(
                source.format(path=path), {"io": [{"stdin": "", "stdout": ""}], "language": language}
            )
            assert found.verdict == "failed"
            assert found.detail.startswith("does not compile: ")
            assert "SECRET" not in found.detail and "root:" not in found.detail


@pytest.mark.slow
def test_a_compiler_that_takes_too_long_or_too_much_is_ended(verifier: CodeVerifier) -> None:
    """Each class template instantiates two others, 2^30 in all."""
    need(verifier, "cpp")
    source = (
        "template <int D, long N> struct F { static const int v = F<D - 1, 2 * N>::v + F<D - 1, 2 * N + 1>::v; };\n"
    )
    source += "template <long N> struct F<0, N> { static const int v = 1; };\nint main() { return F<30, 0>::v; }\n"

    def work(workshop: Workshop, limits: Limits) -> Ran:
        workshop.begin(source, 128)
        return workshop.compile(limits)

    cpp = verifier.toolchains.find("cpp")
    for limits, timeout in ((Limits(1, 60, 1024), "1 s of CPU"), (Limits(30, 60, 100), "")):
        ran = verifier.sandbox.run(lambda s, limits=limits: in_workshop(s, cpp, lambda w: work(w, limits)))  # type: ignore[misc]
        assert (ran.timeout, ran.ended != "") == (timeout, True)
        assert ran.cpu_s < 10


def need(verifier: CodeVerifier, language: str) -> None:
    try:
        verifier.toolchains.find(language)
    except MissingToolchain as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_the_header_of_all_headers_is_compiled_once_when_it_pays(
    verifier: CodeVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a program costs far less than the header did; by itself it would cost about half of that."""
    need(verifier, "cpp")
    monkeypatch.setattr("align.core.sandbox.toolchains.PCH_AFTER", 1)
    source = (
        "#include <bits/stdc++.h>\nint main() { std::vector<int> v{3, 2}; std::ranges::sort(v); std::cout << v[1]; }"
    )
    with Toolchains() as toolchains:
        workshop = Workshop(toolchains.find("cpp"))
        try:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            workshop.begin(source, 128)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            compiled = workshop.compile(COMPILING)
            output = workshop.run(b"", Limits(5, 60, 128)).output
        finally:
            workshop.close()
    assert (compiled.ended, output) == ("", b"3")
    assert compiled.cpu_s < (after.ru_utime - before.ru_utime) / 4


def test_a_workshop_that_is_killed_is_replaced_and_the_verdict_stands(verifier: CodeVerifier) -> None:
    need(verifier, "cpp")
    source = '#include <stdio.h>\n#include <unistd.h>\nint main() { usleep(400000); puts("5"); }'
    reference = {"io": [{"stdin": "", "stdout": "5"}], "language": "cpp"}
    verifier.verify(source, reference)
    slot = verifier.sandbox.run(lambda slot: slot)
    first = slot.zygotes["workshop cpp"].process
    killer = threading.Timer(0.2, first.kill)
    killer.start()
    assert verifier.verify(source, reference).verdict == "passed"
    killer.join()
    assert first.poll() is not None
    assert slot.zygotes["workshop cpp"].process.pid != first.pid
    assert descendants(first.pid) == []


def descendants(parent: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, todo = [], [parent]
    while todo:
        todo += children.get(pid := todo.pop(), [])
        found.append(pid)
    return found[1:]


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slot_or_skip(4).close()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mounts, null = Path("/proc/self/mounts").read_text(), Path("/dev/null").stat()
    before = set(descendants(os.getpid()))
    with CodeVerifier(2, cpu_s=1.0, wall_s=1.0) as verifier:
        need(verifier, "cpp")
        leaving = (
            '#include <stdio.h>\n#include <unistd.h>\nint main() { fopen("/tmp/left", "w"); if (fork()) sleep(9); }'
        )
        pairs = [(SUM["cpp"], {"io": IO, "language": "cpp"}), (leaving, {"io": IO, "language": "cpp"})] * 2
        found = [v.detail for v in verifier.verify_many(pairs)]
        assert found == ["2 inputs passed", "timeout: more than 1 s of time on input 1"] * 2
        assert len(set(descendants(os.getpid())) - before) >= 2 * 2 + 1
        assert list(tmp_path.iterdir()) != []
    assert set(descendants(os.getpid())) == before
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mounts").read_text() == mounts
    assert (Path("/dev/null").stat().st_mode, Path("/dev/null").stat().st_rdev) == (null.st_mode, null.st_rdev)


def test_a_killed_run_leaves_nothing_behind() -> None:
    slot_or_skip(4).close()
    code = """
from reward.code_tests import CodeVerifier
with CodeVerifier(1) as verifier:
    verifier.toolchains.find("cpp")
    print(verifier.toolchains._folder.path, flush=True)
    source = "#include <unistd.h>\\nint main() { sleep(99); }"
    verifier.verify(source, {"io": [{"stdin": "", "stdout": ""}], "language": "cpp"})
"""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    deadline, inside, seen = time.monotonic() + 60, list[int](), dict[int, float]()
    while time.monotonic() < deadline and not any(time.monotonic() - seen[p] > 1 for p in inside if p in seen):
        time.sleep(0.05)  # the trivial program, which runs before, is gone by then
        inside = descendants(process.pid)
        for pid in inside:
            if command(pid) == b"/build/program":
                seen.setdefault(pid, time.monotonic())
    assert any(command(pid) == b"/build/program" for pid in inside)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (folder.exists() or any(Path(f"/proc/{p}").exists() for p in inside)):
        time.sleep(0.05)
    assert not folder.exists()
    assert [p for p in inside if Path(f"/proc/{p}").exists()] == []


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
    except OSError:
        return b""


def test_a_missing_toolchain_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, language_name: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with CodeVerifier(1) as verifier:
        pairs = [(SUM[language_name], {"io": IO, "language": language_name}), ("print(5)", {"io": IO[:1]})]
        found, python = verifier.verify_many(pairs)
    assert (found.verdict, found.reward, python.verdict) == ("error", None, "passed")
    assert found.detail.startswith(f"language {language_name!r}: `")
    assert "install" in found.detail


def test_a_toolchain_that_does_not_work_is_an_error_and_not_held_against_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that always fails."""
    slot_or_skip(4).close()
    shutil.copy(shutil.which("false") or "/bin/false", tmp_path / "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    with CodeVerifier(1) as verifier:
        found = list(verifier.verify_many([(SUM["cpp"], {"io": IO, "language": "cpp"})] * 2))
    assert [v.verdict for v in found] == ["error", "error"]
    assert found[0].detail.startswith("language 'cpp': the toolchain (unknown) can't build and run a trivial program")


@pytest.fixture(params=LANGUAGES)
def language_name(request: pytest.FixtureRequest) -> str:
    slot_or_skip(4).close()
    return str(request.param)


def test_below_level_4_a_program_of_another_language_is_an_error_and_python_runs(verifier: CodeVerifier) -> None:
    slot = Slot(0, Limits())
    try:
        found = _verify(slot, SUM["cpp"], {"io": IO, "language": "cpp"}, verifier.toolchains)
        assert (found.verdict, found.reward) == ("error", None)
        assert "'cpp': its programs need level 4" in found.detail and "level 0" in found.detail
        assert _verify(slot, "print(5)", {"io": IO[:1], "language": "python"}).verdict == "passed"
    finally:
        slot.close()


@pytest.mark.parametrize(
    ("language", "told"),
    [("c++", "did you mean 'cpp'"), ("Java", "did you mean 'java'"), ("golang", "did you mean 'go'"),
     ("rusty", "did you mean 'rust'"), ("js", "did you mean 'javascript'"), (3, "'language' is a int")],
)  # fmt: skip
def test_an_unknown_language_is_an_error_with_the_nearest_one(verifier: CodeVerifier, language: Any, told: str) -> None:
    found = verifier.verify("x", {"io": IO, "language": language})
    assert (found.verdict, found.reward) == ("error", None)
    assert found.detail.startswith("reference: ") and told in found.detail


def test_the_last_block_of_the_language_is_taken() -> None:
    text = "```c++\nint a;\n```\n```python\nb = 1\n```\n```cpp\nint c;\n```\n```\nd\n```\n"
    assert extract_code(text, language="cpp") == "int c;\n"
    assert extract_code(text) == "b = 1\n"
    assert extract_code(text, language="go") == "d\n"
    assert extract_code("int main() {}", language="cpp") == "int main() {}"
    assert extract_code("```C++ main.cpp\nint a;\n```", language="cpp") == "int a;\n"


@pytest.mark.parametrize(
    ("source", "file", "main"),
    [
        ("public class A { public static void main(String[] a) {} }", "A.java", "A"),
        ("class B {} class A { public static void main(String[] a) {} } class C {}", "A.java", "A"),
        ("public class A {} class M { static class I {} public static void main(String... a) {} }", "A.java", "M"),
        ('// public class X\n/* public class Y { */ String s = "public class Z {"; class A { }', "A.java", "A"),
        ("package p.q;\npublic final class A { public static void main(String[] a) {} }", "A.java", "p.q.A"),
        ("public enum E { X; public static void main(String[] a) {} }", "E.java", "E"),
        ("int x", "Main.java", "Main"),
    ],
)
def test_a_java_file_is_named_as_its_public_class_and_the_class_with_main_is_started(
    source: str, file: str, main: str
) -> None:
    assert java_names(source) == (file, main)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
def test_an_ordinary_user_gets_the_same_isolation() -> None:
    """With the toolchains that this user can reach: those in root's home are not among them."""
    slot_or_skip(4).close()
    result = run_python(
        f"""
import os
from reward.code_tests import CodeVerifier
from tests.reward.programs import SPIES, SUM
assert os.getuid() == 65534
spied = [{{"stdin": f"/etc/passwd 9 {{os.getpid()}}", "stdout": "done"}}]
with CodeVerifier(1) as verifier:
    for language in ("cpp", "javascript"):
        print(verifier.verify(SUM[language], {{"io": {IO!r}, "language": language}}).detail)
        print(verifier.verify(SPIES[language], {{"io": spied, "language": language}}).detail)
""",
        as_nobody=True,
    )
    assert result.stderr == ""
    for line in result.stdout.splitlines():
        assert line in ("2 inputs passed", "1 inputs passed") or "install" in line
    assert len(result.stdout.splitlines()) == 4


def test_system_call_numbers_are_those_of_the_kernels_headers() -> None:
    headers = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
    for side, (machine, header) in enumerate(headers.items()):
        path = Path("/usr/include") / header
        if not path.exists():
            pytest.skip(f"{path} is not installed")
        numbers = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}
        ours = {**program_calls.MORE, **program_calls.FORKS, "mmap": program_calls.MMAP,
                "socketpair": program_calls.SOCKETPAIR}  # fmt: skip
        assert {n: c[side] for n, c in ours.items() if c[side] not in (None, numbers.get(n))} == {}
        assert len(program_calls.program(machine, forks=True)) % 8 == 0


def test_align_verify_takes_a_language_and_says_which_toolchain_ran(tmp_path: Path, verifier: CodeVerifier) -> None:
    need(verifier, "javascript")
    rows = [(SUM["javascript"], "javascript"), ("print(sum(map(int, input().split())))", None), (SUM["cpp"], "ada")]
    lines = []
    for text, language in rows:
        reference = {"io": IO, "language": language}
        lines.append({"task": "code", "prompt": "Add.", "completion": text, "reference": reference})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    align("verify", f"data={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'checked'}", "compile_cpu_s=9")
    summary = manifest(tmp_path / "checked").summary
    assert summary["verdicts"] == {"code": {"passed": 2, "error": 1}}
    assert list(summary["sandbox"]["toolchains"]) == ["javascript"]
