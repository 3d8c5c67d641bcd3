"""Arithmetic written in text or in LaTeX, evaluated without `eval`.

The parser is a bounded recursive descent: what is too long, too deep or too large is no arithmetic, so that a model can
neither run code nor hang the verifier with "9**9**9".
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Mapping
from fractions import Fraction

MOST_CHARACTERS = 400
_DEEPEST = 40
_MOST_BITS = 20_000
_TOKEN = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|\\[A-Za-z]+|\*\*|//|\S")
_TIMES = ("*", r"\cdot", r"\times")
_OVER = ("/", "//", r"\div")
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_FUNCTIONS = {
    r"\sin": cmath.sin,
    r"\cos": cmath.cos,
    r"\tan": cmath.tan,
    r"\log": cmath.log,
    r"\ln": cmath.log,
}

Number = Fraction | complex


def value(expression: str) -> Fraction | None:
    """The exact value of an arithmetic expression without variables; None for anything else or too large a thing."""
    result = _evaluate(plain_signs(expression), None)
    return result if isinstance(result, Fraction) else None


def value_at(expression: str, variables: Mapping[str, complex]) -> complex | None:
    """The value of an expression with variables, roots, pi and the common functions at a point."""
    result = _evaluate(expression, variables)
    return None if result is None else complex(result)


def plain_signs(expression: str) -> str:
    """Signs that people write for the four operations, and without currency and thousands separators."""
    expression = expression[: MOST_CHARACTERS + 1].replace("$", "").replace("−", "-").replace("÷", "/")
    expression = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), expression)
    return re.sub(r"(?<=[\d)%])\s*[xX×·]\s*(?=[\d(.])", "*", expression)


class _NoArithmeticError(Exception):
    """The text can't be read as arithmetic within the bounds."""


def _evaluate(expression: str, variables: Mapping[str, complex] | None) -> Number | None:
    if len(expression) > MOST_CHARACTERS:
        return None
    reader = _Reader(_TOKEN.findall(expression), variables)
    try:
        result = reader.sum(0)
    except (_NoArithmeticError, ZeroDivisionError, OverflowError, ValueError):
        return None
    return None if reader.tokens else result


class _Reader:
    """Recursive descent over `tokens`, which it uses up: sums of products of powers of atoms, evaluated on the way.

    Without `variables` all is exact. With them, values are complex floats and letters, roots and functions are known.
    """

    def __init__(self, tokens: list[str], variables: Mapping[str, complex] | None) -> None:
        self.tokens = tokens[::-1]
        self.variables = variables

    def sum(self, depth: int) -> Number:
        total = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = self.tokens.pop()
            term = self.product(depth)
            total = _small(total + term if sign == "+" else total - term)
        return total

    def product(self, depth: int) -> Number:
        result = self.signed(depth)
        while self.tokens:
            token = self.peek()
            if token in _TIMES:
                self.tokens.pop()
                result = _small(result * self.signed(depth))
            elif token in _OVER:
                self.tokens.pop()
                result = _small(result / self.signed(depth))
                if token == "//" and isinstance(result, Fraction):
                    result = Fraction(result.__floor__())
            elif token in ("(", "{") or (self.variables is not None and self.starts_atom(token)):
                result = _small(result * self.power(depth))
            else:
                break
        return result

    def signed(self, depth: int) -> Number:
        if depth > _DEEPEST:
            raise _NoArithmeticError
        if self.peek() in ("+", "-"):
            return -self.signed(depth + 1) if self.tokens.pop() == "-" else self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Number:
        base = self.atom(depth)
        while self.peek() == "%":
            self.tokens.pop()
            base = base / 100
        if self.peek() not in ("^", "**"):
            return base
        self.tokens.pop()
        exponent = self.signed(depth + 1)
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent) > _MOST_BITS:
                raise _NoArithmeticError
            return Fraction(base**exponent.numerator)
        if self.variables is None:
            raise _NoArithmeticError
        return complex(base) ** complex(exponent)

    def atom(self, depth: int) -> Number:
        if depth > _DEEPEST or not self.tokens:
            raise _NoArithmeticError
        token = self.tokens.pop()
        if token in _CLOSING:
            inner = self.sum(depth + 1)
            if not self.tokens or self.tokens.pop() != _CLOSING[token]:
                raise _NoArithmeticError
            return inner
        if token[0] in ".0123456789":
            return self.number(token)
        if token == r"\frac":
            return _small(self.argument(depth) / self.argument(depth))
        if self.variables is None:
            raise _NoArithmeticError
        if token == r"\pi":
            return complex(cmath.pi)
        if token == r"\sqrt":
            index: Number = Fraction(2)
            if self.peek() == "[":
                index = self.atom(depth)
            return complex(self.argument(depth)) ** (1 / complex(index))
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](complex(self.power(depth + 1)))
        if token in self.variables:
            return complex(self.variables[token])
        raise _NoArithmeticError

    def number(self, token: str) -> Number:
        mantissa, _, exponent = token.lower().partition("e")
        if not token.isascii() or len(mantissa) > 300 or abs(int(exponent[:5] or 0)) > 300 or len(exponent) > 5:
            raise _NoArithmeticError
        whole = Fraction(int(token)) if token.isdigit() else Fraction(token)
        if token.isdigit() and self.tokens[-1:] == [r"\frac"] and (part := self.proper_fraction()) is not None:
            return whole + part  # 2\frac{1}{2} is a mixed number
        return whole

    def proper_fraction(self) -> Fraction | None:
        """Takes a `\\frac{a}{b}` of two plain numbers off the tokens, if one stands there."""
        frac = self.tokens[-7:][::-1]
        if len(frac) == 7 and frac[1] == frac[4] == "{" and frac[3] == frac[6] == "}":
            above, below = frac[2], frac[5]
            if above.isdecimal() and below.isdecimal() and max(len(above), len(below)) < 100 and int(below):
                del self.tokens[-7:]
                return Fraction(int(above), int(below))
        return None

    def argument(self, depth: int) -> Number:
        r"""What `\frac` or `\sqrt` is applied to: a group, or one digit or letter (`\frac12`, `\sqrt3`)."""
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1:
            self.tokens[-1:] = [token[1:], token[0]]
        return self.atom(depth + 1)

    def starts_atom(self, token: str) -> bool:
        known = token in (r"\frac", r"\sqrt", r"\pi") or token in _FUNCTIONS
        return known or (self.variables is not None and token in self.variables)

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""


def _small(number: Number) -> Number:
    """The number itself, unless it has grown past what any answer needs."""
    if isinstance(number, Fraction):
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > _MOST_BITS:
            raise _NoArithmeticError
        return number
    if not cmath.isfinite(number):
        raise _NoArithmeticError
    return number
