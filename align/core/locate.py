"""Where data lies: what a name stands for, as a list of files or loaded Hub splits."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.hub import HUB_ID, hub_problem
from align.core.readers import SUFFIXES, TEXTS, Record, count_records, read_records
from align.core.records import Split

_SPLIT_NAME = re.compile(r"(train(?:ing)?|dev|valid(?:ation)?|val|test|eval(?:uation)?)(?:[-_.\d].*)?")
_NO_DATA = {"manifest.json", "metrics.jsonl", "dataset_infos.json", "dataset_info.json", "state.json"}


@dataclass(frozen=True)
class Part:
    """A file, or one split of a Hub dataset.

    Attributes:
        label: what rows made from it say in their column `source`; never an absolute path.
        split: the split's name where the file's name or the Hub tells it.
        file: the file, or None.
        dataset: a `datasets.Dataset`, or None.
    """

    label: str
    split: str | None
    file: Path | None = None
    dataset: Any = None

    def records(self) -> Iterator[tuple[str, Record]]:
        """The records with their places."""
        if self.file is not None:
            yield from read_records(self.file)
        else:
            for number, record in enumerate(self.dataset):
                yield f"{self.label}, split {self.split}, row {number}", record

    def count(self) -> int:
        """How many records there are."""
        return len(self.dataset) if self.file is None else count_records(self.file)


def our_split(name: str) -> Split | None:
    """Which of train, dev and test a split of another name is (validation, test_sft); None where that isn't plain."""
    found = _SPLIT_NAME.fullmatch(name.lower())
    if found is None:
        return None
    return "train" if found[1].startswith("train") else "test" if found[1].startswith(("test", "eval")) else "dev"


def locate(source: str, config: str | None, split: str | None, revision: str | None, texts: bool = False) -> list[Part]:
    """The parts that a name stands for: a file, a glob, a folder, or a Hub id where no such path exists.

    Args:
        source: the name.
        config: a Hub dataset's configuration.
        split: only the parts of this split, where parts have splits.
        revision: a Hub dataset's revision.
        texts: whether texts (`TEXTS`) will do for data where a folder holds no other data.

    Raises:
        DataError: there is no such thing, it holds no data, or it has splits and one must be chosen.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        parts = _folder(path, texts)
    elif path.exists():
        parts = [Part(path.name, None, path)]
    elif glob.has_magic(source):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - the pattern may be absolute
        files = sorted(Path(name) for name in found if Path(name).is_file())
        if not files:
            raise DataError(f"{source}: no file matches")
        parts = [Part(file.name, None, file) for file in files]
    elif HUB_ID.fullmatch(source) and path.suffix not in (*SUFFIXES, *TEXTS):
        parts = _hub(source, config, revision)
    else:
        bare = "" if "/" in source else ", and it is no Hub id (owner/name)"
        raise DataError(f"{source}: no such file or folder{bare}{_near(path)}")
    return _of_split(parts, source, split)


def _near(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _folder(path: Path, texts: bool) -> list[Part]:
    if (path / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [
            Part(f"{path.resolve().name}/{name}", name, part.file) for name in names for part in _saved(path / name)
        ]
    if (path / "state.json").is_file():
        return _saved(path)
    files = sorted((path / "data").glob("*.parquet"))
    ours = [file for file in files if re.fullmatch(r"part-\d{5}\.parquet", file.name)]
    if [*(path / "data").glob("*.parquet.part")] or (ours and not (path / "README.md").is_file()):
        raise DataError(f"{path}: is half-written; run what makes it again")
    files = files or _files_below(path, SUFFIXES)
    if steps := sorted(found.parent.name for found in path.glob("*/manifest.json")):
        raise DataError(f"{path}: is a run's folder; name one of its steps, such as {path / steps[0]}")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        raise DataError(f"{path}: is a model's folder, data was expected")
    if not files and texts and (prose := [file for file in _files_below(path, TEXTS) if file.stat().st_size]):
        top = path.resolve().name
        return [Part(f"{top}/{file.relative_to(path).as_posix()}", None, file) for file in prose]
    if not files:
        names = sorted(p.name for p in path.iterdir())[:8]
        raise DataError(
            f"{path}: is a folder without data ({', '.join(SUFFIXES)}); it holds {', '.join(names) or 'nothing'}"
        )
    stems = [file.name.removesuffix(file.suffix) for file in files]
    told = [stem if our_split(stem) else None for stem in stems]
    if None in told and any(our_split(stem) in ("dev", "test") for stem in told if stem):
        odd = next(file.name for file, stem in zip(files, told, strict=True) if stem is None)
        raise DataError(
            f"{path}: has files of several splits by their names, and {odd}, whose name tells none; name the files, as "
            f"in {path / '*.jsonl'}, or one of them"
        )
    top = path.resolve().name
    return [
        Part(f"{top}/{file.relative_to(path).as_posix()}", _stem_split(stem), file)
        for file, stem in zip(files, told, strict=True)
    ]


def _files_below(path: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix in suffixes and file.name not in _NO_DATA and not _hidden(file.relative_to(path))
    )


def _stem_split(stem: str | None) -> str | None:
    """train-00000-of-00003 belongs to the split `train`."""
    found = _SPLIT_NAME.fullmatch(stem.lower()) if stem else None
    return found[1] if found else None


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _saved(path: Path) -> list[Part]:
    """A folder that `Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path / 'state.json'}: can't be read ({problem}); save the dataset again") from problem
    return [Part(f"{path.resolve().name}/{file.name}", None, file) for file in files]


def _hub(source: str, config: str | None, revision: str | None) -> list[Part]:
    import datasets

    if wrong := hub_problem(source, data=True):
        raise DataError(f"{source}: {wrong}")
    try:
        found = datasets.load_dataset(source, config, revision=revision)
    except Exception as problem:  # the library raises its own, the Hub client's and Python's
        said = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise DataError(
            f"{source}: no such file or folder, and it can't be loaded as a Hub dataset ({said:.200}); check the name, "
            "its configuration (`name`) and the network, or give a local path"
        ) from problem
    return [Part(source, str(name), dataset=dataset) for name, dataset in found.items()]


def _of_split(parts: Sequence[Part], source: str, split: str | None) -> list[Part]:
    names = list(dict.fromkeys(part.split for part in parts if part.split is not None))
    if not names:
        return list(parts)  # a column `split` of the rows may still tell
    if split is not None:
        chosen = [part for part in parts if part.split == split]
        if not chosen:
            raise DataError(f"{source}: has no split {split!r}; it has {', '.join(names)}")
        return chosen
    ours = [our_split(name) for name in names]
    if len(names) > 1 and (None in ours or len(set(ours)) < len(ours)):
        raise DataError(f"{source}: has the splits {', '.join(names)}; choose one, as in split: {names[0]}")
    return list(parts)
