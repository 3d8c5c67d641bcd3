"""What a writer or a judge said, read strictly: an instruction that no rule stops, one word of several."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

from align.core.asking import NOT_SAMPLED, MalformedError

RULED = "by rule: "
"""How the problem of an answer begins that could be read but that an elimination rule stops."""
UNREADABLE = "the writer's answer can't be read"

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)


def schema_of(names: Sequence[str]) -> str:
    """The JSON schema of an object of these texts."""
    texts = {name: {"type": "string"} for name in names}
    return json.dumps({"type": "object", "properties": texts, "required": list(names), "additionalProperties": False})


def read_instruction(text: str, rule: Callable[[str], str | None]) -> str:
    """The instruction in a writer's answer: of its JSON object, or the whole answer where it doesn't begin as one.

    Raises:
        MalformedError: it can't be read, or the rule has a reason against it (`RULED`).
    """
    said = _unfenced(text)
    if said.startswith("{") and not said.startswith("{{"):
        said = _of_object(said, "instruction").strip()
    problem = rule(said)
    if problem is not None:
        raise MalformedError(f"{RULED}{problem}")
    return said


def why_lost(problem: str) -> str:
    """The reason that is counted, from the problem of an answer's last attempt."""
    if problem.startswith(RULED):
        return problem.removeprefix(RULED)
    return NOT_SAMPLED if problem.startswith(NOT_SAMPLED) else UNREADABLE


def read_word(text: str, allowed: Iterable[str]) -> str:
    """One word of those allowed: `verdict` of a JSON object, or the whole answer.

    Raises:
        MalformedError: anything else.
    """
    said = _unfenced(text)
    word = (_of_object(said, "verdict") if said.startswith("{") else said).strip(" .\"'`*\n").lower()
    if word not in allowed:
        raise MalformedError(f"found {word[:40]!r}, expected {', '.join(allowed)}")
    return word


def _unfenced(text: str) -> str:
    found = _FENCE.fullmatch(text.strip())
    return (found.group(1) if found else text).strip()


def _of_object(said: str, name: str) -> str:
    try:
        value = json.loads(said, strict=False)[name]
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise MalformedError(f"no JSON object with {name!r}: {said[:80]!r}") from problem
    if not isinstance(value, str):
        raise MalformedError(f"{name!r} is no text: {said[:80]!r}")
    return value
