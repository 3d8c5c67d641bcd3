"""Runs a solution, in a confined child, and hands back values. It holds no test, no expected value and no verdict.

Everything here shares a process with the solution, so the solution can rewrite all of it: whoever reads the channel
must expect any frame at any time.
"""

from __future__ import annotations

import atexit
import builtins
import math
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from align.core.sandbox.inside.codec import (
    Channel,
    CodecError,
    NotPlain,
    Reader,
    base_value,
    to_json,
)

FILE = "<solution>"


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: type, nearest built-in type, message, and the line of the solution."""
    kind = type(error)
    base = next((k.__name__ for k in kind.__mro__ if k.__module__ == "builtins"), "Exception")
    try:
        message = str(error)[:300]
    except BaseException:
        message = ""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == FILE:
            line = step.tb_lineno
        step = step.tb_next
    return {"type": kind.__name__, "base": base, "message": message, "line": line}


def _namespace(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__["__builtins__"] = builtins
    return module.__dict__


def _load(channel: Channel, job: dict[str, Any]) -> dict[str, Any] | None:
    """The solution's namespace after its code ran; None if it raised, which the channel has then been told."""
    namespace = _namespace("solution")
    for part in ("setup", "code"):
        try:
            if job[part]:
                exec(compile(job[part], FILE if part == "code" else "<setup>", "exec", dont_inherit=True), namespace)
        except BaseException as error:
            channel.send({"raised": describe(error), "in": part})
            return None
    return namespace


def call(channel: Channel, job: dict[str, Any]) -> None:
    """Call functions on plain arguments; a frame for each value, the last of which says that it is the end. Stops at
    the first failure."""
    namespace = _load(channel, job)
    if namespace is None:
        return
    for number, (name, args, kwargs) in enumerate(job["calls"], 1):
        function = namespace.get(name)
        if function is None:
            channel.send({"missing": name})
            return
        arguments, named = Reader().value(args), Reader().value(kwargs)
        try:
            value = function(*arguments, **named)
        except BaseException as error:
            channel.send({"raised": describe(error), "in": "call"})
            return
        try:
            end = {"end": number} if number == len(job["calls"]) else {}
            channel.send({"value": to_json(value), **end})
        except NotPlain as error:
            channel.send({"opaque": str(error)})
            return
        except CodecError as error:
            channel.send({"unreadable": str(error)})
            return


def program(channel: Channel, job: dict[str, Any]) -> None:
    """Run a whole program on its standard input and output; tells only whether it raised."""
    namespace = _namespace("__main__")
    raised = None
    try:
        exec(compile(job["code"], FILE, "exec", dont_inherit=True), namespace)
        threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit:
        pass
    except BaseException as error:
        raised = describe(error)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        raised = raised or describe(error)
    channel.send({"raised": raised, "in": "program"} if raised else {"end": 0})


# Operations that tests may apply to the solution's objects.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "isinstance": lambda value, kind: isinstance(value, kind), "len": len, "iter": iter, "next": next, "str": str,
    "repr": repr, "int": int, "float": float, "complex": complex, "index": operator.index, "bool": bool, "hash": hash,
    "abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "bytes": bytes,
    "reversed": reversed, "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "contains": operator.contains, "format": format, "data": base_value, "dir": dir,
    "enter": lambda value: value.__enter__(), "exit": lambda value: value.__exit__(None, None, None),
    "getattr": getattr, "setattr": setattr, "delattr": delattr, "call": lambda f, *a, **k: f(*a, **k),
}  # fmt: skip
OPERATIONS.update(
    (name, getattr(operator, name))
    for name in (
        "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_",
        "or_", "xor", "lshift", "rshift", "neg", "pos", "invert",
    )
)  # fmt: skip

_STANDARD = {"builtins", "re", "collections", "datetime", "decimal", "fractions", "itertools", "functools", "enum"}


class _Objects:
    """The solution's objects that the tests hold handles of."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def handle(self, value: Any) -> dict[str, Any]:
        """The handle of an object, with what the tests' side must know of it to stand for it."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        kind = type(value)
        about: dict[str, Any] = {"type": kind.__name__, "truth": _truth(value), "data": base_value(value) is not value}
        if isinstance(value, type) and issubclass(value, BaseException):
            about["exception"] = next(k.__name__ for k in value.__mro__ if k.__module__ == "builtins")
            about["name"] = value.__name__
        return {"h": [number, about]}

    def resolve(self, tag: str, body: Any) -> Any:
        """What stands for a tag that is not plain data: an object of ours, or a function of the tests."""
        if tag == "h":
            return self.kept[body[0]]
        if tag == "fn":
            return lambda *args: self._call_back(body, args)
        if tag == "it":
            return self._items(body)
        raise CodecError(f"an unknown tag {tag!r}")

    def _items(self, number: int) -> Iterator[Any]:
        """What an iterator of the tests gives; the function of that number is its `__next__`."""
        while True:
            try:
                item = self._call_back(number, ())
            except StopIteration:
                return
            yield item

    def _call_back(self, number: int, args: tuple[Any, ...]) -> Any:
        self.channel.send({"callback": number, "args": self.pack(list(args))})
        while True:
            answer = self.channel.receive()
            if answer is None:
                raise SystemExit
            if "op" not in answer:
                break
            answer_request(self, answer)
        if "raised" in answer:
            raise getattr(builtins, answer["raised"], RuntimeError)(answer["message"])
        return self.unpack(answer["value"])

    def pack(self, value: Any) -> Any:
        """Tagged JSON, with handles for what is not plain data."""
        return to_json(value, self.handle, flatten=False)

    def unpack(self, node: Any) -> Any:
        """The value of tagged JSON."""
        return Reader(self.resolve).value(node)


def _truth(value: Any) -> bool | None:
    """The truth value of an object whose class leaves it to the language; None where the solution's class decides."""
    for kind in type(value).__mro__:
        if {"__bool__", "__len__"} & kind.__dict__.keys():
            return bool(value) if kind.__module__ in _STANDARD else None
    return True


def answer_request(objects: _Objects, request: dict[str, Any]) -> None:
    """Do one operation for the tests: tells its value or what it raised, and the arguments that it changed in place."""
    reply: dict[str, Any]
    try:
        args, kwargs = objects.unpack(request["args"]), objects.unpack(request["kwargs"])
        value = OPERATIONS[request["op"]](*args, **kwargs)
        same = next((i for i, a in enumerate(args) if a is value and isinstance(a, list | dict | set)), None)
        reply = {"value": None, "same": same} if same is not None else {"value": objects.pack(value)}
        changed = {}
        for index, argument in enumerate(args):
            if isinstance(argument, list | dict | set | bytearray):
                after = objects.pack(argument)
                if after != request["args"][index]:
                    changed[str(index)] = after
        if changed:
            reply["changed"] = changed
        objects.channel.send(reply)
    except BaseException as error:
        ended = request["op"] == "next" and isinstance(error, StopIteration)
        objects.channel.send({"stop": True} if ended else {"raised": describe(error)})


def serve(channel: Channel, job: dict[str, Any]) -> None:
    """Load a solution, then do what its tests ask, until they hang up."""
    namespace = _load(channel, job)
    if namespace is None:
        return
    objects = _Objects(channel)
    channel.send({"loaded": True})
    while (request := channel.receive()) is not None:
        if "names" in request:
            found = {n: objects.pack(namespace[n]) for n in request["names"] if n in namespace}
            channel.send({"value": found})
        else:
            answer_request(objects, request)
