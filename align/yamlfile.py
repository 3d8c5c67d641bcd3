"""Reading YAML as people mean it: YAML 1.2's scalars, duplicate keys refused, the line of every key known.

PyYAML reads YAML 1.1, where `1e-5` is text, `no` is false, `010` is eight and a date is no text; none of that here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import RecipeError

Key = tuple[str | int, ...]
"""Where a value stands in a document: keys of mappings and positions in lists."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(str(node.value)))


@dataclass
class Document:
    """A parsed file.

    Attributes:
        data: plain dicts, lists and scalars.
        lines: the line (from 1) where each key or list item stands.
        problems: duplicate keys and keys that are no text: (where, what).
    """

    data: Any
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[tuple[Key, str]] = field(default_factory=list)


def read(path: Path) -> Document:
    """Reads a YAML file.

    Raises:
        RecipeError: the file is missing, is no text, or is no YAML; the message gives the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: it can't be read: {problem}") from problem
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parses YAML text; `name` stands in messages for where it came from.

    Raises:
        RecipeError: the text is no YAML; the message gives the line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = Document(None)
        if node is not None:
            document.data = _plain(loader, node, (), document, ())
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise RecipeError(f"{name}: line {line}: not YAML: {problem.problem or problem.context}") from problem
    except (yaml.YAMLError, ValueError) as problem:
        raise RecipeError(f"{name}: not YAML: {problem}") from problem
    finally:
        loader.dispose()
    return document


def value(text: str) -> Any:
    """The value of a `key=value` argument: a number, true, false, null, "quoted", [a list], {a: mapping}, or text.

    Text stays as it was written, `#` and `: ` in it too; `key=` is empty text.
    """
    try:
        document = parse(text, "")
    except RecipeError:
        return text
    found, stripped = document.data, text.strip()
    meant = {
        str: stripped.startswith(("'", '"')),
        list: stripped.startswith("["),
        dict: stripped.startswith("{"),
        type(None): stripped.lower() in ("null", "~"),
    }.get(type(found), True)
    return found if meant and not document.problems else text


def split_argument(argument: str) -> tuple[tuple[str, ...], Any]:
    """Splits `key.path=value`.

    Raises:
        RecipeError: there is no `=`, or nothing before it.
    """
    key, equals, text = argument.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or not all(parts):
        raise RecipeError(f"'{argument}': settings are given as key=value; write {argument.strip('-=') or 'key'}=…")
    return parts, value(text)


def put(data: dict[str, Any], path: tuple[str, ...], new: Any) -> None:
    """Sets `new` at `path`; mappings on the way are made where there are none."""
    for part in path[:-1]:
        inner = data.get(part)
        inner = dict(inner) if isinstance(inner, Mapping) else {}
        data[part] = inner
        data = inner
    data[path[-1]] = new


def _plain(loader: _Loader, node: yaml.Node, at: Key, document: Document, above: tuple[int, ...]) -> Any:
    """The value of a node; `above` are the nodes that contain it, so that an alias to one of them is noticed."""
    if id(node) in above:
        document.problems.append((at, "an alias that contains itself"))
        return None
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        items = []
        for position, item in enumerate(node.value):
            document.lines[(*at, position)] = item.start_mark.line + 1
            items.append(_plain(loader, item, (*at, position), document, above))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.value == "<<":
            continue
        if key_node.value in seen:
            document.problems.append(((*at, key_node.value), f"given again in line {key_node.start_mark.line + 1}"))
        seen.add(str(key_node.value))
    loader.flatten_mapping(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append((at, f"a key that is no text (line {key_node.start_mark.line + 1})"))
            continue
        key = str(key_node.value)
        document.lines[(*at, key)] = key_node.start_mark.line + 1
        mapping[key] = _plain(loader, value_node, (*at, key), document, above)
    return mapping


class Problems:
    """The problems of one file, each told as `file: where: what (line N)`."""

    def __init__(self, file: str, document: Document | None = None, hidden: int = 0) -> None:
        """`hidden` is how many keys at the front of a place the user never wrote (for a stage that is run alone)."""
        self.file = file
        self.hidden = hidden
        self.found: list[str] = []
        self._lines = document.lines if document else {}
        for at, what in document.problems if document else ():
            self.add((*[""] * hidden, *at), what)

    def add(self, at: Key, what: str) -> None:
        """Takes in what is wrong at a place."""
        shown = at[self.hidden :]
        line = next((self._lines[shown[:n]] for n in range(len(shown), 0, -1) if shown[:n] in self._lines), None)
        told = ": ".join(part for part in (self.file, self.place(at), what) if part)
        self.found.append(f"{told} (line {line})" if line else told)

    def place(self, at: Key) -> str:
        """A place as a user writes it: `steps.dpo.in.prompts[1]`."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at[self.hidden :])
        return text.removeprefix(".")

    def stop(self) -> None:
        """Ends here if there is any problem.

        Raises:
            RecipeError: with all of them.
        """
        if self.found:
            raise RecipeError(self.found)
