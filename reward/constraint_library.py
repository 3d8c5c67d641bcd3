"""Constraints with the functions that check them: a model wrote the functions, and cases keep them honest.

This is execution feedback as AutoIF does it (arXiv:2406.13542): of each constraint several functions
`evaluate(response)` and several cases (an answer, and whether it meets the constraint). A case is kept where enough
functions agree with it, a function where it is right on enough of those cases. What is left checks completions: the
task `follow`, whose reference is

    {"functions": ["def evaluate(response): …", …], "threshold": 0.5, "constraint": "Use no commas."}

A completion's reward is the share of the functions that return true; above the threshold it passes. A function that
raises, gives no truth value or takes too long does not say yes, and the detail counts it.

The functions are untrusted code. They run in `align.core.sandbox`, one process for a function and all the texts that it
is asked about, and what they say comes back as true, false or the reason for neither.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.core.records import Verdict
from align.core.sandbox import Sandbox, Slot, Trouble
from align.core.sandbox.inside.codec import CodecError

Outcome = bool | str
"""What a function said of a text; or, as text, why it said neither true nor false."""

ENTRY_POINT = "evaluate"
THRESHOLD = 0.5
"""More than this share of the functions must return true: the paper's; its code takes any above 0."""
LONGEST = 20_000
"""Characters of a function, at most [our choice]: an endless one costs time before it could be refused."""

_TOGETHER, _TOGETHER_CHARACTERS = 128, 1_000_000
"""Texts, and about how many characters of them, that one process is asked about."""
_KEYS = {"functions", "threshold", "constraint", "constraint_id"}

_TIMEOUT, _SANDBOX = "timeout", "sandbox"

# Runs before the function, in the same namespace. The released code compares with ==, so that 1 is true and 0 false,
# while its prompt asks for true and false, which models give as texts now and then: "true", "True" and True are one.
_HARNESS = f"""
def align_outcome(text):
    try:
        said = {ENTRY_POINT}(text)
    except BaseException as problem:
        return "raised " + type(problem).__name__
    if isinstance(said, int) and said in (0, 1):
        return said == 1
    if isinstance(said, str) and said.strip().lower() in ("true", "false"):
        return said.strip().lower() == "true"
    return "gave a " + type(said).__name__
"""


def problem_of(function: str) -> str:
    """Why a function can't be run at all; empty where it compiles and defines `evaluate`. Nothing of it is run."""
    if len(function) > LONGEST:
        return f"longer than {LONGEST} characters"
    try:
        body = ast.parse(function).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "does not compile"
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [node.name] if isinstance(node, ast.FunctionDef) else [t.id for t in targets if isinstance(t, ast.Name)]
        if ENTRY_POINT in names:
            return ""
    return f"defines no {ENTRY_POINT}"


def truth(value: Any) -> bool | None:
    """True for True, "true" and "True", false likewise; None for anything else."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


def outcomes(slot: Slot, function: str, texts: Sequence[str], most_timeouts: int | None = None) -> list[Outcome]:
    """What a function says of each text, in as few processes as it lets us.

    Args:
        slot: of the sandbox; its CPU limit is that of one process, and so the least that one text is granted.
        function: source that defines `evaluate`.
        texts: what it is asked about.
        most_timeouts: after so many the rest counts as timeouts too. None asks on, so that what is said of a text
            never depends on the texts beside it.
    """
    found: list[Outcome] = []
    timeouts = 0
    while len(found) < len(texts):
        if most_timeouts is not None and timeouts >= most_timeouts:
            return found + [f"{_TIMEOUT}: given up after {timeouts}"] * (len(texts) - len(found))
        asked = _some(texts[len(found) :])
        try:
            answers = slot.call(function, [("align_outcome", [text], {}) for text in asked], _HARNESS)
        except Trouble as trouble:
            found += [f"{_SANDBOX}: {trouble}"] * len(asked)
            continue
        except CodecError as problem:
            found += [f"too large: {problem}"] * len(asked)
            continue
        found += [said if isinstance(said, bool | str) else "gave no truth value" for said in answers.values]
        if len(answers.values) == len(asked) or (answers.timeout and answers.values):
            continue  # what the earlier texts left of the time says nothing of the next one, which is asked anew
        if answers.timeout:
            timeouts += 1
            found.append(f"{_TIMEOUT}: more than {answers.timeout}")
        elif answers.raised is not None:
            found += [f"raised {answers.raised.get('type')} before it was called"] * (len(texts) - len(found))
        else:
            found.append(f"ended: {answers.ended or 'no answer'}")
    return found


def _some(texts: Sequence[str]) -> list[str]:
    """The first texts, as many as go together; one at least."""
    some: list[str] = []
    characters = 0
    for text in texts[:_TOGETHER]:
        characters += len(text)
        if some and characters > _TOGETHER_CHARACTERS:
            break
        some.append(text)
    return some


def meets(share: float, rule: str) -> bool:
    """Whether a share is enough: `rule` is "above 0.5" or "at least 0.8"."""
    word, _, number = rule.rpartition(" ")
    return share > float(number) if word == "above" else share >= float(number)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Which cases and functions of a constraint bear each other out.

    Attributes:
        cases: places of the cases that are kept.
        functions: places of the functions that are kept, the most accurate first; of equals the first.
        accuracies: of all functions, on the cases that are kept; 0 where there is none.
    """

    cases: list[int]
    functions: list[int]
    accuracies: list[float]


def agreement(
    said: Sequence[Sequence[Outcome]],
    expected: Sequence[bool],
    case_kept: str,
    function_kept: str,
    tells_apart: bool = False,
) -> Agreement:
    """Cross-validation both ways: cases by the functions, then functions by the cases that are left.

    Args:
        said: by function and case, what the function said of the case's answer.
        expected: by case, what it should have said.
        case_kept: share of the functions that must agree with a case, as `meets` reads it.
        function_kept: share of the kept cases on which a function must be right.
        tells_apart: a function must also say yes to some of the kept cases and not to all: where four of five are
            false, one that never says yes is right on 0.8 of them.
    """
    right = [[outcome is want for outcome, want in zip(row, expected, strict=True)] for row in said]
    cases = [
        place
        for place in range(len(expected))
        if right and meets(sum(row[place] for row in right) / len(right), case_kept)
    ]
    accuracies = [sum(row[place] for place in cases) / len(cases) if cases else 0.0 for row in right]
    kept = [
        place
        for place, accuracy in enumerate(accuracies)
        if cases
        and meets(accuracy, function_kept)
        and not (tells_apart and len({said[place][case] is True for case in cases}) < 2)
    ]
    return Agreement(cases, sorted(kept, key=lambda place: -accuracies[place]), accuracies)


def verify_many(sandbox: Sandbox, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Verdict]:
    """The verdicts on (completion, reference) pairs, in order; each function runs once for all its completions."""
    problems = [_problem(reference) for _, reference in rows]
    jobs: dict[str, dict[str, None]] = {}
    for (completion, reference), problem in zip(rows, problems, strict=True):
        for function in () if problem else reference["functions"]:
            jobs.setdefault(function, {})[completion] = None

    def run(slot: Slot, job: tuple[str, Mapping[str, None]]) -> dict[str, Outcome]:
        function, texts = job
        return dict(zip(texts, outcomes(slot, function, list(texts)), strict=True))

    said = dict(zip(jobs, sandbox.map(run, jobs.items()), strict=True))
    return [
        Verdict.error(f"reference: {problem}") if problem else _verdict(completion, reference, said)
        for (completion, reference), problem in zip(rows, problems, strict=True)
    ]


def _verdict(completion: str, reference: Mapping[str, Any], said: Mapping[str, Mapping[str, Outcome]]) -> Verdict:
    found = [said[function][completion] for function in reference["functions"]]
    reasons = Counter(outcome for outcome in found if isinstance(outcome, str))
    broken = next((reason for reason in reasons if reason.startswith(_SANDBOX)), None)
    if broken is not None:
        return Verdict.error(broken)
    if reasons.total() == len(found) and all(reason.startswith(_TIMEOUT) for reason in reasons):
        return Verdict.error(next(iter(reasons)))
    yes = sum(outcome is True for outcome in found)
    threshold = reference.get("threshold", THRESHOLD)
    detail = f"{yes} of {len(found)} functions say yes, more than {threshold:g} of them are needed"
    detail += "".join(f"; {count} {reason}" for reason, count in reasons.items())
    share = yes / len(found)
    return Verdict("passed" if share > threshold else "failed", share, detail)


def _problem(reference: Mapping[str, Any]) -> str:
    """What is wrong with a reference, which comes from a file; empty if nothing is."""
    unknown = reference.keys() - _KEYS
    if unknown:
        return f"unknown keys {sorted(map(str, unknown))}; known are {sorted(_KEYS)}"
    functions = reference.get("functions")
    if not isinstance(functions, list) or not functions:
        return f"'functions' is {functions!r:.60}, but a list with at least one source was expected"
    for number, function in enumerate(functions, 1):
        problem = problem_of(function) if isinstance(function, str) else "is no text"
        if problem:
            return f"function {number}: {problem}"
    threshold = reference.get("threshold", THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        return f"'threshold' is {threshold!r:.60}, but a number from 0 to below 1 was expected"
    return ""
