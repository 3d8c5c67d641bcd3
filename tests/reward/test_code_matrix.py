"""Every program of these runs in the sandbox without isolation, which is what the machine of any developer has."""

import os
from collections.abc import Iterator

import pytest

from align.core.sandbox import Sandbox
from reward.code_matrix import Passed, passed_asserts, written_outputs


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1, accept="unsafe", cpu_s=0.5, levels=(0,)) as sandbox:
        yield sandbox


TESTS = [
    "assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 3", "assert abs(f(4) - 4) < 1e-6", "assert f(5) == [5]",
    "assert g(1) == 1",
]  # fmt: skip


def passed(sandbox: Sandbox, code: str, tests: list[str] = TESTS) -> str:
    found = sandbox.run(lambda slot: passed_asserts(slot, code, tests))
    assert found.runs and found.compiles and not found.problem
    return "".join("+" if ok else "-" for ok in found.tests)


def test_every_test_has_its_own_verdict(sandbox: Sandbox) -> None:
    assert passed(sandbox, "def f(x):\n    return x") == "+-++--"


def test_a_test_that_raises_or_ends_the_program_spoils_no_other(sandbox: Sandbox) -> None:
    assert passed(sandbox, "def f(x):\n    return x if x != 2 else 1 / 0") == "+-++--"
    assert passed(sandbox, "import os\ndef f(x):\n    return x if x != 1 else os._exit(0)") == "--++--"


def test_a_value_that_is_not_plain_is_looked_at_alone(sandbox: Sandbox) -> None:
    code = "class Odd:\n    def __eq__(self, other): return True\ndef f(x):\n    return x if x != 2 else Odd()"
    assert passed(sandbox, code) == "+-++--"
    assert (
        passed(sandbox, "def f(x):\n    return (y for y in [x])", ["assert list(f(1)) == [1]", "assert f(1) == 1"])
        == "+-"
    )


def test_a_program_that_does_not_end_loses_its_other_tests_after_two_timeouts(sandbox: Sandbox) -> None:
    code = "def f(x):\n    while x > 1: pass\n    return x"
    assert (
        passed(sandbox, code, ["assert f(2) == 2", "assert f(1) == 1", "assert f(3) == 3", "assert f(0) == 0"])
        == "-+--"
    )


def test_programs_that_do_not_compile_or_run_are_told_apart(sandbox: Sandbox) -> None:
    assert sandbox.run(lambda slot: passed_asserts(slot, "def f(x)", TESTS)) == Passed(False, False, (False,) * 6)
    assert sandbox.run(lambda slot: passed_asserts(slot, "1 / 0", TESTS)) == Passed(True, False, (False,) * 6)
    only_slow = ["assert abs(f(4) - 4) < 1e-6"]
    assert sandbox.run(lambda slot: passed_asserts(slot, "1 / 0", only_slow)) == Passed(True, False, (False,))


def test_a_test_can_do_no_harm_to_this_process(sandbox: Sandbox) -> None:
    """What a model wrote as a test is as untrusted as a program: it runs in a child, and exits only that."""
    code, tests = "def f(x):\n    return x", ["assert f(1) == 1 or exit()", "assert __import__('os')._exit(0) or f(1)"]
    assert passed(sandbox, code, [*tests, "assert f(1) == 1"]) == "+-+"
    assert os.getpid() > 0


def test_what_programs_write_on_each_input_is_given_where_they_end_well(sandbox: Sandbox) -> None:
    def outputs(code: str) -> Passed:
        return sandbox.run(lambda slot: written_outputs(slot, code, ["3 4\n", "x\n"]))

    adds = outputs("print(sum(map(int, input().split())))")
    assert adds == Passed(True, True, outputs=("7\n", None))
    assert outputs("print(") == Passed(False, False, outputs=(None, None))
    assert outputs("1 / 0").runs is False
    assert outputs("while True: pass").outputs == (None, None)
    assert outputs("print('ä' * 100_000)").outputs == (None, None)
