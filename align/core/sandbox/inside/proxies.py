"""The tests' view of a solution that lives in another process: proxies for its functions, classes and objects.

Values that are plain data arrive as such and are compared here, natively. Where a test would rest on the word of an
object of the solution's own (its `__eq__`, its ordering, its truth value, its arithmetic), the result is marked opaque:
whether it is so is decided on this side, from the type of the operands alone, never by what the solution's side claims.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import Any

from align.core.sandbox.inside.codec import Channel, CodecError, Reader, to_json
from align.core.sandbox.inside.runner import OPERATIONS

MAX_DETAIL = 300


class SolutionLost(BaseException):
    """The solution's process ended, or broke the protocol; nothing that a test catches."""


class SolutionRaised(Exception):  # noqa: N818
    """The solution raised something that would end iterations or the process if it were raised here."""


class Solution:
    """The tests' end of the line to a solution.

    Attributes:
        opaque: what kind of the solution's word a result so far rests on; empty for none.
        raised: what the solution raised last, as the runner describes it.
        lost: why nothing more can come from the solution; empty while it is there. Kept because a test may catch
            `SolutionLost` with a bare `except`.
        unmet: an assertion that failed in a function which a test passed to the solution, which may have caught it.
        unsendable: what a test tried to pass to the solution in vain.
        asked: operations so far.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.opaque = ""
        self.raised: dict[str, Any] | None = None
        self.lost = self.unmet = self.unsendable = ""
        self.asked = 0
        self.callbacks: list[Callable[..., Any]] = []
        self.proxies: dict[int, Any] = {}
        self.exceptions: dict[str, type[BaseException]] = {}

    def forget(self) -> None:
        """Begin a new test: nothing was raised in it yet."""
        self.raised = None

    def names(self, names: list[str]) -> dict[str, Any]:
        """The values or proxies of those global names that the solution defines."""
        reply = self._exchange({"names": names})
        found = reply.get("value")
        if not isinstance(found, dict):
            raise self.lose("a malformed reply")
        return {name: self._unpack(node) for name, node in found.items() if name in names}

    def operate(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Have an operation done in the solution's process.

        Raises:
            Exception: what the operation raised there, as the nearest built-in type.
        """
        self.asked += 1
        message = {"op": op, "args": self._pack(list(args)), "kwargs": self._pack(kwargs)}
        reply = self._exchange(message)
        while "callback" in reply:
            reply = self._exchange(self._call_back(reply))
        if "raised" in reply:
            raise self._exception(reply["raised"])
        if "stop" in reply and op == "next":
            raise StopIteration
        for index, node in (reply.get("changed") or {}).items():
            if index.isdigit() and int(index) < len(args):
                _replace(args[int(index)], self._unpack(node))
        same = reply.get("same")
        if isinstance(same, int) and 0 <= same < len(args):
            return args[same]
        return self._unpack(reply.get("value"))

    def lose(self, why: str) -> SolutionLost:
        """Note that the solution is lost for good; what to raise."""
        self.lost = self.lost or why
        return SolutionLost(self.lost)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.lost:
            raise self.lose("")
        try:
            self.channel.send(message)
            reply = self.channel.receive()
        except OSError:
            reply = None
        except CodecError as error:
            raise self.lose(str(error)) from None
        if not isinstance(reply, dict):
            raise self.lose("it ended before answering")
        return reply

    def _call_back(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self.callbacks[request["callback"]]
            return {"value": self._pack(function(*self._unpack(request["args"])))}
        except Exception as error:
            if isinstance(error, AssertionError):
                self.unmet = f"an assertion in a function of the test did not hold {error}".strip()[:MAX_DETAIL]
            return {"raised": type(error).__name__, "message": str(error)[:MAX_DETAIL]}

    def _pack(self, value: Any) -> Any:
        return to_json(value, self._handle, flatten=True)

    def _handle(self, value: Any) -> dict[str, Any]:
        if type(value) is Proxy:
            return {"h": [object.__getattribute__(value, "_number")]}
        if callable(value):
            self.callbacks.append(value)
            return {"fn": len(self.callbacks) - 1}
        if isinstance(value, Iterator):
            self.callbacks.append(value.__next__)
            return {"it": len(self.callbacks) - 1}
        self.unsendable = f"passes the program a {type(value).__name__}, which is not plain data"
        raise TypeError(self.unsendable)

    def _unpack(self, node: Any) -> Any:
        try:
            return Reader(self._proxy).value(node)
        except CodecError as error:
            raise self.lose(str(error)) from None

    def _proxy(self, tag: str, body: Any) -> Any:
        if tag != "h" or not isinstance(body, list) or len(body) != 2 or not isinstance(body[0], int):
            raise CodecError("a malformed handle")
        number, about = body
        if not isinstance(about, dict):
            raise CodecError("a malformed handle")
        if "exception" in about:
            return self._exception_type(str(about.get("name")), str(about["exception"]))
        if number not in self.proxies:
            self.proxies[number] = Proxy(self, number, about)
        return self.proxies[number]

    def _exception_type(self, name: str, base: str) -> type[BaseException]:
        parent: Any = getattr(builtins, base, None)
        if not (isinstance(parent, type) and issubclass(parent, Exception)) or issubclass(
            parent, StopIteration | StopAsyncIteration
        ):
            parent = SolutionRaised
        key = f"{name}:{base}"
        if key not in self.exceptions:
            known: bool = getattr(builtins, name, None) is parent
            self.exceptions[key] = parent if known else type(name, (parent,), {})
        return self.exceptions[key]

    def _exception(self, about: Any) -> BaseException:
        if not isinstance(about, dict):
            raise self.lose("a malformed reply")
        self.raised = about
        kind = self._exception_type(str(about.get("type")), str(about.get("base")))
        text = str(about.get("message"))[:MAX_DETAIL]
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more arguments
            return SolutionRaised(f"{kind.__name__}: {text}")


def _replace(held: Any, now: Any) -> None:
    """Give a container that the solution changed in place its new content."""
    if isinstance(held, list | bytearray) and isinstance(now, list | bytearray):
        held[:] = now
    elif isinstance(held, dict | set) and isinstance(now, type(held)):
        held.clear()
        held.update(now)


class Proxy:
    """Stands for one object of the solution's own."""

    __slots__ = ("_about", "_number", "_solution")
    _about: dict[str, Any]
    _number: int
    _solution: Solution

    def __init__(self, solution: Solution, number: int, about: dict[str, Any]) -> None:
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_about", about)

    def __getattr__(self, name: str) -> Any:
        return _operate(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _operate(self, "delattr", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it in the solution's process."""
        return _solution(self).operate("call", self, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        if _holds_data(self):
            yield from _data(self)
            return
        iterator = _operate(self, "iter")
        if type(iterator) is not Proxy:
            raise TypeError(f"iter() returned {type(iterator).__name__}")
        while True:
            try:
                item = _operate(iterator, "next")
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        return _operate(self, "next")

    def __bool__(self) -> bool:
        if _holds_data(self):
            return bool(_data(self))
        truth = object.__getattribute__(self, "_about").get("truth")
        if isinstance(truth, bool):  # fixed when the object came: says no more than a plain True or False would
            return truth
        _mark(self, "truth value")
        return bool(_operate(self, "bool"))

    def __hash__(self) -> int:
        if _holds_data(self):
            return hash(_data(self))
        _mark(self, "hash")
        return object.__getattribute__(self, "_number")  # type: ignore[no-any-return]

    def __instancecheck__(self, value: object) -> bool:
        if type(value) is Proxy or value is not None:
            return _solution(self).operate("isinstance", value, self) is True
        return False

    def __enter__(self) -> Any:
        return _operate(self, "enter")

    def __exit__(self, *_: object) -> None:
        _operate(self, "exit")

    def __dir__(self) -> Any:
        return _operate(self, "dir")


def _solution(proxy: Proxy) -> Solution:
    return object.__getattribute__(proxy, "_solution")  # type: ignore[no-any-return]


def _operate(proxy: Proxy, op: str, *args: Any) -> Any:
    return _solution(proxy).operate(op, proxy, *args)


def _mark(proxy: Proxy, what: str) -> None:
    kind = str(object.__getattribute__(proxy, "_about").get("type"))[:60]
    _solution(proxy).opaque = f"the {what} of the solution's own {kind!r} object"


def _holds_data(proxy: Proxy) -> bool:
    return object.__getattribute__(proxy, "_about").get("data") is True


def _data(proxy: Any) -> Any:
    """The built-in value inside a proxy of, say, a named tuple; anything else as it is."""
    if type(proxy) is not Proxy or not _holds_data(proxy):
        return proxy
    value = _operate(proxy, "data")
    if type(value) is Proxy:
        raise _solution(proxy).lose("a malformed reply")
    return value


def _define(dunder: str, op: str, word: str, result: type | None, *, swap: bool = False) -> None:
    """Give `Proxy` one operator.

    Args:
        dunder: its special method.
        op: the runner's operation.
        word: what an opaque result rests on; empty where the operand shows the solution nothing of the tests.
        result: the built-in type that the language asks for, if any.
        swap: the proxy is the right operand.
    """

    def method(self: Proxy, *args: Any) -> Any:
        if op == "eq" and args and args[0] is self:
            return True
        if op == "ne" and args and args[0] is self:
            return False
        if _holds_data(self):
            left, right = _data(self), tuple(_data(a) for a in args)
            operands = (*right, left) if swap else (left, *right)
            return OPERATIONS[op](*operands)
        if word:
            _mark(self, word)
        operands = (*args, self) if swap else (self, *args)
        value = _solution(self).operate(op, *operands)
        if result is not None and type(value) is not result:
            raise TypeError(f"{dunder} returned {type(value).__name__}")
        return value

    setattr(Proxy, dunder, method)


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _define(f"__{_name}__", _name, "comparison", None)
_define("__contains__", "contains", "membership test", None)
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    _op = _name + "_" if _name in ("and", "or") else _name
    _define(f"__{_name}__", _op, "arithmetic", None)
    _define(f"__r{_name}__", _op, "arithmetic", None, swap=True)
for _name in ("neg", "pos", "invert"):
    _define(f"__{_name}__", _name, "arithmetic", None)
for _name in ("getitem", "setitem", "delitem", "abs", "round", "floor", "ceil", "trunc", "reversed"):
    _define(f"__{_name}__", _name, "", None)
for _name, _kind in (("len", int), ("str", str), ("repr", str), ("int", int), ("float", float), ("complex", complex),
                     ("index", int), ("bytes", bytes), ("format", str)):  # fmt: skip
    _define(f"__{_name}__", _name, "", _kind)
