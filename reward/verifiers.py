"""How each task is verified: one table, and `Verifiers`, which gives a verdict for every row in order.

No verifier takes a model; a row of a task that needs one (`reward.judged`) gets an error that says so. Whatever is
wrong with a row becomes its verdict `error` and stops no other.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rapidfuzz import process

from align.core.records import Verdict
from reward import constraints, math_answers, simple_checks
from reward.formulas import Formulas
from reward.judged import JUDGED, NEEDS_JUDGE

if TYPE_CHECKING:
    from align.core.sandbox import Slot
    from reward.code_tests import CodeVerifier

Item = TypeVar("Item")
Result = TypeVar("Result")

Verify = Callable[[str, Mapping[str, Any]], Verdict]

VERIFIERS: dict[str, Verify | None] = {
    "math": math_answers.verify,  # `Verifiers` adds the process that compares formulas
    "code": None,  # runs in the sandbox, which `Verifiers` starts
    "follow": None,  # its functions do
    "constraints": constraints.verify,
    "exact": simple_checks.verify_exact,
    "tags": simple_checks.verify_tags,
    "principle": simple_checks.verify_principle,
}
TASKS: tuple[str, ...] = (*VERIFIERS, *JUDGED)
SANDBOXED: tuple[str, ...] = tuple(task for task, verify in VERIFIERS.items() if verify is None)
"""Tasks whose verifier runs code that a model wrote; their rows say at which level (`sandbox_level`)."""

VerifyRow = tuple[Any, Any, Any, Any]
"""Task, completion text, reference (an object, or its JSON string), prompt text; of any type: rows may be broken."""

CHUNK = 256
"""Rows held at a time; the code among them runs together, on all of the sandbox's workers."""
CHUNK_CHARACTERS = 8_000_000
"""Fewer rows are held where their completions are as long as this together."""


class Verifiers:
    """Verifies rows of any tasks; a context manager, since code and some formulas need processes, which must end.

    The sandbox starts when the first row of code comes, math-verify when the first formula comes that needs it.
    """

    def __init__(
        self, sandbox: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Takes the settings of `CodeVerifier`, where other than its defaults are wanted, and what tells a person how
        code is isolated when the sandbox starts."""
        self._say = say
        self._sandbox = dict(sandbox or {})
        self._code: CodeVerifier | None = None
        self._formulas = Formulas()

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code, self._code = self._code, None
        self._formulas.__exit__(kind, error, trace)
        if code is not None:
            code.__exit__(kind, error, trace)

    @property
    def sandbox_report(self) -> dict[str, Any] | None:
        """How code was isolated, for manifests; None while none has run."""
        return None if self._code is None else self._code.report

    @property
    def formulas_report(self) -> dict[str, Any] | None:
        """How many pairs of formulas math-verify was asked about, and could not tell; None where it was not needed."""
        return self._formulas.report

    @property
    def sandbox_level(self) -> int | None:
        """The isolation level that code ran at, for rows; None while none has run."""
        return None if self._code is None else self._code.sandbox.level

    def verify(self, task: Any, completion: Any, reference: Any, prompt: Any = "") -> Verdict:
        """The verdict of one row."""
        return next(iter(self.verify_many([(task, completion, reference, prompt)])))

    def verify_many(self, rows: Iterable[VerifyRow]) -> Iterator[Verdict]:
        """Yields the verdict of each row, in order, holding `CHUNK` rows at a time (fewer where they are long).

        Raises:
            SandboxError: code can't be run safely here; rows without code are not affected.
        """
        for chunk in chunks(rows):
            yield from self._verify_chunk(chunk)

    def run_each(self, work: Callable[[Slot, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields the results of `work(slot, item)` in the sandbox, in the order of the items (see `Sandbox.map`).

        Raises:
            SandboxError: code can't be run safely here.
        """
        return self._code_verifier().sandbox.map(work, items)

    def _verify_chunk(self, rows: Sequence[VerifyRow]) -> list[Verdict]:
        verdicts: list[Verdict | str] = []  # or the task, where a verdict is still to come
        code: list[tuple[str, Mapping[str, Any]]] = []
        follow: list[tuple[str, Mapping[str, Any]]] = []
        for task, completion, raw_reference, prompt in rows:
            reference = _reference(raw_reference)
            problem = _problem(task, completion, reference)
            if problem is not None:
                verdicts.append(Verdict.error(problem))
            elif task == "math":
                verdicts.append(_guarded(self._verify_math, task, completion, reference))
            elif (verify := VERIFIERS[task]) is not None:
                verdicts.append(_guarded(verify, task, completion, reference))
            else:
                verdicts.append(task)
                if task == "code":
                    code.append((completion, _with_given_code(reference, prompt)))
                else:
                    follow.append((completion, reference))
        ran = {
            "code": iter(self._code_verifier().verify_many(code) if code else ()),
            "follow": iter(self._verify_follow(follow) if follow else ()),
        }
        return [next(ran[verdict]) if isinstance(verdict, str) else verdict for verdict in verdicts]

    def _verify_math(self, completion: str, reference: Mapping[str, Any]) -> Verdict:
        return math_answers.verify(completion, reference, self._formulas)

    def _verify_follow(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Verdict]:
        from reward.constraint_library import verify_many

        return verify_many(self._code_verifier().sandbox, rows)

    def _code_verifier(self) -> CodeVerifier:
        if self._code is None:
            from reward.code_tests import CodeVerifier  # the sandbox is only for those who run code

            self._code = CodeVerifier(**self._sandbox).__enter__()
            for line in self._code.sandbox.lines():
                self._say(line)
        return self._code


def chunks(rows: Iterable[VerifyRow]) -> Iterator[list[VerifyRow]]:
    """The rows in lists of at most `CHUNK` rows, and of little more than `CHUNK_CHARACTERS` characters."""
    chunk: list[VerifyRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row[1]) if isinstance(row[1], str) else 0
        if len(chunk) >= CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _with_given_code(reference: Mapping[str, Any], prompt: Any) -> Mapping[str, Any]:
    """A check's reference with the code that the prompt gave, where it did: HumanEval's prompt is a function's head.

    A completion may go on from there, and the tests may call what the head defines beside it.
    """
    name = reference.get("entry_point")
    if "prompt" in reference or not isinstance(name, str):
        return reference
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        said = [m.get("content") for m in prompt if isinstance(m, Mapping) and m.get("role") == "user"]
        prompt = said[-1] if said else None
    if not isinstance(prompt, str):
        return reference
    from reward.code_tests import extract_code

    code = extract_code(prompt, name)
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return reference
    return {**reference, "prompt": code if code.endswith("\n") else code + "\n"} if name in defined else reference


def _reference(raw: Any) -> Any:
    """The reference as an object; its text where that is no JSON, which `_problem` then reports.

    Keys that are null are taken as absent: a table gives every reference the keys of all.
    """
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            return raw
    return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, Mapping) else raw


def _problem(task: Any, completion: Any, reference: Any) -> str | None:
    """Why a row can't be verified, or None."""
    if not isinstance(task, str):
        return f"task: expected one of {', '.join(TASKS)}, found {task!r:.80}"
    if task not in TASKS:
        nearest = process.extractOne(task[:80], TASKS)
        return f"task: no verifier for {task!r:.80}; did you mean {nearest[0] if nearest else TASKS[0]!r}?"
    if not isinstance(completion, str):
        return f"completion: expected a text, found {type(completion).__name__}"
    if isinstance(reference, str):
        return f"reference: no JSON object: {reference!r:.80}"
    if not isinstance(reference, Mapping):
        return f"reference: expected an object, found {type(reference).__name__}"
    return NEEDS_JUDGE if task in JUDGED else None


def _guarded(verify: Verify, task: str, completion: str, reference: Mapping[str, Any]) -> Verdict:
    try:
        return verify(completion, reference)
    except Exception as bug:  # a bug of ours on one row in a million must not cost the other rows
        return Verdict.error(f"{task}: the verifier failed ({type(bug).__name__}: {bug!s:.200}); please report this")
