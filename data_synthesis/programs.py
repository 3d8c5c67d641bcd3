"""What can be told of a program without running it."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

from reward.code_tests import extract_code


def entry_point(instruction: str, programs: Sequence[str]) -> str:
    """The function that programs are tested by: the one that most of them define; empty where none does.

    Of several that equally many define it is one that the instruction names, else the one defined last.
    """
    counts: Counter[str] = Counter()
    last: dict[str, int] = {}
    for program in programs:
        names = list(dict.fromkeys(_functions(program)))
        counts.update(names)
        for place, name in enumerate(names):
            last[name] = max(place, last.get(name, 0))
    named = set(re.findall(r"[^\W\d]\w*", instruction, re.ASCII))
    if counts:
        return max(counts, key=lambda name: (counts[name], name in named, last[name]))
    given = list(_functions(extract_code(instruction)))  # the head of a function that programs go on from
    return given[-1] if given else ""


def given_code(instruction: str, name: str) -> str:
    """The code of an instruction that begins the function under test, as HumanEval's do; empty where there is none."""
    code = extract_code(instruction, name)
    beginnings = ast.FunctionDef | ast.Import | ast.ImportFrom | ast.ClassDef | ast.Assign
    if name not in _functions(code) or not all(isinstance(node, beginnings) for node in parsed(code)):
        return ""
    return code if code.endswith("\n") else code + "\n"


def reads_input(program: str) -> bool:
    """Whether a program reads standard input; false for one that does not compile."""
    return any(
        (isinstance(node, ast.Name) and node.id == "input")
        or (isinstance(node, ast.Attribute) and node.attr == "stdin")
        for statement in parsed(program)
        for node in ast.walk(statement)
    )


def program_key(program: str) -> str:
    """What two programs must differ in to be two: their syntax, without comments and docstrings."""
    tree = ast.Module(parsed(program), [])
    if not tree.body:
        return " ".join(program.split())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def parsed(program: str) -> list[ast.stmt]:
    """The statements of a program; none where it does not compile."""
    with warnings.catch_warnings():  # of escapes that Python will not know some day
        warnings.simplefilter("ignore")
        try:
            return ast.parse(program).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []


def _functions(program: str) -> Iterator[str]:
    yield from (node.name for node in parsed(program) if isinstance(node, ast.FunctionDef))
