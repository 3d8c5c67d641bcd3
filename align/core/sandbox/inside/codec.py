"""Plain data between processes that don't trust each other: values of built-in types as tagged JSON, never pickle.

A value that comes from a solution is rebuilt from built-in types only, so it carries no code: an `int` whose `__eq__`
always agrees arrives as the plain integer it holds. What is not plain data (a generator, an instance of the solution's
own class) goes through a hook: `pack` asks it for a handle, `unpack` for what stands for that handle.

JSON holds None, bools, floats, strings, integers of 64 bits and lists as they are; all else is an object with one key,
the tag.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_BYTES = 8 << 20
MAX_DEPTH = 200

Hook = Callable[[Any], dict[str, Any]]
Unhook = Callable[[str, Any], Any]


class CodecError(Exception):
    """A message that is malformed, too large or too deep."""


class NotPlain(Exception):  # noqa: N818
    """A value that is not plain data; the argument is the name of its type."""


class TooHeavy(CodecError):  # noqa: N818
    """More bytes, or more hashed entries, than the receiver wants to deal with."""


_TYPES: tuple[type, ...] = (
    int, float, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, complex, range, object,
    deque, defaultdict, OrderedDict, Counter, Decimal, Fraction, date, datetime, time, timedelta,
    type(None),
)  # fmt: skip
TYPES: dict[str, type] = {t.__name__: t for t in _TYPES}
"""The types that travel by name, as in `remove_datatype(values, int)`."""

_HASHED = {"s", "z", "d", "o", "n", "k", "m"}
_LONGEST_RANGE = 1_000_000
_KEYS: type = type({}.keys())
_VALUES: type = type({}.values())
_ITEMS: type = type({}.items())


def _not_plain(value: Any) -> dict[str, Any]:
    raise NotPlain(type(value).__name__)


def to_json(value: Any, hook: Hook = _not_plain, *, flatten: bool = True, depth: int = 0) -> Any:
    """The tagged JSON of a value.

    Args:
        value: anything.
        hook: what to write for a value that is not plain data; raises `NotPlain` by default.
        flatten: write an instance of a subclass of a built-in type as the built-in value that it holds; otherwise only
            of the standard library's subclasses, and the hook is asked for the others.
        depth: how deep inside an outer value this one lies.

    Raises:
        CodecError: deeper than `MAX_DEPTH`.
        NotPlain: the value, or one inside it, is not plain data.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if depth >= MAX_DEPTH:
        raise CodecError(f"a value nested deeper than {MAX_DEPTH}")

    def items(values: Any) -> list[Any]:
        return [to_json(v, hook, flatten=flatten, depth=depth + 1) for v in values]

    if kind is list:
        return items(value)
    if kind is tuple:
        return {"t": items(value)}
    if kind is dict or kind is defaultdict:
        return {"d": items(x for pair in dict.items(value) for x in pair)}
    if kind is set:
        return {"s": items(value)}
    if kind is frozenset:
        return {"z": items(value)}
    if kind is complex:
        return {"c": [repr(value.real), repr(value.imag)]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is bytearray:
        return {"B": value.hex()}
    if kind is range:
        return {"r": items((value.start, value.stop, value.step))}
    if kind is deque:
        return {"q": items(value)}
    if kind is _KEYS or kind is _VALUES:
        return {"k" if kind is _KEYS else "v": items(value)}
    if kind is _ITEMS:
        return {"m": items(x for pair in value for x in pair)}
    if kind is OrderedDict:
        return {"o": items(x for pair in OrderedDict.items(value) for x in pair)}
    if kind is Counter:
        return {"n": items(x for pair in dict.items(value) for x in pair)}
    if kind is Decimal:
        return {"D": str(value)}
    if kind is Fraction:
        return {"F": items((value.numerator, value.denominator))}
    if kind is date:
        return {"date": [value.year, value.month, value.day]}
    if kind is time and value.tzinfo is None:
        return {"time": [value.hour, value.minute, value.second, value.microsecond]}
    if kind is datetime and value.tzinfo is None:
        head = [value.year, value.month, value.day]
        return {"datetime": [*head, value.hour, value.minute, value.second, value.microsecond]}
    if kind is timedelta:
        return {"delta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, type) and kind is type and TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    if flatten:
        base = base_value(value)
        if base is not value:
            return to_json(base, hook, flatten=True, depth=depth)
    return hook(value)


def base_value(value: Any) -> Any:
    """The built-in value inside an instance of a subclass of a built-in type; the value itself where there is none."""
    kind = type(value)
    if issubclass(kind, int):
        return int.__pos__(value)
    if issubclass(kind, float):
        return float.__pos__(value)
    if issubclass(kind, complex):
        return complex.__pos__(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, bytes):
        return bytes.__getitem__(value, slice(None))
    if issubclass(kind, bytearray):
        return bytearray(bytearray.__getitem__(value, slice(None)))
    if issubclass(kind, list):
        return list(list.__iter__(value))
    if issubclass(kind, tuple):
        return tuple(tuple.__iter__(value))
    if issubclass(kind, dict):
        return dict(list(dict.items(value)))
    if issubclass(kind, set):
        return set(set.__iter__(value))
    if issubclass(kind, frozenset):
        return frozenset(list(frozenset.__iter__(value)))
    if issubclass(kind, deque):
        return deque(list(deque.__iter__(value)))
    return value


class Reader:
    """Rebuilds values from tagged JSON.

    Args:
        unhook: what stands for a tag that is not plain data; None refuses such tags.
        max_hashed: how many set members and dictionary keys the receiver is ready to hash, None for any number. With
            a limit it also refuses arithmetic on integers of more than 64 bits (a fraction is reduced, a range's
            length divided), and long ranges (a search for what is no integer walks through them).
    """

    def __init__(self, unhook: Unhook | None = None, max_hashed: int | None = None) -> None:
        self.unhook = unhook
        self.max_hashed = max_hashed
        self.hashed = 0

    def value(self, node: Any, depth: int = 0) -> Any:
        """The value of a node.

        Raises:
            CodecError: malformed, or deeper than `MAX_DEPTH`.
            TooHeavy: more than `max_hashed` entries to hash.
        """
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if depth > MAX_DEPTH:
            raise CodecError(f"a value nested deeper than {MAX_DEPTH}")
        if isinstance(node, list):
            return [self.value(n, depth + 1) for n in node]
        if not isinstance(node, dict) or len(node) != 1:
            raise CodecError("a value with no tag")
        ((tag, body),) = node.items()
        try:
            return self._tagged(tag, body, depth)
        except (TypeError, ValueError, OverflowError, ArithmeticError, KeyError) as error:
            raise CodecError(f"a malformed value of tag {tag!r}: {error}") from None

    def _tagged(self, tag: str, body: Any, depth: int) -> Any:
        if tag in _HASHED:
            self.hashed += len(body)
            if self.max_hashed is not None and self.hashed > self.max_hashed:
                raise TooHeavy
        if tag in ("r", "F") and self.max_hashed is not None and not all(isinstance(n, int) for n in _list(body)):
            raise TooHeavy("large integers")
        if tag in ("t", "s", "z", "d", "q", "o", "n", "k", "v", "m", "r", "F"):
            items = [self.value(n, depth + 1) for n in _list(body)]
            if tag == "t":
                return tuple(items)
            if tag in ("d", "o", "n", "m"):
                pairs = dict(zip(items[::2], items[1::2], strict=True))
                kinds: dict[str, Any] = {"d": dict, "o": OrderedDict, "n": Counter, "m": dict.items}
                return kinds[tag](pairs)
            if tag == "k":
                return dict.fromkeys(items).keys()
            if tag == "v":
                return dict(enumerate(items)).values()
            if tag == "F":
                return Fraction(*items)
            if tag != "r":
                return (set if tag == "s" else frozenset if tag == "z" else deque)(items)
            span = range(*items)
            if self.max_hashed is not None and span and abs(span[-1] - span[0]) > _LONGEST_RANGE:
                raise TooHeavy("a long range")
            return span
        if tag == "i":
            return int(_str(body), 16)
        if tag == "f":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[body]
        if tag == "c":
            return complex(*(float(_str(x)) for x in body))
        if tag == "b":
            return bytes.fromhex(_str(body))
        if tag == "B":
            return bytearray.fromhex(_str(body))
        if tag == "D":
            return Decimal(_str(body))
        if tag == "type":
            return TYPES[body]
        if tag == "delta":
            return timedelta(*_integers(body))
        if tag in ("date", "time", "datetime"):
            return {"date": date, "time": time, "datetime": datetime}[tag](*_integers(body))
        if self.unhook is None:
            raise CodecError(f"an unknown tag {tag!r}")
        return self.unhook(tag, body)


def _list(body: Any) -> list[Any]:
    if not isinstance(body, list):
        raise CodecError("a list was expected")
    return body


def _integers(body: Any) -> list[int]:
    if not all(type(n) is int for n in _list(body)):  # the types of `datetime` take other things too, such as pickles
        raise CodecError("integers were expected")
    return list(body)


def _str(body: Any) -> str:
    if not isinstance(body, str):
        raise CodecError("a string was expected")
    return body


class Descriptor:
    """A socket by its number, through `read` and `write` alone: a solution's process may make no calls for sockets."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        """The number."""
        return self.number

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes."""
        return os.read(self.number, size)

    def sendall(self, data: bytes) -> None:
        """Write all of it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.number, view) :]

    def close(self) -> None:
        """Close it."""
        os.close(self.number)


class Channel:
    """Frames of JSON over a stream socket: four bytes of length, then the text. `fileno` serves `poll`.

    Args:
        end: the socket.
        max_bytes: the most that one frame may have; a larger one raises `TooHeavy` on `take`.
        max_total: the same for all frames that have been taken.
    """

    def __init__(
        self, end: socket.socket | Descriptor, max_bytes: int = MAX_BYTES, max_total: int | None = None
    ) -> None:
        self.end = end
        self.max_bytes = max_bytes
        self.max_total = max_total
        self.buffer = bytearray()
        self.taken = 0

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self.end.fileno()

    def send(self, message: Any) -> None:
        """Write one frame; blocks until the peer has room.

        Raises:
            CodecError: larger than `MAX_BYTES`.
            OSError: the peer is gone.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_BYTES:
            raise CodecError(f"a message of {len(data)} bytes, more than {MAX_BYTES}")
        self.end.sendall(struct.pack("<I", len(data)) + data)

    def take(self) -> Any:
        """A whole frame from what has arrived, or None where there isn't one yet.

        Raises:
            CodecError: not JSON.
            TooHeavy: larger than this side wants to parse.
        """
        if len(self.buffer) < 4:
            return None
        (size,) = struct.unpack_from("<I", self.buffer)
        if size > self.max_bytes or (self.max_total is not None and self.taken + size > self.max_total):
            raise TooHeavy(f"a message of {size} bytes")
        if len(self.buffer) < 4 + size:
            return None
        data = bytes(self.buffer[4 : 4 + size])
        del self.buffer[: 4 + size]
        self.taken += size
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CodecError(f"a message that isn't JSON: {error}") from None
        if not isinstance(message, dict):
            raise CodecError("a message that isn't an object")
        return message

    def fill(self) -> bool:
        """Read what has arrived; False at the end of the stream."""
        try:
            data = self.end.recv(1 << 16)
        except ConnectionError:
            data = b""
        self.buffer += data
        return bool(data)

    def receive(self) -> Any:
        """The next frame, blocking; None at the end of the stream."""
        while (message := self.take()) is None:
            if not self.fill():
                return None
        return message

    def close(self) -> None:
        """Close the socket."""
        self.end.close()
