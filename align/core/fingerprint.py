"""Fingerprints: short hashes that change when settings or content change, and only then."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.core.errors import DataError

_LEFT_OUT = {"README.md", "manifest.json", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt"}
"""Files of a model or dataset folder that can change without its content changing."""

_seen: dict[tuple[str, int, int], str] = {}


def fingerprint_of(thing: object) -> str:
    """The fingerprint of settings: anything that JSON can say, and models, dataclasses, paths, enums and sets.

    The order of a mapping's keys doesn't matter, the order of a list does; 1 and 1.0 differ.

    Raises:
        TypeError: it holds something that has no stable text.
    """
    text = json.dumps(_plain(thing), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(thing: object) -> Any:
    if thing is None or (isinstance(thing, (bool, int, float, str)) and not isinstance(thing, Enum)):
        return thing
    if isinstance(thing, Enum):
        return _plain(thing.value)
    if isinstance(thing, BaseModel):
        return _plain(thing.model_dump())
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: _plain(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
    if isinstance(thing, Path):
        return thing.as_posix()
    if isinstance(thing, Mapping):
        if not all(isinstance(key, (str, int, float, bool)) or key is None for key in thing):
            raise TypeError(f"a mapping with keys other than strings and numbers has no fingerprint: {thing!r:.200}")
        return {str(key): _plain(value) for key, value in thing.items()}
    if isinstance(thing, (set, frozenset)):
        return sorted((_plain(item) for item in thing), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(thing, Sequence) and not isinstance(thing, (bytes, bytearray)):
        return [_plain(item) for item in thing]
    raise TypeError(f"{type(thing).__name__} has no stable text to take a fingerprint of: {thing!r:.200}")


def content_fingerprint(*paths: Path) -> str:
    """The fingerprint of the bytes of files and folders.

    A folder counts with its files' relative paths; hidden files, `checkpoint-*` folders and notes that do not change
    what the folder holds (README.md, manifest.json, a trainer's state) are left out. Where a file lies doesn't matter.
    The hash of a file is kept in memory for as long as its size and time of change stay the same.

    Raises:
        DataError: a path doesn't exist or can't be read.
    """
    parts: list[tuple[str, str]] = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _counts(p.relative_to(path)))
            parts += [(p.relative_to(path).as_posix(), _file_hash(p)) for p in files]
        else:
            parts.append(("", _file_hash(path)))
    return fingerprint_of(parts)


def _counts(relative: Path) -> bool:
    hidden = any(part.startswith((".", "checkpoint-")) for part in relative.parts)
    return not hidden and relative.name not in _LEFT_OUT


def _file_hash(path: Path) -> str:
    try:
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in _seen:
            with path.open("rb") as file:
                _seen[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as problem:
        raise DataError(f"{path}: can't be read ({problem.strerror or problem})") from problem
    return _seen[key]
