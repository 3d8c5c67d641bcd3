"""Plain data survives the way; what isn't plain does not pass as such."""

# ruff: noqa: E501

from __future__ import annotations

import enum
import json
import math
import re
import socket
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from align.core.sandbox.inside import isolation, landlock, seccomp
from align.core.sandbox.inside.codec import MAX_DEPTH, Channel, CodecError, NotPlain, Reader, TooHeavy, to_json

VALUES = [
    None, True, 0, -1, 1 << 63, -(1 << 200), 0.1, 1e308, math.inf, -math.inf, "", "a\n\0é", "\ud800", b"\x00\xff",
    bytearray(b"a"), [], [1, [2]], (1,), (), {1, 2}, frozenset({1}), {}, {(1, 2): [3]}, {1: {2: 3}}, 1 + 2j,
    complex(math.inf, -0.0), range(1, 10, 3), deque([1]), OrderedDict([(1, 2)]), Counter("aab"), Decimal("1.10"),
    Fraction(1, 3), date(2020, 2, 29), datetime(2020, 1, 2, 3, 4, 5, 6), time(1, 2), timedelta(days=-1), int, type(None),
    [(1, {"a": {2.5}})],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    back = Reader().value(json.loads(json.dumps(to_json(value))))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_not_a_number_and_minus_zero_come_back() -> None:
    assert math.isnan(Reader().value(to_json(math.nan)))
    assert math.copysign(1, Reader().value(json.loads(json.dumps(to_json(-0.0))))) == -1


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "base"),
    [(Liar(3), 3), (Point(1, 2), (1, 2)), (Colour.RED, 1), (defaultdict(int, a=1), {"a": 1}), ([Liar(3)], [3])],
)
def test_a_subclass_arrives_as_the_built_in_value_that_it_holds(value: Any, base: Any) -> None:
    back = Reader().value(to_json(value))
    assert repr(back) == repr(base)
    assert type(back) is type(base)


@pytest.mark.parametrize("value", [object(), iter([]), re.match("a", "a"), lambda: 1, [object()], math, NotImplemented])
def test_what_is_not_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(NotPlain):
        to_json(value)


def test_depth_is_limited_both_ways() -> None:
    value: list[Any] = []
    for _ in range(MAX_DEPTH + 5):
        value = [value]
    with pytest.raises(CodecError):
        to_json(value)
    with pytest.raises(CodecError):
        Reader().value(value)


@pytest.mark.parametrize(
    "node",
    [{}, {"t": 1}, {"t": [1], "s": [1]}, {"x": 1}, {"s": [[1]]}, {"d": [1]}, {"i": 5}, {"f": "1"}, {"D": "x"},
     {"F": [1, 0]}, {"c": ["x", "1"]}, {"type": "open"}, {"date": [1]}, {"h": [0, {}]}, {"fn": 0}, {"b": "0"}],
    ids=repr,
)  # fmt: skip
def test_malformed_values_are_refused(node: Any) -> None:
    with pytest.raises(CodecError):
        Reader().value(node)


def test_the_broker_neither_hashes_nor_reduces_large_things() -> None:
    light = Reader(max_hashed=10)
    assert light.value(to_json({*range(10)})) == {*range(10)}
    with pytest.raises(TooHeavy):
        light.value(to_json({1}))
    with pytest.raises(TooHeavy):
        Reader(max_hashed=10).value({"F": [{"i": hex(1 << 100)}, {"i": hex(1 << 99)}]})


def test_frames_are_limited_and_must_be_json() -> None:
    left, right = socket.socketpair()
    with left, right:
        channel = Channel(right, max_bytes=100)
        left.sendall(b"\x02\0\0\0{}" + b"\x02\0\0\0[]" + b"\x01\0\0\0x" + b"\xff\xff\xff\xff")
        assert channel.receive() == {}
        for error in (CodecError, CodecError, TooHeavy):
            with pytest.raises(error):
                channel.receive()


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_system_call_numbers_are_those_of_the_kernels_headers(machine: str, header: str) -> None:
    from pathlib import Path

    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    numbers = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    side = 0 if machine == "x86_64" else 1
    assert (isolation._SYS_CLONE[machine], isolation._SYS_PIVOT_ROOT[machine]) == (
        numbers["clone"],
        numbers["pivot_root"],
    )
    for name in ("CREATE_RULESET", "ADD_RULE", "RESTRICT_SELF"):
        assert numbers.get(f"landlock_{name.lower()}") in (None, getattr(landlock, f"_{name}"))
    calls = seccomp.PLAIN | seccomp.WRITING | seccomp.OPEN
    calls |= {"clone": seccomp.CLONE, "clone3": seccomp.CLONE3, "ioctl": seccomp.IOCTL, "prlimit64": seccomp.PRLIMIT,
              "tgkill": seccomp.TGKILL, "kill": seccomp.KILL, "prctl": seccomp.PRCTL, "fcntl": seccomp.FCNTL}  # fmt: skip
    wrong = {n: (ours[side], numbers.get(n)) for n, ours in calls.items() if ours[side] not in (None, numbers.get(n))}
    assert wrong == {}
    assert len(seccomp.program(machine, 1, writes=True)) % 8 == 0
