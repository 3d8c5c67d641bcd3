"""A step's folder: made ready for an attempt, never emptied of what isn't ours; and full disks."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from align.core.errors import RunError
from align.lock import FILE

_MARK = ".align-step"
_SPACE_WANTED = 64 * 2**20


def prepare(folder: Path, fingerprint: str) -> Path:
    """Empties a step's folder but for what an earlier attempt can go on from, and gives its work folder."""
    (folder / "manifest.json").unlink(missing_ok=True)  # first: from here on the step is unfinished
    kept = [_MARK, FILE, "work"]
    if (folder / "work" / fingerprint).is_dir():
        kept.append("metrics.jsonl")  # the curves up to the checkpoint that the training goes on from
    for path in folder.iterdir():
        if path.name not in kept:
            _remove(path)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for path in work.iterdir():
        if path.name != fingerprint and not path.name.startswith(("completions-", "sources")):
            _remove(path)
    return work / fingerprint


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def mark_ours(folder: Path) -> None:
    """Makes a step's folder and marks it as one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def is_step(folder: Path) -> bool:
    """Whether a folder is a step's own."""
    return (folder / _MARK).exists()


def check_ours(folder: Path, what: str) -> None:
    """Refuses a folder that holds things which no step made: a step's folder is emptied before it runs.

    Raises:
        RunError: it does; the message names some.
    """
    names = [path.name for path in folder.iterdir() if path.name != FILE] if folder.is_dir() else []
    if names and _MARK not in names:
        raise RunError(
            f"{folder}: holds {', '.join(sorted(names)[:5])}, which no step of align made; give another folder for "
            f"{what}, or move these away"
        )


def check_space(folder: Path) -> None:
    """Refuses to begin where the disk is as good as full.

    Raises:
        RunError: it is.
    """
    free = shutil.disk_usage(folder).free
    if free < _SPACE_WANTED:
        raise RunError(
            f"{folder}: only {free // 2**20} MiB are free on its disk; free some space, or give another folder"
        )


def sync(folder: Path) -> None:
    """Has all files below a folder written to the disk, so that a power cut can't take what counts as done."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def disk_is_full(problem: BaseException, folder: Path) -> bool:
    """Whether an error came of a full disk; libraries tell of it in many ways (safetensors and torch in text only)."""
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if "No space left on device" in str(problem):
        return True
    return folder.exists() and shutil.disk_usage(folder).free < 2**20


def cache_folder() -> Path:
    """What all runs of a user share: $ALIGN_CACHE, or a folder `align` where the system keeps caches."""
    told = os.environ.get("ALIGN_CACHE")
    return Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"
