"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.core.errors import RunError
from align.core.writer import disk_errors

FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; it goes with the process, however that ends.

    Raises:
        RunError: another process holds it; the message names it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise RunError(
                f"{folder}: another run is writing here (process {holder}); wait for it, end it, or give another folder"
            ) from None
        # A forked process holds the same lock and could outlive us: it lets go of it at once.
        children = _close_in_children(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            children.clear()
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def holder(folder: Path) -> str | None:
    """The process that runs in a folder right now, or None."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return None


def _close_in_children(descriptor: int) -> list[int]:
    """Closes the descriptor in every process forked from here on, until the list that it gives is emptied."""
    held = [descriptor]

    def close() -> None:
        for each in held:
            os.close(each)
        held.clear()

    os.register_at_fork(after_in_child=close)
    return held
