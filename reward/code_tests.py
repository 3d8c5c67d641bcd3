"""Does a program meet its tests? Execution feedback for code (arXiv:2407.10671 section 4.1.2).

The completion is untrusted: it runs in `align.core.sandbox` and hands back values. A test of the form
`assert f(literals) == literal` is decided here, by comparing plain data; any other test runs in a second process, which
the solution does not share. A solution that ends early, prints, patches or lies about equality therefore can't pass.

What a reference may be, as the data sets have it:
    MBPP       `{"tests": ["assert f(1) == 2", …], "setup": "", "setup_after": ""}`: setup runs before the code,
               setup_after (MBPP's `test_setup_code`) after it
    HumanEval  `{"check": "def check(candidate): …", "entry_point": "f"}`
    programs   `{"io": [{"stdin": "…", "stdout": "…"}, …], "language": "python"}`: compared whole, but for white space
               at the ends of lines and newlines at the end; in Python, or another language of `reward.code_programs`
each with an optional `prompt`, the code that the completion continues or was given: it runs before the completion, and
a test that calls its helper functions gets the prompt's, not those of the completion. Give it where there is one:
HumanEval/32 calls such a helper, and without the prompt has to take the solution's word for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from align.core.errors import SandboxError
from align.core.records import Verdict
from align.core.sandbox import Accept, Answers, Checked, Limits, Sandbox, Slot, Trouble
from align.core.sandbox.inside.codec import CodecError
from align.core.sandbox.programs import COMPILING
from align.core.sandbox.toolchains import Toolchains
from reward.code_asserts import Expectation, compiles, from_asserts, from_check, tested_name
from reward.code_programs import FENCES, as_bytes, enough_for, unknown_language, verify_program, wrong_output
from reward.code_programs import line as _line
from reward.code_programs import show as _show

_KEYS = {
    "tests": {"tests", "setup", "setup_after", "prompt"},
    "check": {"check", "entry_point", "prompt", "setup"},
    "io": {"io", "prompt", "language"},
}

_NOT_COMPILED = ("SyntaxError", "IndentationError", "TabError")


class CodeVerifier:
    """Verifies programs against their tests; a context manager that owns a `Sandbox`.

    Args:
        workers: executions at the same time; None for the number of usable cores.
        accept: what isolation is enough, see `Sandbox`.
        cpu_s: CPU seconds for all tests of one completion (for each input of a program).
        wall_s: the backstop in seconds of the clock; None for four times `cpu_s`.
        memory_mb: memory of one execution beyond the interpreter's own, MiB.
        compile_cpu_s: CPU seconds for compiling one program of another language than Python.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        accept: Accept = "isolated",
        cpu_s: float = 8.0,
        wall_s: float | None = None,
        memory_mb: int = 512,
        compile_cpu_s: float = COMPILING.cpu_s,
    ) -> None:
        self.sandbox = Sandbox(workers, accept=accept, cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb)
        self.toolchains = Toolchains()
        self.compiling = Limits(compile_cpu_s, 6 * compile_cpu_s, COMPILING.memory_mb)

    def __enter__(self) -> Self:
        self.sandbox.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sandbox.close()
        self.toolchains.close()

    @property
    def report(self) -> dict[str, Any]:
        """The sandbox's level, failed probes and what is unprotected, and the toolchains that ran; for manifests."""
        versions = self.toolchains.versions()
        return {**self.sandbox.report, **({"toolchains": versions} if versions else {})}

    def verify(self, completion: str, reference: Mapping[str, Any]) -> Verdict:
        """The verdict on one completion: passed, failed, or error for a timeout, an unusable reference, or an opaque
        result (one that rests on the word of the solution's own objects)."""
        return self.sandbox.run(lambda slot: _verify(slot, completion, reference, self.toolchains, self.compiling))

    def verify_many(self, pairs: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Verdict]:
        """The verdicts on (completion, reference) pairs, in order, as they come, computed by all workers."""
        return self.sandbox.map(lambda slot, pair: _verify(slot, *pair, self.toolchains, self.compiling), pairs)


def extract_code(completion: str, defines: str | None = None, language: str = "python") -> str:
    """The program in a completion: its last fenced block of the language that holds code; the whole text if it has no
    fence.

    Args:
        completion: text of a model.
        defines: prefer the last block that defines this function over one that only uses it.
        language: as references name it.
    """
    blocks = _fenced_blocks(completion)
    marked = [code for mark, code in blocks if mark in FENCES[language]]
    found = marked or [code for mark, code in blocks if not mark]
    if not found:
        return completion
    defining = [code for code in found if defines and _defines(code, defines)]
    return (defining or found)[-1]


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block with content; a fence left open ends with the text."""
    blocks: list[tuple[str, str]] = []
    fence, language, indent, lines = "", "", "", list[str]()
    for line in re.split(r"\r\n|\r|\n", text):  # not `splitlines`, which also splits within strings of the program
        if not fence:
            fence, language, indent = _opening(line)
            lines = []
        elif (closing := line.strip()).startswith(fence) and not closing.strip(fence[0]):
            blocks.append((language, "\n".join(lines)))
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    if fence:
        blocks.append((language, "\n".join(lines)))
    return [(name, code + "\n") for name, code in blocks if _holds_code(code)]


def _opening(line: str) -> tuple[str, str, str]:
    """The fence that a line opens, its language, and the white space before it; an empty fence where it opens none.

    By hand, since a pattern for all of it takes quadratic time on a long line.
    """
    stripped = line.lstrip()
    rest = stripped.lstrip(stripped[:1]) if stripped[:1] in ("`", "~") else stripped
    fence = stripped[: len(stripped) - len(rest)]
    if len(fence) < 3 or "`" in rest:
        return "", "", ""
    language = re.match(r"\s*\{?\.?([\w+]*)", rest)
    return fence, language[1].lower() if language else "", line[: len(line) - len(stripped)]


def _holds_code(text: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines())


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*[:=]", code, re.M)
        is not None
    )


def _verify(
    slot: Slot,
    completion: str,
    reference: Mapping[str, Any],
    toolchains: Toolchains | None = None,
    compiling: Limits = COMPILING,
) -> Verdict:
    """The verdict of one slot; without toolchains only Python runs."""
    if isinstance(reference, Mapping):  # in parquet each has the keys of all, null where it has none
        reference = {key: value for key, value in reference.items() if value is not None}
    problem = _problem(reference)
    if problem:
        return Verdict.error(_line(f"reference: {problem}"))
    try:
        if "io" not in reference:
            return _verify_functions(slot, completion, reference)
        language, cases = reference.get("language", "python"), reference["io"]
        code = reference.get("prompt", "") + extract_code(completion, language=language)
        if language == "python":
            return _verify_program(slot, code, cases)
        if toolchains is None:
            return Verdict.error(f"language {language!r}: only Python runs here")
        return verify_program(slot, toolchains, compiling, language, code, cases)
    except Trouble as trouble:
        return Verdict.error(_line(f"sandbox: {trouble}"))
    except CodecError as error:
        return Verdict.error(_line(f"can't be run: {error}"))
    except SandboxError:
        raise
    except Exception as bug:  # a bug of ours on one row in a million must not cost the other rows
        return Verdict.error(_line(f"sandbox: the verifier failed ({type(bug).__name__}: {bug}); please report this"))


def _problem(reference: Any) -> str:
    """What is wrong with a reference, which comes from a file; empty if nothing is."""
    if not isinstance(reference, Mapping):
        return f"a {type(reference).__name__}, but an object was expected"
    kinds = [kind for kind in _KEYS if kind in reference]
    if len(kinds) != 1:
        return f"has the keys {sorted(map(str, reference))}, but exactly one of 'tests', 'check', 'io' was expected"
    unknown = reference.keys() - _KEYS[kinds[0]]
    if unknown:
        return f"unknown keys {sorted(map(str, unknown))}; {kinds[0]!r} goes with {sorted(_KEYS[kinds[0]])}"
    for key in reference.keys() - {"tests", "io"}:
        if not isinstance(reference[key], str):
            return f"{key!r} is a {type(reference[key]).__name__}, but a string was expected"
    if (problem := unknown_language(reference.get("language", "python"))) != "":
        return problem
    if kinds[0] == "check":
        name = reference.get("entry_point", "")
        return "" if name.isidentifier() else f"'entry_point' is {name!r}, but a function's name was expected"
    items = reference[kinds[0]]
    if not isinstance(items, list | tuple) or not items:
        return f"{kinds[0]!r} is {str(items)[:60]!r}, but a list with at least one entry was expected"
    for number, item in enumerate(items, 1):
        if kinds[0] == "tests" and not isinstance(item, str):
            return f"test {number} is a {type(item).__name__}, but a string was expected"
        if kinds[0] == "io" and not (
            isinstance(item, Mapping)
            and item.keys() == {"stdin", "stdout"}
            and all(isinstance(v, str) for v in item.values())
        ):
            return f"io {number} is not an object with the strings 'stdin' and 'stdout'"
    return ""


def _verify_functions(slot: Slot, completion: str, reference: Mapping[str, Any]) -> Verdict:
    entry_point: str | None = reference.get("entry_point")
    try:
        if entry_point is None:
            tests = tuple(reference["tests"])
            expectations = from_asserts(tests)
            name = tested_name(tests)
        else:
            tests = (reference["check"],)
            expectations = from_check(reference["check"], entry_point)
            name = entry_point
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict.error(_line(f"reference: the tests do not compile: {error}"))
    code = extract_code(completion, name)
    setup, given = reference.get("setup", ""), reference.get("prompt", "")
    if name and given:
        if _defines(code, name):
            setup = f"{setup}\n{given}" if compiles(given) else setup
        else:
            code = given + code
    after = reference.get("setup_after", "")
    if expectations is not None and not after.strip():
        answers = slot.call(code, [(e.name, e.args, e.kwargs) for e in expectations], setup)
        if not answers.heavy:
            return _judge(answers, expectations)
    checked = slot.check(
        code, tests, setup=setup, setup_after=after, given=given if compiles(given) else "", entry_point=entry_point
    )
    return _judge_check(checked, tests, entry_point)


def _judge(answers: Answers, expectations: Sequence[Expectation]) -> Verdict:
    for number, (value, expected) in enumerate(zip(answers.values, expectations, strict=False), 1):
        try:
            right = expected.holds(value)
        except Exception:
            right = False
        if not right:
            return Verdict.of(False, _line(f"test {number}: {expected.source}: got {_show(value)}"))
    number = len(answers.values) + 1
    test = f"test {number}: {expectations[number - 1].source}" if number <= len(expectations) else "the end"
    if answers.timeout:
        return Verdict.error(_line(f"timeout: more than {answers.timeout} at {test}"))
    if answers.raised is not None:
        return _judge_raised(answers.raised, answers.where, test)
    if answers.missing:
        return Verdict.of(False, _line(f"{test}: the program defines no {answers.missing!r}"))
    if answers.ended:
        return Verdict.of(False, _line(f"{test}: the program ended before it answered ({answers.ended})"))
    if len(answers.values) != len(expectations):
        return Verdict.error("sandbox: the number of answers is not the number of tests")
    return Verdict.of(True, f"{len(expectations)} tests passed")


def _judge_check(checked: Checked, tests: Sequence[str], entry_point: str | None) -> Verdict:
    frame = checked.frame
    number = frame.get("failed") or frame.get("test") or 0
    place = f"test {number}" if number else "before the first test"
    source = str(frame.get("line") or (tests[number - 1] if number and entry_point is None else ""))
    where = f"{place}: {source}" if source else place
    if checked.timeout:
        return Verdict.error(_line(f"timeout: more than {checked.timeout} at {where}"))
    if frame.get("passed") == len(tests):
        return Verdict.of(True, f"{len(tests)} tests passed")
    if "broken" in frame:
        return Verdict.error(_line(f"reference: {frame['broken']}"))
    if "opaque" in frame:
        return Verdict.error(_line(f"opaque: {where} rests on {frame['opaque']}"))
    if "lost" in frame:
        return Verdict.of(False, _line(f"{where}: the program gave no answer ({frame['lost']})"))
    if "missing" in frame:
        return Verdict.of(False, _line(f"{where}: the program defines no {frame['missing']!r}"))
    if isinstance(frame.get("raised"), Mapping):
        return _judge_raised(frame["raised"], str(frame.get("in", "call")), where)
    if "failed" in frame:
        what = frame.get("what") or "the test does not hold"
        return Verdict.of(False, _line(f"{where}: {what}"))
    return Verdict.error(_line(f"sandbox: {checked.ended or 'the tests gave no result'}"))


def _judge_raised(raised: Mapping[str, Any], where: str, test: str) -> Verdict:
    kind, said, at = raised.get("type"), raised.get("message"), raised.get("line")  # of any type: the program sends it
    message = f"{kind if isinstance(kind, str) else '?'}: {said if isinstance(said, str) else '?'}"
    line = f" (line {at})" if type(at) is int else ""
    if where == "setup":
        return Verdict.error(_line(f"reference: setup raised {message}"))
    if where == "code":
        compiles = raised.get("type") not in _NOT_COMPILED
        what = "the program raised" if compiles else "does not compile:"
        return Verdict.of(False, _line(f"{what} {message}{line}"))
    return Verdict.of(False, _line(f"{test}: raised {message}{line}"))


def _verify_program(slot: Slot, code: str, cases: Sequence[Mapping[str, str]]) -> Verdict:
    for number, case in enumerate(cases, 1):
        output = slot.program(code, as_bytes(case["stdin"]), enough_for(case["stdout"]))
        if output.timeout:
            return Verdict.error(_line(f"timeout: more than {output.timeout} on input {number}"))
        if output.raised is not None:
            where = "code" if output.raised.get("type") in _NOT_COMPILED else "call"
            return _judge_raised(output.raised, where, f"input {number}")
        if output.ended not in ("", "exit status 0"):
            return Verdict.of(False, f"input {number}: the program ended early ({output.ended})")
        problem = wrong_output(output.text, output.cut, case["stdout"])
        if problem:
            return Verdict.of(False, _line(f"input {number}: {problem}"))
    return Verdict.of(True, f"{len(cases)} inputs passed")
