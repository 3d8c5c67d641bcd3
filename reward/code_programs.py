"""Does a program in another language than Python write what it should? Compiled once, run on each input.

The report executes code "compiled and executed" in several languages (arXiv:2407.10671 section 4.1.2). Only what a
program writes counts, and it is compared outside of the sandbox. Tests that would be compiled together with the program
and judge it by the process's exit status (MultiPL-E's form) are not offered: `exit(0)` would pass them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rapidfuzz import process

from align.core.records import Verdict
from align.core.sandbox import Limits, Slot
from align.core.sandbox.programs import LEVEL, Ran, Workshop, in_workshop
from align.core.sandbox.toolchains import MissingToolchain, Toolchains

FENCES: dict[str, tuple[str, ...]] = {
    "python": ("python", "py", "python3"),
    "cpp": ("cpp", "c++", "cc", "cxx"),
    "java": ("java",),
    "javascript": ("javascript", "js", "node", "mjs", "cjs"),
    "go": ("go", "golang"),
    "rust": ("rust", "rs"),
}
"""The languages that a reference may name, and how a completion may mark a block of each."""

MAX_DETAIL = 400


def unknown_language(language: str) -> str:
    """Why a reference can't be used that names this language; empty if it is known."""
    if language in FENCES:
        return ""
    nearest = next((name for name, marks in FENCES.items() if language.lower() in marks), None)
    if nearest is None:
        nearest = process.extractOne(language[:80], list(FENCES))[0]
    return f"unknown language {language[:80]!r}; did you mean {nearest!r}? Known are {', '.join(FENCES)}"


def verify_program(
    slot: Slot, toolchains: Toolchains, compiling: Limits, language: str, code: str, cases: Sequence[Mapping[str, str]]
) -> Verdict:
    """The verdict on a program of a language other than Python.

    Args:
        slot: where it runs, within the slot's limits.
        toolchains: where to look for the language's.
        compiling: limits of compiling it.
        language: a name of `FENCES`.
        code: the program.
        cases: its inputs and what it must write, `{"stdin", "stdout"}`.

    Raises:
        Trouble: the machinery failed every time.
    """
    if slot.level != LEVEL:
        return Verdict.error(
            f"language {language!r}: its programs need level {LEVEL} of the sandbox (namespaces of their own), and "
            f"this machine's sandbox has level {slot.level}; only Python runs there"
        )

    def judged(workshop: Workshop) -> Verdict:
        workshop.begin(code, slot.limits.memory_mb)
        compiled = workshop.compile(compiling)
        slot.journal.timeouts += bool(compiled.timeout)
        if compiled.timeout:
            return Verdict.error(f"timeout: more than {compiled.timeout} for compiling")
        if compiled.ended:
            return Verdict.of(False, line(f"does not compile: {_compilers_message(compiled)}"))
        for number, case in enumerate(cases, 1):
            ran = workshop.run(as_bytes(case["stdin"]), slot.limits, enough_for(case["stdout"]))
            slot.journal.timeouts += bool(ran.timeout)
            if ran.timeout:
                return Verdict.error(f"timeout: more than {ran.timeout} on input {number}")
            if ran.ended:
                said = _last_words(ran.errors)
                return Verdict.of(False, line(f"input {number}: the program ended early ({ran.ended}){said}"))
            problem = wrong_output(ran.output, ran.cut, case["stdout"])
            if problem:
                return Verdict.of(False, line(f"input {number}: {problem}"))
        return Verdict.of(True, f"{len(cases)} inputs passed")

    try:
        return in_workshop(slot, toolchains.find(language), judged)
    except MissingToolchain as missing:
        return Verdict.error(line(str(missing)))


def as_bytes(text: str) -> bytes:
    """An input as a program reads it."""
    return text.encode("utf-8", "surrogatepass")


def enough_for(expected: str) -> int:
    """How many bytes of an output to keep, so that it can be told from what was expected and be shown."""
    return 2 * len(as_bytes(expected)) + (64 << 10)


def wrong_output(output: bytes, cut: bool, expected: str) -> str:
    """How an output differs from what was expected; empty if it does so in white space at the ends of lines and
    newlines at the end alone."""
    text = output.decode("utf-8", "replace")
    if not cut and same_output(text, expected):
        return ""
    return f"wrote {show(text)}, expected {show(expected)}"


def same_output(one: str, other: str) -> bool:
    """Whether two outputs differ in white space at the ends of lines and newlines at the end alone."""
    return normal_output(one) == normal_output(other)


def normal_output(text: str) -> str:
    """Without white space at the ends of lines and newlines at the end."""
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n")).rstrip("\n")


def _compilers_message(compiled: Ran) -> str:
    """A compiler's first error; with the place, where it follows on a line of its own."""
    lines = _lines(compiled.errors) or _lines(compiled.output)
    telling = (r"\berror\b|\w*Error:|undefined reference", r"^\S+:\d+:\d+: ", r"^[^#]")
    found = [n for pattern in telling for n, text in enumerate(lines) if re.search(pattern, text)]
    if not found:
        return f"the compiler ended with {compiled.ended}"
    first = found[0]
    place = lines[first + 1] if first + 1 < len(lines) and lines[first + 1].lstrip().startswith("-->") else ""
    if lines[first].startswith("SyntaxError") and (where := re.match(r"\S+:\d+$", lines[0])):
        place = f"({where[0]})"
    return f"{lines[first]} {place}"


def _last_words(errors: bytes) -> str:
    """The line of what a program wrote to its standard error that says most; with a colon before it."""
    lines = _lines(errors)
    telling = [t for t in lines if re.search(r"exception|error|panic|terminate|fatal", t, re.I)]
    return f": {(telling or lines[-1:])[0]}" if lines else ""


def _lines(output: bytes) -> list[str]:
    text = output.decode("utf-8", "replace").replace("/build/", "")
    return [t.strip() for t in text.splitlines() if t.strip()]


def show(value: object) -> str:
    """A value for a person, at most 120 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer with too many digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 120 else text[:117] + "..."


def line(text: str) -> str:
    """A detail: one line, not too long, of characters that can be shown."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[: 4 * MAX_DETAIL].split()))
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 3] + "..."
