r"""Whether two mathematical answers mean the same: "72", "$72.00" and "72 clips"; `\frac12`, `1/2` and "0.5".

Plain numbers are compared first and exactly. Else both are brought to one spelling and compared as text; as numbers and
percentages; part by part (lists, tuples, intervals, sets, matrices); as formulas and equations, by their values at
points. What that can't tell is None, and goes to math-verify where it is there (`reward.formulas`). Nothing is ever run
as code.
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable
from fractions import Fraction
from string import ascii_letters

from reward.arithmetic import MOST_CHARACTERS, value, value_at
from reward.spellings import PLAIN_NUMBER, normalised, number

AskFormulas = Callable[[str, str], bool | None]
"""Whether an answer and the expected formula mean the same, for what can't be told here; None where it can't either."""

_QUICK = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,18})", re.ASCII)
_NAME = re.compile(  # what an answer may be said to be: x, AB, x_1, f(x), P(A), \angle ABC, \sin\theta
    r"(?:[A-Za-z]{1,40}|\\(?:angle|triangle|sin|cos|tan|cot|sec|csc) ?(?:[A-Za-z]{1,3}|\\[a-z]+)|\\(?!frac|sqrt)[a-z]+)"
    r"(?:_(?:\w|\{\w+\}))?'?(?:\([A-Za-z](?:,[A-Za-z])*\))?"
)
_GREEK = "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega".split()
_LETTERS = [*ascii_letters, *("\\" + name for name in _GREEK)]
_POINTS = [{x: 0.5 + (37 * ord(x[-1]) + 5 * len(x) + 61 * point) % 97 / 67 for x in _LETTERS} for point in range(3)]
_CONSTANTS = {"i": 1j, "e": cmath.e}
"""What the two letters mean in most formulas; both readings are tried."""
_AFTER_COMMAND = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_TELLS_A_SET = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|mathbb|setminus)(?![A-Za-z])")
_PM = r"\pm"
_PLUS_MINUS = re.compile(r"(?<![\w)}])\\pm(?![A-Za-z])\s?")
_BRACKETS = ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("{", "}"))
_MOST_PARTS = 50
_DEEPEST = 4


def same_answer(answer: str, expected: str, ask: AskFormulas | None = None) -> bool:
    """Whether two answers certainly mean the same; an empty one is the same as nothing."""
    return compare(answer, expected, ask) is True


def compare(answer: str, expected: str, ask: AskFormulas | None = None) -> bool | None:
    """Whether an answer means the expected one; None where that can't be told.

    Where the expected answer is a number, the answer must be one too: "10 + 5" is a way to 15, not yet an answer.

    Args:
        answer: what was found.
        expected: what is right.
        ask: asked about formulas that can't be evaluated here.
    """
    if _QUICK.fullmatch(answer) and _QUICK.fullmatch(expected):
        return int(answer.replace(",", "")) == int(expected.replace(",", ""))
    return _compare(answer, expected, ask, 0)


def _compare(answer: str, expected: str, ask: AskFormulas | None, depth: int) -> bool | None:
    if max(len(answer), len(expected)) > 4 * MOST_CHARACTERS or depth > _DEEPEST:
        return bool(answer.strip()) and answer.split() == expected.split()
    a, b = normalised(answer), normalised(expected)
    if not a or not b:
        return False
    if _AFTER_COMMAND.sub("", a) == _AFTER_COMMAND.sub("", b):
        return True
    if a.casefold() == b.casefold() and (a.isalpha() or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", a)):
        return True  # words; "2AB" is not "2ab"
    digits, base = _based(b)
    if base:  # 52 will do for 52_8: the question asks for that base
        return _based(a) in ((digits, base), (digits, ""))
    a, b = _without_names(a, b)
    number_a, number_b = number(a), number(b)
    if number_a is not None and number_b is not None:
        return number_a == number_b or _same_percent(answer, number_a, expected, number_b)
    if number_b is not None:
        power_of_ten = r"-?[\d.]+\\(?:times|cdot)10\^\{?-?\d+\}?"  # 5 × 10^4
        return re.fullmatch(power_of_ten, a) is not None and value(a) == number_b
    if number_a is not None and ((exact := value(b)) is not None or "." in a):
        return number_a == exact
    if (number_a is None and PLAIN_NUMBER.fullmatch(a)) or PLAIN_NUMBER.fullmatch(b):
        return False  # too large for a number, and not the same text
    return _same_parts(a, b, ask, depth) if _has_parts(a) or _has_parts(b) else _same_formula(a, b, ask)


def _based(text: str) -> tuple[str, str]:
    """The digits of a number such as 52_8, and its base; the text and nothing for any other."""
    found = re.fullmatch(r"(-?\w+?)_(?:(\d+)|\{(\d+)\})", text)
    return (found[1], found[2] or found[3]) if found and found[1][-1].isdigit() else (text, "")


def _without_names(a: str, b: str) -> tuple[str, str]:
    """Both without "x =" before them, unless one is an equation proper.

    Of a chain "x = 3 + 4 = 7" the last part counts, if what stands before it is a name or has the same value.
    """
    if "=" not in a and "=" not in b:
        return a, b
    stripped = []
    for text in (a, b):
        *before, last = text.split("=")
        named = last and all(_NAME.fullmatch(part) or _equal_values(part, last) for part in before)
        stripped.append(last if named else text)
    return (a, b) if any("=" in text for text in stripped) else (stripped[0], stripped[1])


def _equal_values(part: str, last: str) -> bool:
    exact = value(part)
    return exact is not None and exact == value(last)


def _same_percent(a: str, number_a: Fraction, b: str, number_b: Fraction) -> bool:
    """25% is 0.25 as well as 25, which is how "what percentage?" is answered."""
    percent_a, percent_b = _is_percent(a), _is_percent(b)
    return percent_a != percent_b and (number_a / 100 == number_b if percent_a else number_b / 100 == number_a)


def _is_percent(answer: str) -> bool:
    text = answer.rstrip(" \t.$*)\\")
    return text.endswith("%") or text[-7:].lower() == "percent"


def _has_parts(text: str) -> bool:
    return r"\cup" in text or r"\begin{" in text or _list_of(text) is not None


def _same_parts(a: str, b: str, ask: AskFormulas | None, depth: int) -> bool | None:
    """Tuples, intervals and matrices in order; sets, bare lists and unions of intervals in any order."""
    if r"\cup" in a and r"\cup" in b:
        return _same_list(a.split(r"\cup"), b.split(r"\cup"), False, ask, depth)
    if a.startswith(r"\begin{") and b.startswith(r"\begin{") and ("vmatrix" in a) == ("vmatrix" in b):
        rows = [re.sub(r"\\(?:begin|end)\{[^}]*\}(?:\{[lcr|]*\})?", "", m).strip("\n").split("\n") for m in (a, b)]
        return _all([_same_list(x.split("&"), y.split("&"), True, ask, depth) for x, y in _zipped(*rows)])
    list_a, list_b = _list_of(a), _list_of(b)
    if list_a is None or list_b is None:  # an interval may be told as an inequality
        others = [text for text, its_list in ((a, list_a), (b, list_b)) if its_list is None]
        return _same_formula(a, b, ask) if all(map(_TELLS_A_SET.search, others)) else False
    (brackets_a, parts_a), (brackets_b, parts_b) = list_a, list_b
    loose = brackets_a in ("", r"\{\}") and brackets_b in ("", r"\{\}")  # {1, 2} and "1, 2" are the same solutions
    if brackets_a != brackets_b and not loose:
        return False
    return _same_list(parts_a, parts_b, not loose, ask, depth)


def _zipped(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    """The pairs of two lists of one length; a pair that nothing can make equal where they differ in length."""
    return list(zip(a, b, strict=True)) if len(a) == len(b) <= _MOST_PARTS else [("", "")]


def _same_list(a: list[str], b: list[str], ordered: bool, ask: AskFormulas | None, depth: int) -> bool | None:
    if len(a) != len(b) or len(a) > _MOST_PARTS:
        return False
    if ordered:
        return _all([_compare(x, y, ask, depth + 1) for x, y in zip(a, b, strict=True)])
    left, unknown = list(b), False
    for x in a:
        for y in left:
            same = _compare(x, y, ask, depth + 1)
            unknown = unknown or same is None
            if same:
                left.remove(y)
                break
        else:
            return None if unknown else False
    return True


def _all(found: list[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def _list_of(text: str) -> tuple[str, list[str]] | None:
    r"""The brackets around a list, and what its commas separate at the outermost level; None for no list.

    `1 \pm \sqrt{2}` is the list of both.
    """
    if text.count(_PM) == 1 and r"\pmod" not in text:
        text = f"{_PLUS_MINUS.sub('', text).replace(_PM, '+')},{text.replace(_PM, '-')}"
    brackets = ""
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing) and _closes_at(text) == len(text) - 1:
            brackets, text = opening + closing, text[len(opening) : -len(closing)]
            break
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    brackets = r"\{\}" if brackets == "{}" and len(parts) > 1 else brackets
    return (brackets, parts) if len(parts) > 1 or brackets == r"\{\}" else None


def _closes_at(text: str) -> int:
    """Where the first bracket of a text is closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ")]}":
            return place
    return -1


def _same_formula(a: str, b: str, ask: AskFormulas | None) -> bool | None:
    """Whether two formulas or equations have the same values; words are no formulas."""
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}|[^\x00-\x7f]", f"{a} {b}") or (a.isalpha() and b.isalpha()):
        return False
    name, _, what = b.partition("=")
    if a.count("=") != b.count("=") or (_NAME.fullmatch(name) and number(what) is not None):
        return False  # "2x = 4" is a way to "x = 2"
    found = _same_equation(a, b) if a.count("=") == 1 else None if "=" in a else _same_values(a, b)
    return ask(a, b) if found is None and ask is not None else found


def _same_equation(a: str, b: str) -> bool | None:
    """Whether the differences of the sides are the same up to a factor; None where they can't be evaluated."""
    ratios = []
    for point in _POINTS:
        sides = [value_at(side, point) for equation in (a, b) for side in equation.split("=")]
        if None in sides:
            return None
        left, right, other_left, other_right = (complex(side or 0) for side in sides)
        if abs(other_left - other_right) < 1e-9:
            return None
        ratios.append((left - right) / (other_left - other_right))
    return abs(ratios[0]) > 1e-9 and all(_near(ratio, ratios[0]) for ratio in ratios)


def _same_values(a: str, b: str) -> bool | None:
    """Whether two formulas have the same value at three points; None where one can't be evaluated."""
    for constants in ({}, _CONSTANTS) if re.search("[ie]", a + b) else ({},):
        values = [(value_at(a, point | constants), value_at(b, point | constants)) for point in _POINTS]
        if any(x is None or y is None for x, y in values):
            return None
        if all(_near(complex(x or 0), complex(y or 0)) for x, y in values):
            return True
    return False


def _near(x: complex, y: complex) -> bool:
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-3)
