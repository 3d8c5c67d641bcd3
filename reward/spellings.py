r"""One spelling of a mathematical answer: no mark-up, currency, units or thousands separators; and plain numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from reward.arithmetic import value

NUMBER = (
    r"[-+−]?[^\S\n]*[$€£¥₹]?[^\S\n]*[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
)
"""A number as people write it: sign, currency, thousands separators, decimals, exponent."""

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_TEXT = r"\\(?:text|mbox|math|operatorname|boldsymbol)(?:bf|it|rm|sf|tt|cal|normal|up)?"
_UNWRAP = re.compile(_TEXT + r"\s*\{([^{}]*)\}")
_FUNCTION = re.compile(
    r"\\(?:operatorname|mathrm|text)\s*\{\s*(arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln)\s*\}"
)
_UNIT = re.compile(  # 6\sqrt{3}\text{ cm}^2: what a formula is measured in
    rf"(?<=[\w)}}\]])(?:\\[,;:! ]|\s)*{_TEXT}\s*\{{(?!\s*(?:[ap]\.?m\b|(?:hundred|\w+illion|thousand)\b))"
    r"[^{}\d=]*[A-Za-z][^{}\d=]*\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?\s*[.$]*\s*\Z"
)
_BARE_UNIT = re.compile(
    r"(?<=[\w)}])\s+(?:(?:square|cubic|sq\.?|cu\.?)\s*)?(?:units?|inch(?:es)?|feet|foot|ft|miles?|yards?|[mck]m|[km]?g|"
    r"(?:centi|kilo|milli)?met(?:er|re)s?|degrees?|radians?|hours?|minutes?|seconds?|days?|dollars?|cents?)"
    r"(?:\s*\^\s*\{?[23]\}?)?\s*\.?\s*\Z"
)
_SPACING = re.compile(
    r"\\!\s*|\\[,;:> ]|~|\\(?:left|right|displaystyle|quad|qquad|[bB]igg?[lr]?)(?![A-Za-z])"
    r"|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|°|\\degrees?"
)
_SPELLINGS = {
    "−": "-", "–": "-", "×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
    "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "·": r"\cdot ", "∅": r"\emptyset ",
    "½": r"\frac{1}{2}", "²": "^2", "³": "^3", r"\varnothing": r"\emptyset ", r"\dfrac": r"\frac", r"\tfrac": r"\frac",
    r"\cfrac": r"\frac", r"\leqslant": r"\le ", r"\geqslant": r"\ge ", r"\leq": r"\le ", r"\geq": r"\ge ",
    r"\neq": r"\ne ", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{", r"\rbrace": r"\}", "{,}": ",", r"\%": "%",
    r"\$": "$", r"\(": "", r"\)": "", r"\[": "", r"\]": "", r"\pounds": "£", r"\euro": "€",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'",
}  # fmt: skip
_SPELLING = re.compile(
    "|".join(
        re.escape(s) + ("(?![A-Za-z])" if s[1:].isalpha() and "frac" not in s else "")
        for s in sorted(_SPELLINGS, key=len, reverse=True)
    )
)
_PLAIN_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sin|cos|tan|log|ln|pi|infinity)(?![A-Za-z])")
_NUMBER_AND_UNIT = re.compile(
    rf"(?:{NUMBER}(?:\s*/\s*\d+)?|[-+]?\s*\d*\s*\\frac\s*(?:\{{\d+\}}\s*\{{\d+\}}|\d\d))(?=[\s%/]|\Z)"
)
PLAIN_NUMBER = re.compile(r"[-+]*(?:[\d.]+(?:[eE][-+]?\d+)?(?:/[-+]?[\d.]+)?|\d*\\frac\{-?\d+\}\{-?\d+\})")
"""A number, a fraction or a mixed number, once it is normalised; no sum, product or formula."""
_COMMAS = re.compile(r"(?<![\d.,(\[])(?<![(\[]-)(?<!\\\{)(?<!\\\{-)\d{1,3}(?:,\d{3})+(?![\d,])")  # in a list they part


@lru_cache(maxsize=2000)  # the samples of a problem share its reference, and often their answers
def normalised(answer: str) -> str:
    """One spelling of an answer: no mark-up, currency, degrees, units in words, thousands separators or spacing."""
    text = answer.replace(r"\\", "\n") if r"\begin" in answer else answer.replace("\n", " ")  # a matrix keeps its rows
    text = _SPELLING.sub(lambda m: _SPELLINGS[m[0]], text).strip(" \t*_`")
    text = _FUNCTION.sub(lambda m: "\\" + m[1] + " ", text)
    text = _BARE_UNIT.sub("", _UNIT.sub("", text)) if re.search(r"\d|\\(?:pi|sqrt)", text) else text
    for _ in range(3):  # \text{} may stand inside \text{}
        text = _UNWRAP.sub(r" \1 ", text)
    text = re.sub(r"[$€£¥₹]", "", _SPACING.sub("", text)).strip(" \t*_`")
    text = re.sub(r"\.\s*\Z", "", text)
    text = re.sub(r"^\(\s*([A-Za-z]|[-+]?[\d./]+)\s*\)\Z|^\{([^{},]*)\}\Z", r"\1\2", text)  # choice (D)
    text = re.sub(r"(?<=[\d)}A-Z])\s*,?\s+(?:and|or)\s+(?=\S*\d|[A-Z]\b)", ",", text)
    text = _without_separators(text)
    text = re.sub(r"(?<=\d)\s+(\d+)\s*/\s*(\d+)\s*\Z", r"\\frac{\1}{\2}", _without_units(text))  # 1 1/2
    text = _PLAIN_FUNCTIONS.sub(lambda m: "\\" + m[1].replace("infinity", "infty") + " ", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text))
    text = re.sub(r"\\frac\s*(\w)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    text = re.sub(r"(?<![\w)}\s])\+(?=\\infty|\d)", "", text)
    text = re.sub(r"(\\[A-Za-z]+)[^\S\n]+(?=[A-Za-z])", "\\1\x00", text)  # "\pi r" is not "\pir"
    text = re.sub(r"(?<!\d)[^\S\n]+|[^\S\n]+(?!\d)", "", text).replace("\x00", " ")  # "7 2" is not 72
    text = re.sub(r"\A[A-Za-z]\\in(?![A-Za-z])", "", text.strip("\n"))
    text = re.sub(r"\A[\[(](\\begin\{.*\})[\])]\Z", r"\1", text, flags=re.DOTALL)
    return re.sub(r"\A\\\{([^,{}\\]+)\\\}\Z", r"\1", text)  # a set of one


def _without_separators(text: str) -> str:
    """Numbers without thousands separators: 1,234.5 and 1 234, as long as they can be read in one way only.

    1.234,5 and 1.234.567 are read the European way, for read otherwise they are no numbers. 1.234 is a decimal and 3,5
    is a list.
    """
    text = re.sub(_COMMAS, lambda m: m[0].replace(",", ""), text)
    text = re.sub(
        r"(?<![\w.,'/])(?<!\d )\d{1,3}(?:[ ']\d{3})+(?!\d|[/']| \d)", lambda m: re.sub("[ ']", "", m[0]), text
    )
    return re.sub(
        r"(?<![\d.,])(?:(\d{1,3}(?:\.\d{3})+),(\d+)|\d{1,3}(?:\.\d{3}){2,})(?![\d.,])",
        lambda m: f"{m[1].replace('.', '')}.{m[2]}" if m[1] else m[0].replace(".", ""),
        text,
    )


def _without_units(text: str) -> str:
    """A number without the words after it ("72 clips", "5 km/h", "20%"), times the scale they name ("2 million")."""
    match = _NUMBER_AND_UNIT.match(text)
    if not match:
        return text
    found, after = match[0], text[match.end() :].replace("%", " ")
    words = re.findall(r"[A-Za-z]+|[^A-Za-z\s]", after)
    for before, word in zip(["", *words], words, strict=False):
        is_unit = len(word) > 1 and word.lower() not in ("am", "pm")
        if not (is_unit or before in ("/", "per") or (before and word in "/.,^-()2")):
            return text
    scale = _SCALES.get(words[0].lower()) if words else None
    exact = number("".join(found.replace(",", "").split())) if scale else None
    return found if scale is None or exact is None else str(exact * scale)


def number(text: str) -> Fraction | None:
    """The exact value of a plain number, a fraction or a mixed number; None for a sum, a product or a formula."""
    if PLAIN_NUMBER.fullmatch(text):
        return value(text)
    repeating = re.fullmatch(r"(-?)(\d{1,20})\.(\d{0,20})\\(?:overline|bar)\{(\d{1,20})\}", text)
    if not repeating:
        return None
    sign, whole, fixed, period = repeating.groups()
    exact = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return -exact if sign else exact
