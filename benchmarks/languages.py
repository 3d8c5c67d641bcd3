"""What does a program in another language than Python cost, in CPU time: compiling it, and running it on an input?

Compares the sandbox with the same commands without any isolation, in turns within one run. A program reads two numbers
and writes their sum; `cpp, all headers` includes all of C++'s standard library, before and after its header was
compiled once for all.

    python benchmarks/languages.py [--programs 5] [--inputs 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from machine import machine

from align.core.sandbox import Limits, Sandbox
from align.core.sandbox.inside.zygote import cpu_used
from align.core.sandbox.programs import COMPILING, Ran, Workshop, in_workshop
from align.core.sandbox.toolchains import FINDERS, PCH_AFTER, MissingToolchain, Toolchain, Toolchains

PROGRAMS = {
    "cpp": "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }\n",
    "java": (
        "import java.util.Scanner;\npublic class Main { public static void main(String[] x) {\n"
        "Scanner s = new Scanner(System.in); System.out.println(s.nextLong() + s.nextLong()); } }\n"
    ),
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);\nconsole.log(a + b);\n",
    "go": (
        'package main\n\nimport "fmt"\n\nfunc main() {\n\tvar a, b int\n\tfmt.Scan(&a, &b)\n\tfmt.Println(a + b)\n}\n'
    ),
    "rust": (
        "use std::io::Read;\nfn main() { let mut s = String::new(); std::io::stdin().read_to_string(&mut s).unwrap();\n"
        'println!("{}", s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>()); }\n'
    ),
}
ALL_HEADERS = PROGRAMS["cpp"].replace("<iostream>", "<bits/stdc++.h>")
LIMITS = Limits(cpu_s=30, wall_s=300, memory_mb=512)


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of the children that ended meanwhile, and of this process."""

    def now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    before = now()
    work()
    return now() - before


def isolated(workshop: Workshop, source: str, inputs: int) -> tuple[float, list[float]]:
    """CPU seconds of compiling, and of each run; with those of the worker and of this process."""
    outer = workshop.process.pid
    inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()

    def around() -> float:
        return time.process_time() + cpu_used(outer) + sum(cpu_used(int(pid)) for pid in inner)

    def timed(work: Callable[[], Ran], expected: bytes) -> float:
        before = around()
        ran = work()
        assert (ran.ended, ran.output) == ("", expected), ran.errors
        return ran.cpu_s + around() - before

    workshop.begin(source, LIMITS.memory_mb)
    compiling = timed(lambda: workshop.compile(COMPILING), b"")
    return compiling, [timed(lambda: workshop.run(b"2 3", LIMITS), b"5\n") for _ in range(inputs)]


def bare(toolchain: Toolchain, source: str, inputs: int) -> tuple[float, list[float]]:
    """The same without isolation, in a temporary folder."""
    plan = toolchain.plan(source, LIMITS.memory_mb)
    with tempfile.TemporaryDirectory() as folder:

        def command(words: tuple[str, ...], stdin: bytes) -> bytes:
            there = [word.replace("/build", folder) for word in words]
            environment = {k: v.replace("/build", folder) for k, v in toolchain.environment.items()}
            done = subprocess.run(there, input=stdin, capture_output=True, cwd=folder, env=environment, check=True)
            return done.stdout

        Path(folder, plan.file).write_text(source)
        compiling = spent(lambda: command(plan.compile, b""))
        return compiling, [spent(lambda: command(plan.run, b"2 3")) for _ in range(inputs)]


def measured(language: str, source: str, programs: int, inputs: int, warm: bool = False) -> dict[str, float]:
    """The figures of one language, medians in CPU seconds."""
    figures: dict[str, float] = {}
    with Sandbox(1) as sandbox:
        toolchains = Toolchains()
        figures["preparing, once"] = spent(lambda: toolchains.find(language))
        toolchain = toolchains.find(language)
        if warm:
            figures["preparing, once"] += spent(lambda: [toolchain.ready(source) for _ in range(PCH_AFTER)])
        elif source is ALL_HEADERS:  # as it is before the header has been compiled
            toolchain = Toolchain(**{**vars(toolchain), "ready": lambda source: None})

        def start() -> None:
            Workshop(toolchain).close()

        figures["starting a worker, once"] = spent(start)
        inside, outside = [], []
        for _ in range(programs):
            inside.append(sandbox.run(lambda slot: in_workshop(slot, toolchain, lambda w: isolated(w, source, inputs))))
            outside.append(bare(toolchain, source, inputs))
        for name, results in (("isolated", inside), ("bare", outside)):
            figures[f"compiling, {name}"] = statistics.median(c for c, _ in results)
            figures[f"a run, {name}"] = statistics.median(r for _, runs in results for r in runs)
        toolchains.close()
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    missing, versions = {}, {}
    with Toolchains() as toolchains:
        for language in FINDERS:
            try:
                versions[language] = toolchains.find(language).version
            except MissingToolchain as error:
                missing[language] = str(error)
    for language in versions:
        found[language] = measured(language, PROGRAMS[language], settings.programs, settings.inputs)
        print(language, found[language], flush=True)
    if "cpp" in versions:
        for name, warm in (("cpp, all headers", False), ("cpp, all headers, compiled once", True)):
            found[name] = measured("cpp", ALL_HEADERS, settings.programs, settings.inputs, warm)
            print(name, found[name], flush=True)
    result = {
        "question": "CPU seconds of compiling a program, and of running it on one input",
        "cpu_s": found,
        "versions": versions,
        "missing": missing,
        "programs": settings.programs,
        "inputs": settings.inputs,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
