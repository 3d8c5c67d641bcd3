"""Datasets and models on disk: reading what users have, writing what a step made, fingerprints and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.records import Kind, Row


@dataclass(frozen=True)
class ModelRef:
    """A model that a step takes.

    Attributes:
        path: a folder, or a Hub id.
        kind: MODEL or REWARD_MODEL.
        name: how people know it: the step that made it, or the id.
        fingerprint: of its content (a local folder's bytes; a Hub id with its revision).
    """

    path: str
    kind: Kind
    name: str
    fingerprint: str


class Table:
    """Rows on disk, read when asked for: one or more parquet datasets one after the other, memory-mapped."""

    name: str
    fingerprint: str

    def __init__(self, files: Sequence[Path], name: str, fingerprint: str) -> None:
        self.files = list(files)
        self.name = name
        self.fingerprint = fingerprint

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yields the rows in order, in bounded memory."""
        raise NotImplementedError

    def hf(self) -> Any:
        """The same rows as a `datasets.Dataset`, memory-mapped."""
        raise NotImplementedError
