"""The equations that a worked solution states: do they hold, and which path do they make?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from reward.arithmetic import MOST_CHARACTERS, plain_signs, value

_OPERATION = re.compile(r"\d[\s)%]*[-+−*/^÷×·xX]")
_PLAIN = "0123456789.,+-*/^×÷·xX()$% \t−"


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation of a worked solution, and whether both sides are equal to within 1e-3."""

    left: str
    right: str
    holds: bool


def equations(text: str) -> list[Equation]:
    """The equations that a solution states, in order.

    GSM8K's annotations `<<48/2=24>>` where there are any, and only those; otherwise the plain ones such as "3 + 4 = 7".
    An annotation that is no arithmetic does not hold; plain text that is none is no equation.
    """
    annotated = re.findall(r"<<([^<>]*)>>", text)
    if annotated:
        return [_equation(*note.rpartition("=")[::2]) for note in annotated]
    found = []
    for line in text.split("\n"):
        sides = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line).split("=")
        for left, right in pairwise(sides):
            if not _OPERATION.search(left, max(0, len(left) - MOST_CHARACTERS)):
                continue
            equation = _equation(_last_expression(left), _first_expression(right))
            if _OPERATION.search(plain_signs(equation.left)) and value(equation.right) is not None:
                found += [equation] if value(equation.left) is not None else []
    return found


def equations_hold(text: str) -> bool:
    """Whether every equation that the text states is right; a text without equations states nothing wrong."""
    return all(equation.holds for equation in equations(text))


def equation_key(text: str) -> str:
    """What makes two solutions the same path (RFT, arXiv:2308.01825): their ordered equations, spaces removed."""
    return "|".join("".join(f"{equation.left}={equation.right}".split()) for equation in equations(text))


def _equation(left: str, right: str) -> Equation:
    a, b = value(left), value(right)
    holds = a is not None and b is not None and abs(a - b) < Fraction(1, 1000)
    if not holds and "%" in right:  # "45 + 21 = 66%"
        return _equation(left, right.replace("%", ""))
    return Equation(left.strip(), right.strip(), holds)


def _last_expression(text: str) -> str:
    """The arithmetic that `text` ends with; nothing where it goes on to the left in words ("5 apples + 2")."""
    before = text.rstrip(_PLAIN)
    found = text[len(before) :][-MOST_CHARACTERS:]
    if before and before[-1] not in ":;,(" and found.lstrip()[:1] in tuple("+-*/^×÷·−"):
        return ""
    found = re.split(r"[,.]\s", found)[-1].strip(" \t,.")
    if before and before[-1].isalpha():  # "six", "max"
        found = found.lstrip("xX ")
    while found.count("(") > found.count(")") and found.startswith("("):
        found = found[1:].lstrip()
    return found


def _first_expression(text: str) -> str:
    """The arithmetic that `text` begins with; nothing where a letter stuck to it makes it algebra ("5A")."""
    after = text.lstrip(_PLAIN)
    found = text[: len(text) - len(after)][:MOST_CHARACTERS]
    if after[:1].isalpha() and not found[-1:].isspace():
        return ""
    found = re.split(r"[,.]\s", found)[0].strip(" \t,.")
    while found.count(")") > found.count("(") and found.endswith(")"):
        found = found[:-1].rstrip()
    return found.rstrip("(+-*/ ")
