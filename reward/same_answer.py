r"""Whether two mathematical answers mean the same: "72", "$72.00" and "72 clips"; `\frac12`, `1/2` and "0.5".

Compared as text after a normalisation of our own; then exactly, as fractions, where both are numbers; then part by part
(tuples, intervals, sets, matrices); and formulas by their values at three points. Nothing is ever run as code.
"""

from __future__ import annotations

import re
from fractions import Fraction
from string import ascii_letters

from reward.arithmetic import MOST_CHARACTERS, value, value_at

NUMBER = r"[-+−]?[^\S\n]*\$?[^\S\n]*[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
"""A number as people write it: sign, currency, thousands separators, decimals, exponent."""

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNWRAP = re.compile(r"\\(?:text|mbox|math|operatorname|boldsymbol)(?:bf|it|rm|sf|tt|bb|cal)?\s*\{([^{}]*)\}")
_SPACING = re.compile(
    r"\\!\s*|\\[,;:> ]|~|\\(?:left|right|displaystyle|quad|qquad|[bB]igg?[lr]?)(?![A-Za-z])"
    r"|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|°|\\degrees?"
)
_SPELLINGS = {
    "−": "-", "–": "-", "×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "√": r"\sqrt ",
    "≤": r"\le ", "≥": r"\ge ", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le",
    r"\geq": r"\ge", r"\lbrace": r"\{", r"\rbrace": r"\}", "{,}": ",", r"\%": "%", r"\$": "$",
    r"\(": "", r"\)": "", r"\[": "", r"\]": "",
}  # fmt: skip
_POINTS = [{x: 0.5 + (37 * ord(x) + 61 * point) % 97 / 67 for x in ascii_letters} for point in range(3)]
_BRACKETS = ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"))
_MOST_PARTS = 50


def same_answer(answer: str, expected: str) -> bool:
    """Whether two answers mean the same; an empty one is the same as nothing."""
    if max(len(answer), len(expected)) > 4 * MOST_CHARACTERS:
        return bool(answer.strip()) and answer.split() == expected.split()
    a, b = _normalised(answer), _normalised(expected)
    if not a or not b:
        return False
    if a == b or (a.isalpha() and a.casefold() == b.casefold()):
        return True
    number_a, number_b = _number(a), _number(b)
    if number_a is not None and number_b is not None:
        return number_a == number_b
    if number_a is not None or number_b is not None:  # "10 + 5" is a way to 15, not yet an answer; 5 × 10^4 is one
        power_of_ten = r"-?[\d.]+\\(?:times|cdot)10\^\{?-?\d+\}?"
        return re.fullmatch(power_of_ten, a if number_a is None else b) is not None and value(a) == value(b)
    return _same_parts(a, b) or _same_formula(a, b)


def _normalised(answer: str) -> str:
    """One spelling of an answer: no mark-up, currency, degrees, units in words, thousands separators or spacing."""
    text = answer.replace(r"\\", "\n") if r"\begin" in answer else answer.replace("\n", " ")  # a matrix keeps its rows
    for one, other in _SPELLINGS.items():
        text = text.replace(one, other)
    for _ in range(3):  # \text{} may stand inside \text{}
        text = _UNWRAP.sub(r" \1 ", text)
    text = _SPACING.sub("", text).replace("$", "").strip(" \t*_`")
    text = re.sub(r"\.\s*\Z", "", text)
    text = re.sub(r"^(?:[A-Za-z]+(?:\([a-z]\))?\s*=|[A-Za-z]\s*\\in(?![A-Za-z]))(?=[^=]*\Z)", "", text)  # "x = 5"
    text = re.sub(r"^\(\s*([A-Za-z])\s*\)\Z", r"\1", text)  # choice (D)
    text = re.sub(r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<=\d)\s+(\d+)\s*/\s*(\d+)\s*\Z", r"\\frac{\1}{\2}", _without_units(text))  # 1 1/2
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*(\w)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    return re.sub(r"(?<!\d)[^\S\n]+|[^\S\n]+(?!\d)", "", text).strip("\n")  # "7 2" is not 72


def _without_units(text: str) -> str:
    """A number without the words after it ("72 clips", "5 km/h", "20%"), times the scale they name ("2 million")."""
    match = re.match(
        rf"(?:{NUMBER}(?:\s*/\s*\d+)?|[-+]?\s*\d*\s*\\frac\s*(?:\{{\d+\}}\s*\{{\d+\}}|\d\d))(?=[\s%/]|\Z)", text
    )
    if not match:
        return text
    number, after = match[0], text[match.end() :].replace("%", " ")
    words = re.findall(r"[A-Za-z]+|[^A-Za-z\s]", after)
    for before, word in zip(["", *words], words, strict=False):
        is_unit = len(word) > 1 and word.lower() not in ("am", "pm")
        if not (is_unit or before in ("/", "per") or (before and word in "/.,^-()2")):
            return text
    scale = _SCALES.get(words[0].lower()) if words else None
    exact = _number("".join(number.replace(",", "").split())) if scale else None
    return number if scale is None or exact is None else str(exact * scale)


def _number(text: str) -> Fraction | None:
    """The exact value of a plain number, a fraction or a mixed number; None for a sum, a product or a formula."""
    plain = r"[-+]*(?:[\d.]+(?:[eE][-+]?\d+)?(?:/[-+]?[\d.]+)?|\d*\\frac\{-?\d+\}\{-?\d+\})"
    return value(text) if re.fullmatch(plain, text) else None


def _same_parts(a: str, b: str) -> bool:
    """Tuples, intervals and matrices in order; sets, bare lists and unions of intervals in any order."""
    if r"\cup" in a and r"\cup" in b:
        return _same_list(a.split(r"\cup"), b.split(r"\cup"), ordered=False)
    if a.startswith(r"\begin{") and b.startswith(r"\begin{"):
        rows_a, rows_b = (re.sub(r"\\(?:begin|end)\{[^}]*\}", "", m).strip("\n").split("\n") for m in (a, b))
        return len(rows_a) == len(rows_b) and all(
            _same_list(x.split("&"), y.split("&"), ordered=True) for x, y in zip(rows_a, rows_b, strict=True)
        )
    (brackets, parts_a), (brackets_b, parts_b) = _split(a), _split(b)
    if brackets != brackets_b or (len(parts_a) < 2 and brackets != r"\{\}"):
        return False
    return _same_list(parts_a, parts_b, ordered=brackets not in ("", r"\{\}"))


def _same_list(a: list[str], b: list[str], ordered: bool) -> bool:
    if len(a) != len(b) or len(a) > _MOST_PARTS:
        return False
    if ordered:
        return all(same_answer(x, y) for x, y in zip(a, b, strict=True))
    left = list(b)
    for x in a:
        match = next((y for y in left if same_answer(x, y)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _split(text: str) -> tuple[str, list[str]]:
    """The brackets around a list, and what its commas separate at the outermost level."""
    brackets = ""
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            brackets, text = opening + closing, text[len(opening) : -len(closing)]
            break
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return brackets, parts


def _same_formula(a: str, b: str) -> bool:
    """Whether two formulas have the same value at three points; words are no formulas."""
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}", f"{a} {b}") or a.count("=") != b.count("="):
        return False
    if "=" in a:
        return all(same_answer(x, y) for x, y in zip(a.split("="), b.split("="), strict=True))
    for point in _POINTS:
        x, y = value_at(a, point), value_at(b, point)
        if x is None or y is None or abs(x - y) > 1e-9 * max(abs(x), abs(y), 1e-3):
            return False
    return True
