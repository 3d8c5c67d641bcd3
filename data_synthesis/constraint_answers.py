"""What models answer to the stage `constraints`, read strictly: lines, functions with cases, a sentence, a relation."""

from __future__ import annotations

import json
import re
from typing import Any

from align.core.asking import MalformedError
from reward.constraint_library import problem_of, truth
from reward.judge_words import own_words

RELATIONS = ("entailment", "neutral", "contradiction")

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")
_SPELT = re.compile(r'("output"\s*:\s*)(True|False)\b')
_TEXT = {"type": "string"}


def _schema(**properties: Any) -> str:
    found = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return json.dumps(found)


FUNCTION_SCHEMA = _schema(
    func=_TEXT,
    cases={
        "type": "array",
        "items": {
            "type": "object", "properties": {"input": _TEXT, "output": {"type": "boolean"}},
            "required": ["input", "output"], "additionalProperties": False,
        },
    },
)  # fmt: skip
RELATION_SCHEMA = _schema(relation={"type": "string", "enum": list(RELATIONS)})


def read_lines(text: str) -> list[str]:
    """The lines of an answer, without numbers and bullets before them and quotation marks around them.

    Raises:
        MalformedError: there is none.
    """
    lines = [_BULLET.sub("", line).strip().strip('"') for line in own_words(text).splitlines()]
    lines = [line for line in lines if line and not line.endswith(":")]  # "Here are fifty more:"
    if not lines:
        raise MalformedError("no line of text")
    return lines


def read_function(text: str) -> tuple[str, list[tuple[str, bool]]]:
    """A function's source and its cases: JSON alone, or in the only code fence.

    Python's True and False are understood where the outcome of a case stands, and line breaks that were escaped twice.

    Raises:
        MalformedError: no such JSON object, a case without a text and an outcome, or no case.
    """
    found = _json(text)
    function, cases = found.get("func"), found.get("cases")
    if not isinstance(function, str) or not function.strip():
        raise MalformedError("no text under func")
    if not isinstance(cases, list) or not cases:
        raise MalformedError("no list under cases")
    read = []
    for case in cases:
        outcome = truth(case.get("output")) if isinstance(case, dict) else None
        if outcome is None or not isinstance(case.get("input"), str):
            raise MalformedError(f"a case that is no text with true or false: {case!r:.80}")
        read.append((case["input"], outcome))
    function = function.strip()
    return (function if "\n" in function else function.replace("\\n", "\n")) if problem_of(function) else function, read


def read_sentence(text: str) -> str:
    """One line of text.

    Raises:
        MalformedError: none, or several.
    """
    lines = [line.strip() for line in own_words(text).splitlines() if line.strip()]
    if len(lines) != 1:
        raise MalformedError(f"{len(lines)} lines, one sentence was expected")
    return lines[0].strip('"')


def read_relation(text: str) -> str:
    """One of `RELATIONS`: alone, or under `relation` of a JSON object.

    Raises:
        MalformedError: anything else.
    """
    bare = own_words(text).strip("*.` \n").lower()
    said = bare if bare in RELATIONS else _json(text).get("relation")
    if not isinstance(said, str) or said.lower() not in RELATIONS:
        raise MalformedError(f"none of {', '.join(RELATIONS)}: {said!r:.80}")
    return said.lower()


def _json(text: str) -> dict[str, Any]:
    body = own_words(text)
    fenced = _FENCE.findall(body)
    body = fenced[0] if len(fenced) == 1 else body
    for attempt in (body, _SPELT.sub(lambda match: match[1] + match[2].lower(), body)):
        try:
            found = json.loads(attempt, strict=False)  # models leave line breaks in texts as they are
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise MalformedError(f"no JSON object: {body[:80]!r}")
