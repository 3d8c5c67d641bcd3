"""Runs tests, in a confined child that the solution does not share.

The solution's functions and objects are proxies; names of the language and of the standard library mean the real
ones, whatever the solution defines under the same name, so that a test of `abs(f(x) - y) < 1e-6` can't be met by
another `abs`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import sys
import traceback
from typing import Any

from align.core.sandbox.inside.codec import Channel, CodecError
from align.core.sandbox.inside.proxies import MAX_DETAIL, Solution, SolutionLost

# What tests call by these names without importing it is never what the solution calls so.
_OTHERS = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "pytest": "pytest", "torch": "torch"}
# What tests compare with: the real ones, even where a test leaves their import to the solution and the solution defines
# others of the same names.
_COMPARERS = {
    "isclose": "math", "fabs": "math", "Counter": "collections", "deque": "collections", "OrderedDict": "collections",
    "defaultdict": "collections", "Fraction": "fractions", "Decimal": "decimal",
}  # fmt: skip
_SAFE_FROM = frozenset("cmath collections datetime decimal fractions itertools math string statistics".split())


class _BrokenTests(Exception):  # noqa: N818
    """The tests can't run, whatever the solution."""


class _Failed(Exception):  # noqa: N818
    """What comes before the first test failed on the solution; the argument is the frame's content."""


def run(channel: Channel, line: Channel, job: dict[str, Any]) -> None:
    """Run the tests of a job and tell the broker the result, once.

    Frames: `{"passed": n, "opaque": what}`, `{"failed": i, "detail": …}` (of the first that fails),
    `{"broken": detail}` where the tests themselves can't run, `{"lost": detail, "test": i}`.
    """
    sys.modules.pop("__main__", None)
    try:
        first = line.receive()
    except CodecError as error:
        channel.send({"lost": str(error), "test": 0})
        return
    if first is None:
        channel.send({"lost": "it ended while loading", "test": 0})
        return
    if "loaded" not in first:
        channel.send({"failed": 0, "raised": first.get("raised"), "in": first.get("in")})
        return
    solution = Solution(line)
    index = 0
    try:
        namespace = _namespace(solution, job)
        for index, test in enumerate(job["tests"], 1):
            failure = _one(solution, namespace, test, index, job["entry_point"])
            if solution.unsendable:
                raise _BrokenTests(f"test {index} {solution.unsendable}")
            if solution.lost:  # a bare `except` of the test has caught it
                raise SolutionLost(solution.lost)
            if not failure and solution.unmet:
                failure = {"what": solution.unmet}
            if failure:
                channel.send({"failed": index, **failure})
                return
            if solution.opaque:
                channel.send({"opaque": solution.opaque, "test": index})
                return
        if not solution.asked and (job["entry_point"] or not any(map(_asserts, job["tests"]))):
            raise _BrokenTests("the tests never use the program")
    except SolutionLost as lost:
        channel.send({"lost": str(lost)[:MAX_DETAIL], "test": index})
    except _Failed as failed:
        channel.send({"failed": 0, **failed.args[0]})
    except _BrokenTests as error:
        channel.send({"broken": str(error)[:MAX_DETAIL]})
    else:
        channel.send({"passed": len(job["tests"])})


def _one(
    solution: Solution, namespace: dict[str, Any], test: str, index: int, entry_point: str | None
) -> dict[str, Any] | None:
    """Run one test; what went wrong, or None."""
    solution.forget()
    try:
        exec(_compile(test, f"<test {index}>"), namespace)
        if entry_point is not None:
            if "check" not in namespace:
                raise _BrokenTests("the tests define no function 'check'")
            if entry_point not in namespace:
                return {"missing": entry_point}
            namespace["check"](namespace[entry_point])
    except (SolutionLost, _BrokenTests):
        raise
    except (ImportError, SyntaxError) as error:
        if solution.raised is None:
            raise _BrokenTests(f"test {index} can't run here: {type(error).__name__}: {error}") from None
        return {"raised": solution.raised, "line": _line(error, test)}
    except NameError as error:
        if solution.raised is None and error.name:
            return {"missing": error.name, "line": _line(error, test)}
        return {"raised": solution.raised, "line": _line(error, test)}
    except BaseException as error:
        line = _line(error, test)
        if solution.raised is not None and type(error).__name__ == solution.raised.get("type"):
            return {"raised": solution.raised, "line": line}
        what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"[:MAX_DETAIL]
        return {"line": line, "what": what}
    return None


def _asserts(test: str) -> bool:
    """Whether a test asserts something by itself, not only in functions or classes that nobody calls."""
    return any(isinstance(statement, ast.Assert) for statement in _tree(test).body)


def _line(error: BaseException, test: str) -> str:
    """The line of the test where an exception passed."""
    steps = [s for s in traceback.extract_tb(error.__traceback__) if s.filename.startswith("<test")]
    lines = test.splitlines()
    number = steps[-1].lineno if steps else None
    return lines[number - 1].strip()[:MAX_DETAIL] if number and number <= len(lines) else ""


def _compile(source: str, name: str) -> Any:
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise _BrokenTests(f"{name} does not compile: {error}") from None


def _namespace(solution: Solution, job: dict[str, Any]) -> dict[str, Any]:
    """The globals of the tests: trusted names first, the solution's for the rest; then the setup code has run in it."""
    sources = [job["setup_after"], *job["tests"]]
    trees = []
    for number, source in enumerate(sources):
        try:
            trees.append(ast.parse(source))
        except (SyntaxError, ValueError) as error:
            where = f"test {number}" if number else "setup_after"
            raise _BrokenTests(f"{where} does not compile: {error}") from None
    used = {
        n.id
        for tree in [*trees, *map(_tree, (job["setup"], job["given"]))]
        for n in ast.walk(tree)
        if isinstance(n, ast.Name)
    }
    if job["entry_point"] is not None:
        used.add(job["entry_point"])
    dotted = {
        (n.value.id, n.attr)
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    for source in (job["setup"], job["given"]):
        _run_trusted(source, namespace, job["entry_point"])
    for name, attribute in sorted(dotted):
        if name not in namespace and (module := _module(name, attribute)) is not None:
            namespace[name] = module
    under_test = {job["entry_point"]} if job["entry_point"] else _builtins_under_test(trees)
    helpers = used - namespace.keys() | under_test & used
    for name, (module, attribute) in _imported_from(job["code"]).items():
        if name in helpers and name not in under_test and module in _SAFE_FROM:
            with contextlib.suppress(ImportError, AttributeError):
                namespace[name] = getattr(importlib.import_module(module), attribute)
                helpers.discard(name)
    for name in _wrapping(trees) & helpers & _COMPARERS.keys() - under_test:
        namespace[name] = getattr(importlib.import_module(_COMPARERS[name]), name)
        helpers.discard(name)
    wanted = sorted(n for n in helpers if n in under_test or not hasattr(builtins, n))
    # proxies needed by trusted helpers too, such as a class that the setup's functions build
    found = solution.names(wanted)
    if not found and under_test and job["entry_point"] is None:
        raise _Failed({"missing": sorted(under_test)[0]})
    namespace.update(found)
    try:
        exec(_compile(job["setup_after"], "<setup_after>"), namespace)
    except (SolutionLost, _BrokenTests):
        raise
    except NameError as error:
        raise _Failed({"missing": error.name}) from None
    except BaseException as error:
        if solution.raised is not None:
            raise _Failed({"raised": solution.raised}) from None
        raise _BrokenTests(f"setup_after raised {type(error).__name__}: {error}") from None
    return namespace


def _tree(source: str) -> ast.Module:
    """The syntax tree of a source; an empty one where it does not compile."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _run_trusted(source: str, namespace: dict[str, Any], entry_point: str | None) -> None:
    """Run the setup, or the given part of a prompt, here too, without its classes: objects of them must be the
    solution's. What can't run alone is left to the solution's process."""
    tree = _tree(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree.body = [
        n
        for n in tree.body
        if not isinstance(n, ast.ClassDef) and not (isinstance(n, functions) and n.name == entry_point)
    ]
    with contextlib.suppress(Exception):
        exec(compile(tree, "<setup>", "exec", dont_inherit=True), namespace)


def _builtins_under_test(trees: list[ast.Module]) -> set[str]:
    """Built-in functions that are what is tested, as in `assert sum(10, 15) == 6`: the tests call no others, and no
    other call is among their arguments (so not the `abs` of `abs(sum(1, 2) - 3)`)."""
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    if any(not (isinstance(c.func, ast.Name) and hasattr(builtins, c.func.id)) for c in calls):
        return set()
    inner = {c.func.id for c in calls if isinstance(c.func, ast.Name) and not any(_holds_call(a) for a in c.args)}
    return {name for name in inner if not isinstance(getattr(builtins, name), type)}


def _module(name: str, attribute: str) -> Any:
    """The standard library's module of that name, where it has the attribute: a test may use it without an import."""
    if name not in sys.stdlib_module_names and name not in _OTHERS:
        return None
    try:
        module = importlib.import_module(_OTHERS.get(name, name))
    except ImportError:
        if name in _OTHERS:
            raise _BrokenTests(f"the tests need {_OTHERS[name]}, which the sandbox does not have") from None
        return None
    return module if hasattr(module, attribute) else None


def _wrapping(trees: list[ast.Module]) -> set[str]:
    """The functions that some test calls on the outcome of another call, as `isclose` in `isclose(f(2), 4)`."""
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return {c.func.id for c in calls if isinstance(c.func, ast.Name) and any(_holds_call(a) for a in c.args)}


def _holds_call(node: ast.expr) -> bool:
    return any(isinstance(n, ast.Call) for n in ast.walk(node))


def _imported_from(code: str) -> dict[str, tuple[str, str]]:
    """What the solution imports by `from module import name as other`: {other: (module, name)}."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in _tree(code).body
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }
