"""Tests of the form `assert f(literals) == literal`, taken apart so that the comparison needs no second process.

Nothing here runs anything: the sources are those of a reference, which is trusted, and are only parsed.
"""

from __future__ import annotations

import ast
import builtins
import operator
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Expectation:
    """One test that is decided here: call a function, compare what it gives.

    Attributes:
        source: the test, for a person.
        name, args, kwargs: the call.
        holds: whether the value is right.
    """

    source: str
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    holds: Callable[[Any], bool]


_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


@lru_cache(maxsize=4096)
def from_asserts(tests: tuple[str, ...]) -> tuple[Expectation, ...] | None:
    """The tests as expectations; None where one of them is of another form."""
    found: list[Expectation] = []
    for test in tests:
        statements = ast.parse(textwrap.dedent(test)).body
        for statement in statements:
            expectation = _expectation(statement, None, None)
            if expectation is None:
                return None
            found.append(expectation)
        if len(statements) != 1:
            return None
    return tuple(found)


@lru_cache(maxsize=4096)
def from_check(check: str, entry_point: str) -> tuple[Expectation, ...] | None:
    """A `check` function whose body is a list of asserts, as expectations; None for any other."""
    found: list[Expectation] = []
    body: list[ast.stmt] = []
    for statement in ast.parse(check).body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "check" and not body:
            arguments = statement.args
            if len(arguments.args) != 1 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
                return None
            parameter, body = arguments.args[0].arg, statement.body
        elif not (isinstance(statement, ast.Assign) and _literal(statement.value)[0]):
            return None
    for statement in body:
        if (
            isinstance(statement, ast.Assert)
            and isinstance(statement.test, ast.Constant)
            and statement.test.value is True
        ):
            continue
        expectation = _expectation(statement, parameter, entry_point)
        if expectation is None:
            return None
        found.append(expectation)
    return tuple(found) or None


def _expectation(statement: ast.stmt, parameter: str | None, entry_point: str | None) -> Expectation | None:
    """An assert about one call with literal arguments, compared with a literal or taken for its truth."""
    if not isinstance(statement, ast.Assert):
        return None
    test, negated = statement.test, False
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, negated = test.operand, not negated
    compare: Callable[[Any, Any], Any] = operator.eq
    swapped, expected, by_truth = False, None, True
    call: ast.expr = test
    if isinstance(test, ast.Compare):
        if len(test.ops) != 1:
            return None
        left, right = test.left, test.comparators[0]
        swapped = _literal(left)[0]
        call, other = (right, left) if swapped else (left, right)
        plain, expected = _literal(other)
        identity = isinstance(test.ops[0], ast.Is | ast.IsNot)
        if not plain or (identity and expected not in (None, True, False)):
            return None
        compare, by_truth = _OPERATORS[type(test.ops[0])], False
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    name = call.func.id
    if parameter is not None:
        if name != parameter or entry_point is None:
            return None
        name = entry_point
    elif isinstance(getattr(builtins, name, None), type):
        return None
    args = [_literal(a) for a in call.args]
    kwargs = {k.arg: _literal(k.value) for k in call.keywords}
    if None in kwargs or not all(ok for ok, _ in [*args, *kwargs.values()]):
        return None

    def holds(value: Any) -> bool:
        result = value if by_truth else compare(expected, value) if swapped else compare(value, expected)
        return bool(result) is not negated

    source = ast.unparse(ast.Assert(statement.test))
    return Expectation(source, name, [v for _, v in args], {str(k): v for k, (_, v) in kwargs.items()}, holds)


def _literal(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False, None


@lru_cache(maxsize=4096)
def tested_name(tests: tuple[str, ...]) -> str | None:
    """The first function that the tests call and the language does not define."""
    for test in tests:
        for node in ast.walk(ast.parse(textwrap.dedent(test))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id):
                return node.func.id
    return None


@lru_cache(maxsize=1024)
def compiles(source: str) -> bool:
    """Whether a trusted source compiles."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True
