"""Datasets and models on disk: what a stage is handed. Rows are read by `Table`, models are named by `ModelRef`.

Beside it: `writer` writes datasets, `sources` reads what users have, `manifest` records what a step did, `lineage`
traces a row back, `fingerprint` hashes content.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.core.errors import DataError, ModelError
from align.core.fingerprint import content_fingerprint, fingerprint_of
from align.core.records import Kind, Row

TINY = Path(__file__).resolve().parents[1] / "tiny" / "base"
SHIPPED = {"tiny": TINY, "tiny-writer": TINY.with_name("writer_model")}
"""The checkpoints that the package carries, by the names that stand for them; see docs/tiny_world.md."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""

_HUB_ID = re.compile(r"[\w.-]+/[\w][\w.-]*(?:@[\w./-]+)?")


@dataclass(frozen=True)
class ModelRef:
    """A model that a step takes.

    Attributes:
        path: a folder, or a Hub id.
        kind: MODEL or REWARD_MODEL.
        name: how people know it: the step that made it, or the id.
        fingerprint: of its content (a local folder's bytes, an adapter's with its base's, an ensemble's with its
            members'; a Hub id with its revision).
        revision: of a Hub id, where one was given (`id@revision`).
    """

    path: str
    kind: Kind
    name: str
    fingerprint: str
    revision: str | None = None

    @staticmethod
    def open(spec: str | Path, kind: Kind, name: str | None = None) -> ModelRef:
        """Finds a model, checks what can be seen of it without loading it, and reads it once for its fingerprint.

        Args:
            spec: see `find`.
            kind: what it is wanted as.
            name: see `find`.

        Raises:
            ModelError: there is no such model, it is of the other kind, or files are missing or broken.
        """
        found = ModelRef.find(spec, name)
        folder = Path(found.path)
        if not folder.is_dir():
            return replace(found, kind=kind)
        if found.kind is not kind:
            raise ModelError(f"{spec}: is a {_SPOKEN[found.kind]}, a {_SPOKEN[kind]} was expected")
        return replace(found, fingerprint=_fingerprint(folder))

    @staticmethod
    def find(spec: str | Path, name: str | None = None) -> ModelRef:
        """Finds a model of either kind, without a look at its weights: a folder's has no fingerprint.

        Args:
            spec: a model's folder or a step's folder, the name of a checkpoint of the package (`SHIPPED`), or a Hub id,
                with `@revision` to pin it. A LoRA adapter's folder is a model. What lies on the Hub counts as a policy.
            name: how people know it; else the folder's name (the step's name for a step's `model` folder) or the id.

        Raises:
            ModelError: there is no such model, or files are missing or broken.
        """
        text = str(spec)
        folder = SHIPPED.get(text) or Path(text).expanduser()
        if folder.is_dir():
            folder = folder / "model" if (folder / "model").is_dir() and not _is_model(folder) else folder
            default = text if text in SHIPPED else folder.parent.name if folder.name == "model" else folder.name
            return ModelRef(str(folder), _kind_of_folder(folder), name or default, "")
        if text in SHIPPED:
            raise ModelError(
                f"{text}: the checkpoint that the package carries is missing from {folder}; reinstall the package"
            )
        if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text) or folder.parent.is_dir():
            raise ModelError(
                f"{text}: no such model folder, and it is no Hub id (owner/name, or owner/name@revision){_near(folder)}"
            )
        path, _, revision = text.partition("@")
        return ModelRef(path, Kind.MODEL, name or text, f"{path}@{revision or 'main'}", revision or None)


def _near(folder: Path) -> str:
    """What may have been meant by a folder that isn't there: one beside it of nearly that name, or a shipped model."""
    beside = [str(folder.parent / each.name) for each in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(str(folder), [*beside, *SHIPPED], n=1)
    return f"; did you mean {close[0]}?" if close else f"; {', '.join(SHIPPED)} are shipped"


_SPOKEN = {Kind.MODEL: "policy", Kind.REWARD_MODEL: "reward model"}


def _fingerprint(folder: Path) -> str:
    own = content_fingerprint(folder, *_base_of(folder))
    members = [ModelRef.open(member, Kind.REWARD_MODEL).fingerprint for member in _members_of(folder)]
    return fingerprint_of([own, *members]) if members else own


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json")) or bool(
        _members_of(folder)
    )


def _members_of(folder: Path) -> list[str]:
    """The models that an ensemble's folder names, as `ModelRef.open` takes them; none for any other folder."""
    file = folder / "reward_model.json"
    if not file.is_file():
        return []
    members = _read_json(file).get("members") or []
    return ["@".join(filter(None, (member["path"], member.get("revision")))) for member in members]


def _kind_of_folder(folder: Path) -> Kind:
    """What a folder holds by its own files; see `ModelRef.open` for the errors."""
    if not _is_model(folder):
        if steps := sorted(str(path.parent) for path in folder.glob("*/model") if _is_model(path)):
            raise ModelError(
                f"{folder}: is a run and no model; give the folder of one of its steps: {', '.join(steps)}"
            )
        names = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelError(
            f"{folder}: is no model: it has neither config.json nor adapter_config.json "
            f"(it holds {', '.join(names) or 'nothing'}); give the folder that save_pretrained wrote"
        )
    if members := _members_of(folder):
        _check_members(folder, members)
        return Kind.REWARD_MODEL
    adapter = (folder / "adapter_config.json").is_file()
    config = _read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    _check_weights(folder)
    if adapter:
        _check_base(folder, config.get("base_model_name_or_path"))
    classifies = any("SequenceClassification" in str(a) for a in config.get("architectures") or [])
    if (folder / "reward_model.json").is_file() or classifies or config.get("task_type") == "SEQ_CLS":
        return Kind.REWARD_MODEL
    return Kind.MODEL


def _base_of(folder: Path) -> list[Path]:
    """The folder of the model that an adapter adapts; none where the base is on the Hub, or this is no adapter."""
    file = folder / "adapter_config.json"
    base = str(_read_json(file).get("base_model_name_or_path") or "") if file.is_file() else ""
    return [Path(base).expanduser()] if base and Path(base).expanduser().is_dir() else []


def _check_base(folder: Path, base: Any) -> None:
    """Whether the model that an adapter adapts is there, or may be on the Hub."""
    text = str(base or "")
    if not _base_of(folder) and (not _HUB_ID.fullmatch(text) or text.startswith(".")):
        raise ModelError(
            f"{folder}: is a LoRA adapter of {text or 'an unnamed model'}, which isn't there; put that model back, or "
            "name its folder or Hub id as base_model_name_or_path in adapter_config.json"
        )


def _check_members(folder: Path, members: list[str]) -> None:
    for member in members:
        try:
            found = ModelRef.find(member)
        except ModelError as problem:
            raise ModelError(
                f"{folder}: is an ensemble that lacks a member: {problem}; put that model back, or make the ensemble "
                "again (`align ensemble`)"
            ) from problem
        if found.kind is not Kind.REWARD_MODEL and Path(found.path).is_dir():
            raise ModelError(f"{folder}: is an ensemble, and its member {member} is a policy; make it again")


def _check_weights(folder: Path) -> None:
    indexes = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    for index in indexes:
        missing = sorted({f for f in _read_json(index).get("weight_map", {}).values() if not (folder / f).is_file()})
        if missing:
            raise ModelError(f"{folder}: {index.name} names {', '.join(missing)}, missing here; copy the model again")
    if not indexes and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ModelError(f"{folder}: has no weights (*.safetensors or *.bin); was the model saved to the end?")
    for file in folder.glob("*.safetensors"):
        if not _is_whole(file):
            raise ModelError(f"{file}: is damaged, or no safetensors file; was it cut short? copy or save it again")


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes with the header's length, JSON, the tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if 8 + length > min(size, _LONGEST_HEADER):
                return False
            header: dict[str, Any] = json.loads(opened.read(length))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return size == 8 + length + max(ends, default=0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path}: can't be read as JSON ({problem}); copy or save the model again") from problem
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds {type(found).__name__}, an object was expected")
    return found


class Table:
    """Rows on disk, read when asked for: one or more parquet files one after the other.

    Attributes:
        files: the parquet files, in order.
        name: how people know it.
        fingerprint: of its content.
        licenses: the licence of each source that the rows go back to, where known.
    """

    def __init__(
        self, files: Sequence[Path], name: str, fingerprint: str, licenses: Mapping[str, str] | None = None
    ) -> None:
        self.files = list(files)
        self.name = name
        self.fingerprint = fingerprint
        self.licenses = dict(licenses or {})
        self._length: int | None = None

    @staticmethod
    def open(*folders: Path, name: str | None = None) -> Table:
        """The rows of one or several folders that `DatasetWriter` wrote, one after the other.

        Raises:
            DataError: a folder has no data, or a file can't be read.
        """
        from align.core.card import read_licenses

        files: list[Path] = []
        licenses: dict[str, str] = {}
        for folder in folders:
            found = sorted((folder / "data").glob("*.parquet"))
            if not found:
                raise DataError(f"{folder}: has no rows (data/*.parquet); did the step that makes it finish?")
            files += found
            licenses |= read_licenses(folder)
        return Table(files, name or " + ".join(f.name for f in folders), content_fingerprint(*files), licenses)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; a column that only some files have counts, and is None in the others' rows."""
        return tuple(dict.fromkeys(name for file in self.files for name in _parquet(file).schema_arrow.names))

    def has_messages(self, column: str) -> bool:
        """Whether the column is there and holds messages, rather than text."""
        return column in self.columns and all(
            _fields(_parquet(file).schema_arrow.field(column).type) >= {"role", "content"}
            for file in self.files
            if column in _parquet(file).schema_arrow.names
        )

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(_parquet(file).metadata.num_rows for file in self.files)
        return self._length

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yields the rows in order, in bounded memory.

        Args:
            columns: only these, in this order; all of them where not given.

        Raises:
            DataError: a column isn't there, or a file is damaged.
        """
        names = list(self.columns if columns is None else columns)
        missing = sorted(set(names) - set(self.columns))
        if missing:
            raise DataError(f"{self.name}: has no column {', '.join(missing)}; it has {', '.join(self.columns)}")
        for file in self.files:
            yield from _rows_of_file(file, names)

    def hf(self) -> Any:
        """The same rows as a `datasets.Dataset`, memory-mapped (in the `datasets` cache folder)."""
        import datasets

        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            return datasets.Dataset.from_parquet([str(file) for file in self.files])
        finally:
            if shown:
                datasets.enable_progress_bars()


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(
            f"{file}: can't be read as parquet ({problem}); was it cut short? make or copy it again"
        ) from problem


def _rows_of_file(file: Path, names: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa

    with _parquet(file) as parquet:
        present = [name for name in names if name in parquet.schema_arrow.names]
        talk = [name for name in present if _fields(parquet.schema_arrow.field(name).type) > {"role", "content"}]
        try:
            for batch in parquet.iter_batches(batch_size=1000, columns=present):
                for row in batch.to_pylist():
                    for name in talk:
                        row[name] = row[name] and [_message(turn) for turn in row[name]]
                    yield {name: row.get(name) for name in names}
        except (pa.ArrowException, OSError) as problem:
            raise DataError(f"{file}: is damaged ({problem}); make or copy it again") from problem


def _fields(kind: Any) -> set[str]:
    """The names of the fields of a column of lists of structs, such as messages; empty for any other column."""
    import pyarrow as pa

    if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return set()
    return {field.name for field in kind.value_type}


def _message(stored: dict[str, Any]) -> dict[str, Any]:
    """A message as it was written: fields that it hadn't are null in the file, and tool calls are JSON text."""
    turn = {key: value for key, value in stored.items() if value is not None or key in ("role", "content")}
    if isinstance(turn.get("tool_calls"), str):
        turn["tool_calls"] = json.loads(turn["tool_calls"])
    return turn
