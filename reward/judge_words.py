"""Reading a judge's own words: a score or a winner, said plainly at the end, or nothing.

Only what the judge wrote is read, never what it was shown. The verdict stands at the end: a JSON object
(`{"score": 7}`, in a code fence or not), a line of its own (`Score: 7`), or the bare value as the whole answer. What
comes before is reasoning; where that holds another verdict of the same form, the answer contradicts itself and is not
read: a judge that quotes "Score: 10" from the text before it must not be taken to have said so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from align.core.asking import MalformedError

Side = Literal["A", "B", "tie"]
Said = TypeVar("Said", float, Side)

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_LINE = r"^[ \t>#*_`-]*(?:final[ \t]+)?{word}[ \t*_`]*[:：][ \t*_`]*(?P<value>{value})[ \t*_`.]*$"
_SCORE_LINE = re.compile(
    _LINE.format(word="score", value=rf"{_NUMBER}(?:[ \t]*/[ \t]*{_NUMBER})?"), re.MULTILINE | re.IGNORECASE
)
_WINNER_LINE = re.compile(_LINE.format(word="winner", value=r"(?:answer[ \t]+)?[AB]|tie"), re.MULTILINE | re.IGNORECASE)
_VERDICT_LINE = re.compile(_LINE.format(word="verdict", value="yes|no"), re.MULTILINE | re.IGNORECASE)
_NOTHING_MORE = re.compile(r"[\s`*]*")
_DECODER = json.JSONDecoder(strict=False)  # models leave line breaks in texts as they are


def read_score(text: str, lowest: float, highest: float) -> float:
    """The score in a judge's answer; a line may also say `Score: 7/10`, where 10 is the highest score.

    Raises:
        MalformedError: no score at the end, several that differ, or a number outside the scale.
    """
    body = own_words(text)
    try:
        bare = json.loads(body)
    except (ValueError, RecursionError):
        bare = None
    if isinstance(bare, (int, float)) and not isinstance(bare, bool):
        return _on_scale(bare, lowest, highest)
    return _only([_number(said, lowest, highest) for said in _statements(body, "score", _SCORE_LINE)])


def read_winner(text: str) -> Side:
    """Which of the answers A and B a judge named, or that it found neither better.

    Raises:
        MalformedError: no winner at the end, or several that differ.
    """
    body = own_words(text)
    if len(body) <= len("**tie**"):
        bare = body.strip("*.` ").lower()
        if bare in _SIDES:
            return _SIDES[bare]
    return _only([_side(said) for said in _statements(body, "winner", _WINNER_LINE)])


def read_yes_no(text: str) -> bool:
    """Whether a judge said yes: bare, on a line `Verdict: yes`, or as `{"verdict": "yes"}`.

    Raises:
        MalformedError: neither yes nor no at the end, or both.
    """
    body = own_words(text)
    bare = body.strip('*.`" ').lower()
    if bare in _YES_NO:
        return _YES_NO[bare]
    said = _statements(body, "verdict", _VERDICT_LINE)
    values = [value if isinstance(value, str) else value[0] for value in said]
    answers = [_YES_NO.get(value.strip().lower()) if isinstance(value, str) else None for value in values]
    if None in answers:
        raise MalformedError(f"neither yes nor no as verdict: {_shown(str(values[answers.index(None)]))}")
    if len(set(answers)) > 1:
        raise MalformedError("the answer contradicts itself: yes and no")
    return bool(answers[0])


_YES_NO = {"yes": True, "no": False}
_SIDES: dict[str, Side] = {"a": "A", "b": "B", "tie": "tie", "answer a": "A", "answer b": "B"}


def own_words(text: str) -> str:
    """The answer without the thinking before it that some models mark, and out of its fence where it is all in one."""
    body = text.strip()
    if body.startswith("<think>"):  # and only then: a judge may quote the mark
        body = body.partition("</think>")[2].strip()
    found = _FENCE.fullmatch(body)
    return found.group(1).strip() if found else body


def _statements(body: str, word: str, line: re.Pattern[str]) -> list[Any]:
    """All that the text says of the word: values in JSON objects and texts of lines, in order.

    Raises:
        MalformedError: there is none, or the last one is not at the text's end.
    """
    lines = ((m.start(), m.end(), m["value"]) for m in line.finditer(body))
    found = sorted([*_objects(body, word), *lines], key=lambda statement: statement[0])
    if not found:
        raise MalformedError(f"no {word}: {_shown(body)}")
    if not _NOTHING_MORE.fullmatch(body, max(end for _, end, _ in found)):
        raise MalformedError(f"the {word} is not at the end: {_shown(body)}")
    return [value for _, _, value in found]


def _objects(body: str, word: str) -> Iterator[tuple[int, int, Any]]:
    """The JSON objects in a text that have the word as a key: where each begins and ends, and the value in it."""
    start = body.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(body, start)
        except (ValueError, RecursionError):
            start = body.find("{", start + 1)
            continue
        if word in value:
            yield start, end, [value[word]]  # in a list, to tell it from a line's text
        start = body.find("{", end)


def _number(said: Any, lowest: float, highest: float) -> float:
    if isinstance(said, str):
        value, _, of = said.partition("/")
        if of and float(of) != highest:
            raise MalformedError(f"a score out of {of.strip()}, but the highest is {highest:g}: {_shown(said)}")
        return _on_scale(float(value), lowest, highest)
    (value,) = said
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MalformedError(f"no number as score: {_shown(str(value))}")
    return _on_scale(value, lowest, highest)


def _on_scale(value: float, lowest: float, highest: float) -> float:
    if not lowest <= value <= highest:
        raise MalformedError(f"the score {str(value)[:40]} is not between {lowest:g} and {highest:g}")
    return float(value)


def _side(said: Any) -> Side:
    value = said if isinstance(said, str) else said[0]
    side = _SIDES.get(" ".join(value.lower().split())) if isinstance(value, str) else None
    if side is None:
        raise MalformedError(f"neither A, B nor tie as winner: {_shown(str(value))}")
    return side


def _only(values: list[Said]) -> Said:
    """The one value that all statements agree on."""
    if len(set(values)) > 1:
        raise MalformedError(f"the answer contradicts itself: {', '.join(map(str, values))[:80]}")
    return values[0]


def _shown(text: str) -> str:
    """The end of a text, where a verdict was expected."""
    return repr(text if len(text) <= 80 else f"…{text[-80:]}")
