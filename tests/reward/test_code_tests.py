"""The code verifier: honest solutions pass, near misses fail, and no program makes itself pass."""

# ruff: noqa: E501

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import SandboxError
from align.core.records import Verdict
from align.core.sandbox import Sandbox
from reward.code_tests import CodeVerifier, extract_code
from tests.core.sandbox.places import slot_or_skip
from tests.reward.forgeries import FORGERIES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built for Linux")

HONEST = "def f(x): return x * x"

REFERENCES: dict[str, Mapping[str, Any]] = {
    "literal asserts": {"tests": ["assert f(2) == 4", "assert f(3) == 9"]},
    "other asserts": {
        "tests": [
            "y = f(2)\nassert y == 4\nassert 4 == y and y in [4, 5] and not y != 4",
            "assert abs(f(4) - 16.0) < 1e-6 and round(f(4), 2) == 16",
            "assert all(map(lambda x: f(x) == x * x, [1, 2, 3]))",
            "import math\nassert math.isclose(f(5), 25) and len({f(5), 25}) == 1",
        ]
    },
    "a check function": {
        "check": (
            "def check(candidate):\n    for x in range(2, 5):\n        assert candidate(x) == x * x\n"
            "    assert math.fabs(candidate(1.5) - 2.25) < 1e-6\n"
        ),
        "entry_point": "f",
    },
}

# These cost seconds of CPU or of the clock each: tried once, not against every kind of test.
COSTLY = {
    "infinite_loop", "infinite_loop_in_call", "infinite_loop_in_eq", "infinite_loop_in_str", "ignores_signals", "sleeps",
    "stops_itself", "alarm", "many_objects", "colliding_set", "colliding_dict", "deep_recursion", "deep_c_recursion",
    "output_flood", "raise_limits", "runner_that_calls_back", "memory_bomb_slow", "big_integer", "thread_bomb",
    "many_files", "close_channel_and_spin",
}  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    try:
        made = CodeVerifier(4, cpu_s=1, wall_s=20)
        made.__enter__()
    except SandboxError as error:
        pytest.skip(f"untrusted code can't be isolated here: {error}")
    yield made
    made.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFERENCES)
def test_no_forgery_passes_and_honest_code_passes_after_each(kind: str) -> None:
    slot_or_skip(4).close()
    names = [n for n in FORGERIES if n not in COSTLY or (kind == "other asserts")]
    pairs = [(code, REFERENCES[kind]) for name in names for code in (FORGERIES[name], HONEST)]
    with CodeVerifier(4, cpu_s=0.4, wall_s=4, memory_mb=256) as verifier:
        verdicts = list(verifier.verify_many(pairs))
    forged = {n: v for n, v in zip(names, verdicts[::2], strict=True) if v.verdict == "passed" or v.reward == 1}
    assert forged == {}
    broken = {n: v for n, v in zip(names, verdicts[1::2], strict=True) if v.verdict != "passed"}
    assert broken == {}
    unexplained = {n: v for n, v in zip(names, verdicts[::2], strict=True) if "sandbox:" in v.detail or not v.detail}
    assert unexplained == {}


@pytest.mark.parametrize("level", [4, 3, 2, 1, 0])
def test_verdicts_are_the_same_at_every_level(level: int) -> None:
    slot_or_skip(level).close()
    programs = {"passed": HONEST, "failed": "def f(x): return x + x", "error": "def f(x):\n    while True: pass"}
    work = [(code, ref) for ref in REFERENCES.values() for code in programs.values()]
    work += [("print(int(input()) ** 2)", PROGRAM), ("print(9)", PROGRAM), ("while True: pass", PROGRAM)]
    verifier = CodeVerifier()
    verifier.sandbox = Sandbox(2, accept="unsafe", levels=(level,), cpu_s=0.2, wall_s=8)
    with verifier:
        verdicts = list(verifier.verify_many(work))
        report = verifier.report
    assert [v.verdict for v in verdicts] == ["passed", "failed", "error"] * 4
    assert report["level"] == level
    assert report["journal"] == {
        "executions": 9 + 2 + 2 + 1,
        "timeouts": 4,
        "repeated": 0,
        "given_up": 0,
        "replaced": 0,
        "troubles": [],
    }


PROGRAM = {"io": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "4\n", "stdout": "16\n\n"}]}


@pytest.mark.parametrize(
    ("program", "verdict", "word"),
    [
        ("x = int(input())\nprint(x * x)", "passed", "2 inputs"),
        ("import sys\nfor line in sys.stdin: print(int(line) ** 2, end='  \\r\\n')", "passed", ""),
        ("def main():\n    print(int(input()) ** 2)\nif __name__ == '__main__':\n    main()\n    exit()", "passed", ""),
        ("print(int(input()) ** 2)\nimport os, sys; sys.stdout.flush(); os._exit(0)", "passed", ""),
        ("import threading\nthreading.Thread(target=lambda: print(int(input()) ** 2)).start()", "passed", ""),
        ("import atexit\natexit.register(lambda: print(int(input()) ** 2))", "passed", ""),
        ("print(9)", "failed", "input 2: wrote '9\\n', expected"),
        ("print(int(input()) ** 2, 'passed')", "failed", "input 1"),
        ("print(9)\nprint(16)", "failed", "input 1"),
        ("print(str(int(input()) ** 2)[:1])", "failed", "input 2"),
        ("print(int(input()) ** 2)\nraise ValueError('late')", "failed", "ValueError: late"),
        ("print(int(input()) ** 2, flush=True)\nimport os; os._exit(3)", "failed", "exit status 3"),
        ("import sys; sys.exit(0)", "failed", "wrote ''"),
        ("", "failed", "wrote ''"),
        ("print(int(input()) ** 2)\nwhile True: pass", "error", "timeout"),
        ("print(int(input()) ** 2)\nprint('x' * 10**6)", "failed", "input 1"),
        ("open('/dev/stdout', 'w').write('9')", "failed", "input 1"),
        ("x = (", "failed", "does not compile: SyntaxError"),
    ],
)
def test_a_program_is_judged_on_all_that_it_writes(
    verifier: CodeVerifier, program: str, verdict: str, word: str
) -> None:
    found = verifier.verify(f"Here it is:\n```python\n{program}\n```\nDone." if program else program, PROGRAM)
    assert (found.verdict, word in found.detail) == (verdict, True), found


def test_large_inputs_and_outputs_are_compared_whole(verifier: CodeVerifier) -> None:
    numbers = "\n".join(map(str, range(100_000)))
    program = "import sys\nprint(sys.stdin.read())"
    assert verifier.verify(program, {"io": [{"stdin": numbers, "stdout": numbers}]}).verdict == "passed"
    other = numbers[:-1] + "8"
    assert verifier.verify(program, {"io": [{"stdin": numbers, "stdout": other}]}).verdict == "failed"


HELPERS = """
import re, sys, functools, collections
from collections import Counter, namedtuple, defaultdict
from math import sqrt
Point = namedtuple("Point", "x y")
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
class Stack(list):
    def push(self, x): self.append(x); return self
class Bad(ValueError): pass
class Node:
    def __init__(self, v): self.v, self.next = v, None
def ident(x): return x
def length(node): return 0 if node is None else 1 + length(node.next)
def total(pairs): return sum(p.total() for p in pairs)
def match(p, s): return re.match(p, s)
def matches(p, s): return bool(re.match(p, s))
def gen(n): yield from range(n)
def keys(d): return d.keys()
def values(d): return d.values()
def pairs(d): return d.items()
def listed(xs): return list(xs)
def first(xs, n): return [x for _, x in zip(range(n), xs)]
def point(x, y): return Point(x, y)
def sort_in_place(a, key=None): a.sort(key=key)
def same(a): a.append(1); return a
def apply(f, xs): return [f(x) for x in xs]
def fail(kind): raise {"v": ValueError, "b": Bad, "k": KeyError}[kind]("no")
def count(s): return Counter(s)
def group(xs):
    d = defaultdict(list)
    for x in xs: d[x % 2].append(x)
    return d
def size(t): return sys.getsizeof(t)
def third(): return 1 / 3
def nothing(): pass
def adder(n): return lambda x: x + n
@functools.lru_cache(None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
def data():
    import dataclasses
    @dataclasses.dataclass
    class D:
        x: int
    return D(3)
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert third() == 1 / 3", "assert abs(third() - 0.3333333) < 1e-6", "assert ident({3, 1}) == {1, 3}",
        "assert nothing() is None", "assert nothing() == None", "assert matches('a', 'ab') is True",
        "assert matches('b', 'ab') is False", "assert not matches('b', 'ab')", "assert match('a', 'ab')",
        "assert bool(match('a', 'ab'))", "assert not match('b', 'ab')", "assert match('a', 'ab') is not None",
        "assert match('(a)', 'ab').group(1) == 'a'", "assert ident(ident(3)) == ident(3)", "assert list(gen(3)) == [0, 1, 2]",
        "assert point(1, 2) == (1, 2)", "assert point(1, 2).x == 1",
        "assert [point(1, 2)] == [(1, 2)] and len(point(1, 2)) == 2 and tuple(point(1, 2)) == (1, 2)",
        "a = [3, 1, 2]\nsort_in_place(a)\nassert a == [1, 2, 3]",
        "a = [3, 1, 2]\nsort_in_place(a, key=lambda x: -x)\nassert a == [3, 2, 1]",
        "a = [0]\nassert same(a) is a and a == [0, 1]", "assert apply(lambda x: x * 2, [1, 2]) == [2, 4]",
        "assert apply(str, [1]) == ['1'] and apply(abs, [-1]) == [1]", "assert ident(int) is int",
        "try:\n    fail('v')\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'",
        "try:\n    fail('b')\n    raise AssertionError\nexcept Bad:\n    pass",
        "try:\n    fail('b')\n    raise AssertionError\nexcept ValueError:\n    pass",
        "assert count('aab') == {'a': 2, 'b': 1}", "assert count('aab') == Counter('aba')",
        "assert count('aab').most_common(1) == [('a', 2)]", "assert group([1, 2, 3]) == {1: [1, 3], 0: [2]}",
        "assert size((1, 'a')) == sys.getsizeof((1, 'a'))", "assert ident(4.0) == sqrt(16)", "assert ident(2) == math.sqrt(4)",
        "assert total([Pair(1, 2), Pair(3, 4)]) == 10", "assert Pair(1, 2).total() == 3",
        "p = Pair(1, 2)\np.a = 5\nassert p.total() == 7 and p.a == 5", "assert isinstance(Pair(1, 2), Pair)",
        "s = Stack()\ns.push(1).push(2)\nassert s == [1, 2] and len(s) == 2 and s[-1] == 2 and 2 in s and s",
        "n = Node(1)\nn.next = Node(2)\nassert length(n) == 2 and n.next.v == 2 and n.next is n.next",
        "assert adder(2)(3) == 5", "assert fib(80) == 23416728348467685", "assert deep(900) == 900",
        "assert int(ident(3.7)) == 3", "assert sorted(ident([2, 1])) == [1, 2]",
        "assert set(ident([2, 1])) == {1, 2}", "assert ident(2) in (1, 2)", "assert ident(3) > 2", "assert 3 == ident(3)",
        "assert ident(x=3) == 3", "assert ident(1e300 * 1e10) == float('inf')", "assert ident(10**100) == 10**100",
        "assert ident('é\\n') == 'é\\n'", "assert ident(b'a') == b'a'", "assert ident((1, [2, {'a': None}])) == (1, [2, {'a': None}])",
        "assert (ident(3)) == 3, 'message'", "assert ident([1] * 1000) == [1] * 1000", "assert data().x == 3",
        "assert ident(-5) == -5; assert ident(True) == 1", "assert str(ident(3)) + '!' == '3!'", "assert callable(ident)",
        "import datetime\nassert ident(datetime.date(2020, 1, 2)) == datetime.date(2020, 1, 2)",
        "from fractions import Fraction\nassert ident(Fraction(1, 2)) == Fraction(1, 2)",
        "assert ident(list(range(300000))) == list(range(300000))", "assert ident({i for i in range(5000)}) == set(range(5000))",
        "assert keys({'a': 1, 'b': 2}) == {'a', 'b'} and list(keys({'a': 1})) == ['a']", "assert keys({'a': 1}) == {'a'}",
        "assert sorted(values({'a': 2, 'b': 1})) == [1, 2]", "assert pairs({'a': 1}) == {('a', 1)}",
        "import functools, operator\nassert apply(functools.partial(pow, 2), [3]) == [8]", "assert apply(operator.itemgetter(0), ['ab']) == ['a']",
        "class Twice:\n    def __call__(self, x): return 2 * x\nassert apply(Twice(), [1, 2]) == [2, 4]",
        "assert listed(x * x for x in range(3)) == [0, 1, 4]", "assert listed(map(str, [1])) == ['1']",
        "assert listed(zip([1], 'a')) == [(1, 'a')] and listed(iter([])) == []",
        "import itertools\nassert first(itertools.count(5), 3) == [5, 6, 7]", "assert json.dumps(ident([1])) == '[1]'",
        "assert ident(3 + 4j) == 3 + 4j and abs(ident(3 + 4j)) == 5", "assert ident(sys.maxsize) == 2 ** 63 - 1",
        "assert ident({frozenset({1}): ({2},)}) == {frozenset({1}): ({2},)}", "assert ident(float('nan')) != ident(float('nan'))",
        "assert ident(range(3)) == range(3)", "assert ident(\"it's \\\\ \\n\") == \"it's \\\\ \\n\"",
        "assert collections.OrderedDict(a=1) == ident(collections.OrderedDict(a=1))", "assert gen(3).__next__() == 0",
        "it = gen(2)\nassert next(it) == 0 and next(it) == 1 and next(it, None) is None", "assert len(list(gen(5000))) == 5000",
        "with open('/dev/null') as f:\n    assert ident(f.name) == '/dev/null'",
    ],
)  # fmt: skip
def test_an_honest_solution_passes_tests_of_every_form(verifier: CodeVerifier, test: str) -> None:
    for tests in ([test], [test, "assert [ident(1)] == [1]"]):
        found = verifier.verify(HELPERS, {"tests": tests})
        assert found.verdict == "passed", found


@pytest.mark.parametrize(
    ("test", "detail"),
    [
        ("assert ident(3) == 4", "test 1: assert ident(3) == 4: got 3"),
        ("assert ident(3) is True", "test 1: assert ident(3) is True: got 3"),
        ("assert ident([1]) == (1,)", "got [1]"),
        ("assert not ident(1)", "got 1"),
        ("assert unknown(3) == 4", "the program defines no 'unknown'"),
        ("assert ident(unknown2) == 4", "the program defines no 'unknown2'"),
        ("assert ident() == 4", "raised TypeError"),
        ("assert fail('k') == 4", "raised KeyError: 'no' (line "),
        ("y = fail('k')", "test 1: y = fail('k'): raised KeyError: 'no'"),
        ("assert abs(ident(3) - 3.1) < 1e-6", "test 1: assert abs(ident(3) - 3.1) < 1e-6: the test does not hold"),
        ("assert gen(2) == [0, 1]", "the test does not hold"),
        ("assert ident([1, 2]).total() == 3", "AttributeError"),
        ("assert match('a', 'b')", "got None"),
        ("assert nothing()", "got None"),
        ("assert total([Pair(1, 2)]) == 4", "the test does not hold"),
        ("a = [2, 1]\nsort_in_place(a)\nassert a == [2, 1]", "assert a == [2, 1]"),
    ],
)
def test_a_near_miss_fails_with_a_detail_that_names_the_test(verifier: CodeVerifier, test: str, detail: str) -> None:
    found = verifier.verify(HELPERS, {"tests": [test]})
    assert found.verdict == "failed"
    assert detail in found.detail
    assert "\n" not in found.detail


def test_a_function_may_bear_the_name_of_a_built_in(verifier: CodeVerifier) -> None:
    code = "def sum(a, b): return a + b\ndef abs(x): return 0\ndef max(a): return a[0]"
    for test in (
        "assert sum(10, 15) == 25",
        "assert sum(2, 3) == 5 and sum(1, 1) == 2",
        "assert abs(sum(1, 2) - 3) < 1e-6",
    ):
        assert verifier.verify(code, {"tests": [test]}).verdict == "passed", test
    assert verifier.verify(code, {"tests": ["assert abs(sum(1, 2) - 4) < 1e-6"]}).verdict == "failed"
    assert (
        verifier.verify(code, {"check": "def check(c): assert abs(c(1, 2)) == 3", "entry_point": "sum"}).verdict
        == "passed"
    )


def test_a_result_that_rests_on_the_solutions_own_equality_is_opaque(verifier: CodeVerifier) -> None:
    code = "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\ndef f(x): return P(x)"
    found = verifier.verify(code, {"tests": ["assert f(1) == P(1)"]})
    assert (found.verdict, found.reward) == ("error", None)
    assert found.detail.startswith("opaque: test 1: assert f(1) == P(1)")
    assert verifier.verify(code, {"tests": ["assert f(1).x == P(1).x"]}).verdict == "passed"


def test_setup_runs_before_the_code_and_setup_after_behind_it(verifier: CodeVerifier) -> None:
    before = {
        "tests": ["assert area(2) == 12.56", "assert helper(1) == 2"],
        "setup": "PI = 3.14\ndef helper(x): return x + 1",
    }
    assert verifier.verify("TWICE = PI\ndef area(r): return PI * r * r", before).verdict == "passed"
    after = {
        "tests": ["assert height(root) == 2", "assert height(None) == 0"],
        "setup_after": "root = Node(1)\r\nroot.left = Node(2)",
    }
    tree = (
        "class Node:\n    def __init__(s, v): s.v, s.left, s.right = v, None, None\n"
        "def height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))"
    )
    assert verifier.verify(tree, after).verdict == "passed"
    assert verifier.verify(tree.replace("1 + max", "max"), after).verdict == "failed"
    assert "defines no 'Node'" in verifier.verify("def height(n): return 2", after).detail
    assert "setup raised" in verifier.verify(tree, {"tests": ["assert 1"], "setup": "import no_such_module"}).detail


def test_helpers_of_the_prompt_are_used_in_place_of_the_completions(verifier: CodeVerifier) -> None:
    """HumanEval/32 in small: the check calls `poly`, which a completion could redefine to always give 0."""
    prompt = "def poly(x):\n    return x * x - 4\n\n\ndef find_zero():\n    '''A zero of poly.'''\n"
    reference = {
        "check": "def check(candidate):\n    assert abs(poly(candidate())) < 1e-6\n",
        "entry_point": "find_zero",
        "prompt": prompt,
    }
    assert verifier.verify("    return 2\n", reference).verdict == "passed"
    assert (
        verifier.verify("```python\ndef find_zero():\n    return 2 if poly(2) == 0 else 0\n```", reference).verdict
        == "passed"
    )
    assert verifier.verify("    return 3\n", reference).verdict == "failed"
    forged = "def poly(x): return 0\ndef find_zero(): return 7"
    assert verifier.verify(forged, reference).verdict == "failed"
    assert verifier.verify("    return 7\n" + forged, reference).verdict == "failed"


@pytest.mark.parametrize(
    ("reference", "word"),
    [
        ({}, "exactly one of"), ({"tests": []}, "at least one"), ({"tests": ["assert f("]}, "do not compile"),
        ({"tests": [1]}, "test 1 is a int"), ({"tests": "assert f(1)"}, "a list"), ({"tests": ["f(1)"], "io": []}, "exactly one"),
        ({"check": "def check(c): pass"}, "entry_point"), ({"check": "x = 1", "entry_point": "f"}, "no function 'check'"),
        ({"check": "def check(", "entry_point": "f"}, "do not compile"), ({"io": [{"stdin": 1, "stdout": ""}]}, "io 1"),
        ({"io": []}, "at least one"), ({"tests": ["assert f(1)"], "timeout": 3}, "unknown keys ['timeout']"), ([], "a list"),
        (None, "NoneType"), ({"answer": "72"}, "'answer'"), ({"tests": ["import numpy\nassert f(2) == 4"]}, "numpy"),
        ({"tests": ["assert f(2) == 4"], "setup": 3}, "'setup' is a int"), ({"tests": ["assert f(2) == 4"], "setup": "x = ("}, "setup"),
    ],
    ids=str,
)  # fmt: skip
def test_an_unusable_reference_is_an_error_that_says_what_is_wrong(
    verifier: CodeVerifier, reference: Any, word: str
) -> None:
    found = verifier.verify(HONEST, reference)
    assert (found.verdict, found.reward) == ("error", None)
    assert word in found.detail
    assert found.detail.startswith("reference: ")


def test_verdicts_come_in_order_and_one_bad_row_stops_nothing(verifier: CodeVerifier) -> None:
    reference = REFERENCES["literal asserts"]
    pairs = [(HONEST, reference), ("import time; time.sleep(0.4)", reference), (HONEST, {}), ("x =", reference)] * 3
    names = [v.verdict for v in verifier.verify_many(pairs)]
    assert names == ["passed", "failed", "error", "failed"] * 3


def test_the_last_block_that_holds_code_is_taken() -> None:
    assert extract_code("```python\na = 1\n```\ntext\n```python\nb = 2\n```") == "b = 2\n"
    assert extract_code("```py\na = 1\n```\n```text\nout\n```\n```python\n\n# nothing\n```") == "a = 1\n"
    assert extract_code("first\n```\na = 1\n```") == "a = 1\n"
    assert extract_code("```python\na = 1\n```\n```\n1\n```") == "a = 1\n"
    assert extract_code("```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```", "f") == "def f(): pass\n"
    assert extract_code("    return 1\n") == "    return 1\n"
    assert extract_code("1. So:\n   ```python\n   a = 1\n     # in\n   ```") == "a = 1\n  # in\n"
    assert extract_code("````python\ns = '''\n```\n'''\n````") == "s = '''\n```\n'''\n"
    assert extract_code("```python\na = 1") == "a = 1\n"
    assert extract_code("```bash\nls\n```\nno code") == "```bash\nls\n```\nno code"
    assert extract_code("~~~python\na = 1\n~~~") == "a = 1\n"
    assert extract_code("```{.python}\na = 1\n```") == "a = 1\n"


def test_a_level_that_is_too_low_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.core.sandbox._probe", lambda slot: ["nothing works"] if slot.level else [])
    with (
        pytest.raises(
            SandboxError,
            match="level 4: nothing works\n  level 3: nothing works\n  level 2: nothing works\nLevel 4 needs",
        ),
        CodeVerifier(1),
    ):
        pass
    with pytest.raises(SandboxError, match="allow_degraded"), CodeVerifier(1, accept="allow_degraded"):
        pass
    with CodeVerifier(1, accept="unsafe") as verifier:
        assert verifier.report["level"] == 0
        assert len(verifier.report["failed_probes"]) == 4
        assert verifier.verify(HONEST, REFERENCES["literal asserts"]) == Verdict.of(True, "2 tests passed")


def _real(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("ALIGN_TEST_DATA")
    if not folder:
        pytest.skip("ALIGN_TEST_DATA is not set")
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.mark.real_data
@pytest.mark.slow
def test_every_reference_solution_of_mbpp_passes_and_every_wrong_one_fails() -> None:
    rows = _real("mbpp_train_val/mbpp_train_val.jsonl")
    references = [{"tests": r["test_list"], "setup": "", "setup_after": r["test_setup_code"]} for r in rows]
    chat = [(f"Sure!\n```python\n{r['code']}\n```\n", ref) for r, ref in zip(rows, references, strict=True)]
    wrong = [(rows[i - 1]["code"], ref) for i, ref in enumerate(references)]
    with CodeVerifier() as verifier:
        verdicts = list(verifier.verify_many(chat))
        others = list(verifier.verify_many(wrong))
    assert [(r["task_id"], v) for r, v in zip(rows, verdicts, strict=True) if v.verdict != "passed"] == []
    assert len(verdicts) == 474
    assert [(r["task_id"], v) for r, v in zip(rows, others, strict=True) if v.verdict == "passed"] == []


@pytest.mark.real_data
@pytest.mark.slow
def test_every_reference_solution_of_humaneval_passes_as_text_and_as_continuation() -> None:
    rows = _real("humaneval/HumanEval.jsonl")
    plain = [{"check": r["test"], "entry_point": r["entry_point"]} for r in rows]
    pairs = [(r["prompt"] + r["canonical_solution"], ref) for r, ref in zip(rows, plain, strict=True)]
    pairs += [(r["canonical_solution"], ref | {"prompt": r["prompt"]}) for r, ref in zip(rows, plain, strict=True)]
    pairs += [(f"def {r['entry_point']}(*args): return None", ref) for r, ref in zip(rows, plain, strict=True)]
    with CodeVerifier() as verifier:
        verdicts = [v.verdict for v in verifier.verify_many(pairs)]
    assert verdicts[:164] == ["passed"] * 164
    assert verdicts[164:328] == ["passed"] * 164
    assert "passed" not in verdicts[328:]
