"""Which of many tests does a program pass, each by itself? What agreement between solutions and tests is found from.

Program and tests are both untrusted: a model wrote them. All of it runs in the sandbox. Tests of the form
`assert f(literals) == literal` are calls in one process of the solution, and the values are compared here; another
process is needed only after a call that raised or gave no plain value. Any other test runs by itself in two processes
that share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.core.sandbox import Answers, Slot, Trouble
from align.core.sandbox.inside.codec import CodecError
from reward.code_asserts import Expectation, from_asserts
from reward.code_programs import as_bytes

NOT_COMPILED = ("SyntaxError", "IndentationError", "TabError")
MOST_TIMEOUTS = 2
"""So often a program may run out of time; then its other tests count as not passed [our choice]."""
MOST_BYTES = 100_000
"""Of what a program writes; one that writes more counts as one that did not end well [our choice]."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What became of one program.

    Attributes:
        compiles: whether it can be parsed.
        runs: whether it also got as far as its tests; of a program that reads input, whether it ended well on any.
        tests: for each test whether it passed.
        outputs: of a program, what it wrote on each input; None where it did not end well.
        problem: why the machinery could not tell; empty where it could.
    """

    compiles: bool
    runs: bool
    tests: tuple[bool, ...] = ()
    outputs: tuple[str | None, ...] = ()
    problem: str = ""


def passed_asserts(slot: Slot, code: str, tests: Sequence[str]) -> Passed:
    """Which of the assertions hold for the functions of `code`, one by one.

    Args:
        slot: where it runs.
        code: the program.
        tests: assertions that compile.
    """
    try:
        return _Asserting(slot, code, tests).all()
    except (Trouble, CodecError) as problem:
        return Passed(False, False, problem=f"sandbox: {problem}")


class _Asserting:
    def __init__(self, slot: Slot, code: str, tests: Sequence[str]) -> None:
        self.slot, self.code, self.tests = slot, code, tests
        self.passed = [False] * len(tests)
        self.timeouts = 0
        self.broken: Mapping[str, object] | None = None  # what the program itself raised, before any test

    def all(self) -> Passed:
        called: list[tuple[int, Expectation]] = []
        others: list[int] = []
        for place, test in enumerate(self.tests):
            expectations = from_asserts((test,))
            if expectations is None:
                others.append(place)
            else:
                called.append((place, expectations[0]))
        self._call(called, others)
        for place in others:
            if self.broken is not None or self.timeouts >= MOST_TIMEOUTS:
                break
            self._check(place)
        if self.broken is not None:
            return Passed(self.broken.get("type") not in NOT_COMPILED, False, tuple(self.passed))
        return Passed(True, True, tuple(self.passed))

    def _call(self, waiting: list[tuple[int, Expectation]], others: list[int]) -> None:
        """Calls until every test was decided; one that gave no plain value is left to `others`."""
        while waiting and self.timeouts < MOST_TIMEOUTS:
            answers = self.slot.call(self.code, [(e.name, e.args, e.kwargs) for _, e in waiting])
            for (place, expectation), value in zip(waiting, answers.values, strict=False):
                self.passed[place] = _holds(expectation, value)
            if answers.heavy and len(waiting) > 1:
                for one in waiting[len(answers.values) :]:
                    self._call([one], others)
                return
            if answers.heavy:
                others.append(waiting[0][0])
                return
            if _before_any_test(answers):
                self.broken = answers.raised
                return
            self.timeouts += bool(answers.timeout)
            waiting = waiting[len(answers.values) + 1 :]  # the one after the last value failed: it gave none
            if answers.missing:
                waiting = [one for one in waiting if one[1].name != answers.missing]

    def _check(self, place: int) -> None:
        checked = self.slot.check(self.code, [self.tests[place]])
        self.timeouts += bool(checked.timeout)
        raised = checked.frame.get("raised")
        if checked.frame.get("in") == "code" and isinstance(raised, dict):
            self.broken = raised
        self.passed[place] = checked.frame.get("passed") == 1


def _holds(expectation: Expectation, value: object) -> bool:
    try:
        return expectation.holds(value)
    except Exception:  # comparing a value with another type may raise
        return False


def _before_any_test(answers: Answers) -> bool:
    return answers.raised is not None and answers.where in ("code", "setup")


def written_outputs(slot: Slot, code: str, inputs: Sequence[str]) -> Passed:
    """What a program that reads standard input writes on each input, one run each; it has no tests."""
    outputs: list[str | None] = []
    timeouts = 0
    try:
        for stdin in inputs:
            if timeouts >= MOST_TIMEOUTS:
                outputs.append(None)
                continue
            output = slot.program(code, as_bytes(stdin), MOST_BYTES)
            timeouts += bool(output.timeout)
            if output.raised is not None and output.raised.get("type") in NOT_COMPILED:
                return Passed(False, False, outputs=(None,) * len(inputs))
            ended_well = output.raised is None and not output.timeout and output.ended in ("", "exit status 0")
            outputs.append(output.text.decode("utf-8", "replace") if ended_well and not output.cut else None)
    except (Trouble, CodecError) as problem:
        return Passed(False, False, problem=f"sandbox: {problem}")
    return Passed(True, any(output is not None for output in outputs), outputs=tuple(outputs))
