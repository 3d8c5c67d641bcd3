"""Verifier of the task `constraints`: does a completion follow checkable instructions (IFEval, arXiv:2311.07911)?

A reference is `{"constraints": [{"id": "punctuation:no_comma", "kwargs": {}}, ...], "mode": "strict"}`. Strict takes
the completion as it is; loose also tries it without its first line, its last line, both, and each without asterisks, so
that an "Of course! Here it is:" is forgiven. The verdict is IFEval's prompt level (all constraints); `fraction` is its
instruction level. An empty completion follows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidfuzz import process

from align.core.errors import DataError
from align.core.records import Verdict
from reward.ifeval.checks import CHECKS, argument_problem


@dataclass(frozen=True, slots=True)
class Constraint:
    """One checkable instruction: its id in `CHECKS`, and its arguments, all given and checked."""

    id: str
    kwargs: dict[str, Any]

    def found(self, texts: list[str]) -> str | None:
        """None where one of `texts` follows it; otherwise what was found in the first."""
        if not texts:
            return "an empty completion"
        outcomes = (CHECKS[self.id].found(text, **self.kwargs) for text in texts)
        first = next(outcomes)
        return None if first is None or any(found is None for found in outcomes) else first


def verify(completion: str, reference: Mapping[str, Any]) -> Verdict:
    """Passed if all constraints are followed; the detail names the first that is not."""
    try:
        constraints, mode = parse(reference)
    except DataError as problem:
        return Verdict.error(str(problem))
    texts = variants(completion, mode)
    for constraint in constraints:
        found = constraint.found(texts)
        if found is not None:
            return Verdict.of(False, f"{constraint.id}: {found}")
    return Verdict.of(True, f"{len(constraints)} constraints followed ({mode})")


def followed(completion: str, reference: Mapping[str, Any]) -> list[bool]:
    """Which constraints the completion follows, in the reference's order.

    Raises:
        DataError: the reference can't be used.
    """
    constraints, mode = parse(reference)
    texts = variants(completion, mode)
    return [constraint.found(texts) is None for constraint in constraints]


def fraction(completion: str, reference: Mapping[str, Any]) -> float:
    """The share of the constraints that the completion follows, 0 to 1.

    Raises:
        DataError: the reference can't be used.
    """
    outcomes = followed(completion, reference)
    return sum(outcomes) / len(outcomes)


def variants(completion: str, mode: str) -> list[str]:
    """The texts of which one must follow a constraint, the completion itself first; blank ones are left out."""
    texts = [completion]
    if mode == "loose":
        lines = completion.split("\n")
        texts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        texts += [text.replace("*", "") for text in texts]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def parse(reference: Mapping[str, Any]) -> tuple[list[Constraint], str]:
    """The constraints and the mode of a reference.

    IFEval's own columns `instruction_id_list` and `kwargs` are understood too. Arguments that are null are taken as
    absent, since tables give every constraint the columns of all.

    Raises:
        DataError: an unknown id, a missing or wrong argument, an unknown mode, or no constraint at all.
    """
    mode = reference.get("mode") or "strict"
    if mode not in ("strict", "loose"):
        raise DataError(f"reference.mode: found {mode!r}, expected 'strict' or 'loose'")
    entries = reference.get("constraints")
    if entries is None and isinstance(ids := reference.get("instruction_id_list"), list):
        kwargs = [{}] * len(ids) if reference.get("kwargs") is None else reference["kwargs"]
        if not isinstance(kwargs, list) or len(kwargs) != len(ids):
            raise DataError(f"reference.kwargs: expected a list of {len(ids)}, one for each of instruction_id_list")
        entries = [{"id": i, "kwargs": k} for i, k in zip(ids, kwargs, strict=True)]
    if not isinstance(entries, list) or not entries:
        raise DataError('reference.constraints: expected a list of one or more {"id": ..., "kwargs": {...}}')
    return [_constraint(f"reference.constraints[{i}]", entry) for i, entry in enumerate(entries)], mode


def _constraint(where: str, entry: Any) -> Constraint:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
        raise DataError(f'{where}: expected {{"id": ..., "kwargs": {{...}}}}, found {entry!r:.200}')
    name = entry["id"]
    if name not in CHECKS:
        raise DataError(f"{where}.id: unknown constraint {name!r:.200}; did you mean {_nearest(name, CHECKS)!r}?")
    given = entry.get("kwargs") or {}
    if not isinstance(given, Mapping):
        raise DataError(f"{where}.kwargs: expected an object, found {given!r:.200}")
    given = {key: value for key, value in given.items() if value is not None}
    arguments = CHECKS[name].arguments
    for key in given:
        if key not in arguments:
            hint = f"; did you mean {_nearest(key, arguments)!r}?" if arguments else f"; {name} takes no arguments"
            raise DataError(f"{where}.kwargs.{key}: unknown argument of {name}{hint}")
    for key, kind in arguments.items():
        if key not in given:
            raise DataError(f"{where}.kwargs.{key}: missing; {name} needs {', '.join(arguments)}")
        problem = argument_problem(kind, given[key])
        if problem:
            raise DataError(f"{where}.kwargs.{key}: {problem}")
        if kind in ("count", "place"):
            given[key] = int(given[key])
    if given.get("nth_paragraph", 0) > given.get("num_paragraphs", 0):
        raise DataError(f"{where}.kwargs.nth_paragraph: {given['nth_paragraph']} is past the last of num_paragraphs")
    return Constraint(name, given)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    match = process.extractOne(name[:200], list(known))
    return match[0] if match else next(iter(known))
