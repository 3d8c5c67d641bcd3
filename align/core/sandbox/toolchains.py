"""The compilers and runtimes of this machine: what of them a program of a language needs, and how it is built and run.

A toolchain is found by asking it (`g++ -print-…`, `go env`, `rustc --print sysroot`), and only its own files are shown
to the programs, read-only. Python is not here: its programs run in the sandbox's interpreter (`slot`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from align.core.errors import SandboxError
from align.core.sandbox.inside.isolation import system_folders

BUILD = "/build"
"""Where a program is compiled, and lies while it runs: a file system in memory."""

PCH_AFTER = 4
"""From so many C++ programs on that include all of the standard library, a precompiled header pays for itself."""

_ALL_OF_CPP = re.compile(r"^\s*#\s*include\s*<bits/stdc\+\+\.h>", re.M)


class MissingToolchain(SandboxError):  # noqa: N818
    """This machine can't compile or run a language; the message says what to install."""


@dataclass(frozen=True)
class Plan:
    """How one program is built and run: its file's name, the commands, which start in `BUILD` and in `/tmp`, and
    variables for the second."""

    file: str
    compile: tuple[str, ...]
    run: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Proof:
    """Whether a toolchain works in the sandbox, found out once: by a trivial program, which writes "ok"."""

    program: str
    problem: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Toolchain:
    """One language's compiler and runtime on this machine.

    Attributes:
        language: its name in references.
        version: what the compiler or runtime says of itself, one line, for manifests.
        proof: that it works; a program that does not compile is only held against the program if it does.
        plan: from a program's source, and the memory in MiB that it may use, to its commands.
        shown: files and folders of this machine that its programs may read and execute.
        environment: variables, the same for compiling and running.
        runtime_mb: memory that the runtime itself may commit beyond the program's, MiB.
        reserved_mb: address space that the runtime reserves and does not use, MiB.
        ready: called with each source before it is built, perhaps to prepare something for all that follow.
    """

    language: str
    version: str
    proof: Proof
    plan: Callable[[str, int], Plan]
    shown: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    runtime_mb: int = 32
    reserved_mb: int = 256
    ready: Callable[[str], None] = lambda source: None


class Toolchains:
    """Finds toolchains when they are first asked for; a context manager, since two of them keep files meanwhile.

    Go's standard library and C++'s largest header are compiled once (from the toolchain's own files, never from a
    program) into a temporary folder that every program may read. It goes with this object, and with this process if
    that is killed.
    """

    def __init__(self) -> None:
        self._found: dict[str, Toolchain | MissingToolchain] = {}
        self._lock = threading.Lock()
        self._folder: _Folder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was prepared. May be called twice."""
        with self._lock:
            folder, self._folder = self._folder, None
            self._found.clear()
        if folder:
            folder.close()

    def find(self, language: str) -> Toolchain:
        """The toolchain of a language of `FINDERS`.

        Raises:
            MissingToolchain: it, or a part of it, is not on this machine.
        """
        with self._lock:
            if language not in self._found:
                try:
                    self._found[language] = FINDERS[language](self)
                except MissingToolchain as missing:
                    self._found[language] = missing
            found = self._found[language]
        if isinstance(found, MissingToolchain):
            raise found
        return found

    def versions(self) -> dict[str, str]:
        """The versions of those that were found, by language."""
        with self._lock:
            return {name: t.version for name, t in sorted(self._found.items()) if isinstance(t, Toolchain)}

    def folder(self, name: str) -> Path:
        """A new folder for what is prepared for a language."""
        if self._folder is None:
            self._folder = _Folder()
        path = self._folder.path / name
        path.mkdir()
        path.chmod(0o755)  # whatever the umask: programs run as another user
        return path


class _Folder:
    """A temporary folder that is removed at the end, by another process should this one be killed."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="align-toolchains-"))
        self.path.chmod(0o755)
        script = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
        self._remover = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", script, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._remover.communicate()


def _cpp(toolchains: Toolchains) -> Toolchain:
    compiler = _program("cpp", "g++", "a C++ compiler (for example `apt-get install g++`)")
    files, environment = _gcc(compiler, "c++")
    prepared = toolchains.folder("cpp")
    flags = (f"-I{prepared}", "-std=gnu++20", "-O2", "-w", "-fmax-errors=1")

    def plan(source: str, memory_mb: int) -> Plan:
        return Plan("main.cpp", (compiler, *flags, "main.cpp", "-o", "program"), (f"{BUILD}/program",))

    lock, seen = threading.Lock(), 0

    def ready(source: str) -> None:
        nonlocal seen
        if not _ALL_OF_CPP.search(source):
            return
        with lock:
            seen += 1
            due = seen == PCH_AFTER
        if due:
            header, made = prepared / "all.h", prepared / "made"
            header.write_text("#include <bits/stdc++.h>\n")
            command = [compiler, *flags, "-x", "c++-header", str(header), "-o", str(made)]
            # Without it all goes on as before, only slower.
            if subprocess.run(command, capture_output=True, cwd="/", env=_clean(environment)).returncode == 0:
                (prepared / "bits").mkdir()
                made.chmod(0o644)
                made.rename(prepared / "bits" / "stdc++.h.gch")

    proof = Proof('#include <iostream>\nint main() { std::cout << "ok"; }')
    return Toolchain(
        "cpp", _version(compiler, "--version"), proof, plan, (*files, str(prepared)), environment, ready=ready
    )


def _gcc(compiler: str, language: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """What GCC and its linker need to be seen, and the environment in which they find it."""

    def asked(*options: str) -> str:
        return _output([compiler, *options])

    tools = [t for name in ("as", "ld", "ld.bfd") if (t := shutil.which(asked(f"-print-prog-name={name}")))]
    said = subprocess.run(
        [compiler, "-E", "-v", "-x", language, os.devnull], capture_output=True, text=True, cwd="/", check=False
    ).stderr
    headers = re.findall(r"^ (/\S+)$", said.partition("search starts here")[2], re.M)
    names = ("crt1.o", "libc.so", "libstdc++.so", "libgcc_s.so")
    libraries = [str(Path(asked(f"-print-file-name={n}")).parent) for n in names]
    own = [str(Path(asked("-print-libgcc-file-name")).parent), str(Path(asked("-print-prog-name=cc1plus")).parent),
           str(Path(asked("-print-prog-name=collect2")).parent)]  # fmt: skip
    folders = [f for f in (*headers, *libraries, *own) if f.startswith("/")]
    path = ":".join(dict.fromkeys(str(Path(t).parent) for t in tools))
    return (compiler, *tools, *folders, *system_folders()), {"PATH": path}


def _java(toolchains: Toolchains) -> Toolchain:
    advice = "a JDK (for example `apt-get install openjdk-17-jdk-headless`)"
    home = Path(_program("java", "javac", advice)).parents[1]
    if not (home / "lib" / "modules").is_file() or not (home / "bin" / "java").is_file():
        raise MissingToolchain(f"language 'java': {home}, where `javac` lies, holds no whole JDK; install {advice}")
    shown = [str(home)]
    for folder, folders, files in os.walk(home):
        if Path(folder).name in ("legal", "man", "docs"):
            continue
        for name in (*folders, *files):  # distributions keep the settings elsewhere
            target = (Path(folder) / name).resolve()
            if (Path(folder) / name).is_symlink() and not target.is_relative_to(home) and target.is_file():
                shown.append(str(target))
    # What keeps the JVM small: one thread for collecting garbage, and no files of its own.
    quiet = ("-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:ActiveProcessorCount=1", "-XX:CompressedClassSpaceSize=64m",
             "-XX:ReservedCodeCacheSize=64m", "-Xlog:disable", "-Xlog:all=error:stderr")  # fmt: skip

    def plan(source: str, memory_mb: int) -> Plan:
        file, main = java_names(source)
        compiling = ("-Xmx512m", "-XX:TieredStopAtLevel=1", *quiet)
        compile_ = (str(home / "bin" / "javac"), *(f"-J{o}" for o in compiling), "-proc:none", "-nowarn",
                    "-encoding", "UTF-8", "-d", "classes", file)  # fmt: skip
        run = (str(home / "bin" / "java"), f"-Xmx{memory_mb}m", "-Xss16m", *quiet, "-XX:-CreateCoredumpOnCrash",
               "-XX:ErrorFile=/dev/null", "-Dfile.encoding=UTF-8", "-cp", f"{BUILD}/classes", main)  # fmt: skip
        return Plan(file, compile_, run)

    # LD_LIBRARY_PATH, since there is no /proc in which the launcher could look where it lies.
    environment = {"LD_LIBRARY_PATH": str(home / "lib"), "MALLOC_ARENA_MAX": "2"}
    proof = Proof('class Ok { public static void main(String[] a) { System.out.print("ok"); } }')
    return Toolchain(
        "java",
        _version(str(home / "bin" / "javac"), "-version"),
        proof,
        plan,
        (*shown, *system_folders()),
        environment,
        runtime_mb=384,
        reserved_mb=1024,
    )


def java_names(source: str) -> tuple[str, str]:
    """The name that the file of a Java program must have, and the class that is started: the one with `main`."""
    code = re.sub(
        r'//[^\n]*|/\*.*?\*/|"""(?:\\.|.)*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', " ", source, flags=re.S
    )
    package = re.search(r"^\s*package\s+([\w.]+)\s*;", code)
    # Those that are declared outside of any other, by the depth of braces.
    classes: list[tuple[int, bool, str]] = []
    depth = 0
    for found in re.finditer(r"[{}]|\b(public\s+)?(?:(?:final|abstract|strictfp|sealed)\s+)*"
                             r"(?:class|enum|record|interface)\s+([A-Za-z_$][\w$]*)", code):  # fmt: skip
        if found[2]:
            if depth == 0:
                classes.append((found.start(), bool(found[1]), found[2]))
        else:
            depth += 1 if found[0] == "{" else -1
    started = re.search(r"\bstatic\s+(?:final\s+)?void\s+main\s*\(", code)
    before = [name for at, _, name in classes if started and at < started.start()]
    public = [name for _, is_public, name in classes if is_public]
    main = before[-1] if before else public[0] if public else classes[0][2] if classes else "Main"
    return f"{(public[0] if public else main)[:200]}.java", f"{package[1]}.{main}" if package else main


def _javascript(toolchains: Toolchains) -> Toolchain:
    node = _program("javascript", "node", "Node.js (for example `apt-get install nodejs`)")

    def plan(source: str, memory_mb: int) -> Plan:
        is_module = re.search(r"^\s*(?:import\s*[\w{*\"']|export\s+[\w{*])", source, re.M)
        file = "main.mjs" if is_module else "main.js"
        run = (node, f"--max-old-space-size={memory_mb}", "--stack-size=12000", "--single-threaded-gc",
               "--v8-pool-size=1", f"{BUILD}/{file}")  # fmt: skip
        return Plan(file, (node, "--check", file), run)

    environment = {"UV_USE_IO_URING": "0", "UV_THREADPOOL_SIZE": "1", "NODE_OPTIONS": ""}
    shown = (node, "/usr/share/nodejs", *system_folders())  # where Debian keeps parts of Node's own library
    version = _version(node, "--version")
    proof = Proof('process.stdout.write("ok")')
    return Toolchain("javascript", version, proof, plan, shown, environment, runtime_mb=256, reserved_mb=2048)


_GO_PACKAGES = (
    "bufio", "bytes", "cmp", "container/heap", "container/list", "container/ring", "context", "encoding/binary",
    "encoding/json", "errors", "fmt", "io", "iter", "log", "maps", "math", "math/big", "math/bits", "math/cmplx",
    "math/rand", "os", "reflect", "regexp", "runtime", "slices", "sort", "strconv", "strings", "sync", "sync/atomic",
    "text/tabwriter", "time", "unicode", "unicode/utf8",
)  # fmt: skip
"""What programs that are judged on their output import; what is not here is compiled with each program."""


def _go(toolchains: Toolchains) -> Toolchain:
    advice = "Go (for example `apt-get install golang-go`)"
    root = _output([_program("go", "go", advice), "env", "GOROOT"])
    go = Path(root) / "bin" / "go"
    if not root or not go.is_file():
        raise MissingToolchain(f"language 'go': `go env GOROOT` says {root!r}, which holds no Go; install {advice}")
    prepared = toolchains.folder("go")
    environment = {
        "GOROOT": root, "GOCACHE": str(prepared / "cache"), "GOPATH": f"{BUILD}/gopath", "GOTMPDIR": BUILD,
        "GOENV": "off", "GOTOOLCHAIN": "local", "GOPROXY": "off", "CGO_ENABLED": "0",
        "XDG_CONFIG_HOME": str(prepared), "GODEBUG": "goindex=0",
        "GO111MODULE": "on", "GOMAXPROCS": "1", "HOME": BUILD,
    }  # fmt: skip
    (prepared / "go" / "telemetry").mkdir(parents=True)
    (prepared / "go" / "telemetry" / "mode").write_text("off\n")
    # The flags are in the key of the cache: what is prepared must be built as the programs are.
    build = (str(go), "build", "-ldflags=-s -w", "-o")
    source, warm = prepared / "main.go", {**environment, "GOTMPDIR": str(prepared), "GOPATH": str(prepared)}
    present = [p for p in _GO_PACKAGES if (Path(root) / "src" / p).is_dir()]  # some came with a later Go
    source.write_text("package main\n\nimport (\n" + "".join(f'\t_ "{p}"\n' for p in present) + ")\n\nfunc main() {}\n")
    done = subprocess.run(
        [*build, str(prepared / "program"), str(source)], capture_output=True, text=True, cwd=prepared,
        env=_clean({**warm, "HOME": str(prepared)}), check=False,
    )  # fmt: skip
    if done.returncode:
        raise MissingToolchain(
            f"language 'go': {go} can't compile the standard library ({done.stderr.strip()[-300:]}); install {advice}"
        )
    for path in prepared.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)

    def plan(source: str, memory_mb: int) -> Plan:
        # Else the collector lets garbage grow to twice what is in use before it looks.
        limited = {"GOMEMLIMIT": f"{memory_mb}MiB"}
        return Plan("main.go", (*build, "program", "main.go"), (f"{BUILD}/program",), limited)

    shown = [
        root,
        *(str(p.resolve()) for p in (*Path(root).iterdir(), *(Path(root) / "pkg").iterdir()) if p.is_symlink()),
    ]
    proof = Proof('package main\n\nimport "fmt"\n\nfunc main() { fmt.Print("ok") }\n')
    return Toolchain(
        "go",
        _version(str(go), "version"),
        proof,
        plan,
        (*shown, str(prepared), *system_folders()),
        environment,
        runtime_mb=96,
        reserved_mb=1024,
    )


def _rust(toolchains: Toolchains) -> Toolchain:
    advice = "Rust (for example with rustup, https://rustup.rs)"
    sysroot = Path(_output([_program("rust", "rustc", advice), "--print", "sysroot"]))
    compiler = sysroot / "bin" / "rustc"
    if not compiler.is_file():
        raise MissingToolchain(
            f"language 'rust': `rustc --print sysroot` says {sysroot}, which holds no rustc; install {advice}"
        )
    linker = _program("rust", "gcc", "a linker for Rust, GCC (for example `apt-get install gcc`)")
    files, environment = _gcc(linker, "c")

    def plan(source: str, memory_mb: int) -> Plan:
        compile_ = (str(compiler), "--sysroot", str(sysroot), "--edition", "2021", "-C", "opt-level=2",
                    "-C", f"linker={linker}", "--cap-lints", "allow", "main.rs", "-o", "program")  # fmt: skip
        return Plan("main.rs", compile_, (f"{BUILD}/program",))

    environment["LD_LIBRARY_PATH"] = str(sysroot / "lib")
    proof = Proof('fn main() { print!("ok"); }')
    return Toolchain(
        "rust",
        _version(str(compiler), "--version"),
        proof,
        plan,
        (str(compiler), str(sysroot / "lib"), *files),
        environment,
    )


FINDERS: dict[str, Callable[[Toolchains], Toolchain]] = {
    "cpp": _cpp,
    "java": _java,
    "javascript": _javascript,
    "go": _go,
    "rust": _rust,
}


def _program(language: str, name: str, advice: str) -> str:
    """Where a program really lies, on PATH or where rustup puts it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path("~/.cargo/bin").expanduser()))
    if found is None:
        raise MissingToolchain(f"language {language!r}: `{name}` is not on this machine's PATH; install {advice}")
    return found if Path(found).resolve().name == "rustup" else str(Path(found).resolve())


def _output(command: list[str]) -> str:
    """What a toolchain says of itself, one line; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(program: str, option: str) -> str:
    return _output([program, option]).partition("\n")[0] or "unknown"


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which something is prepared: nothing of the user's, who may have set flags there."""
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment}
