"""What people said of completions: a file with one judgement a line (JSON), which only ever grows.

    {"prompt_id": "p1", "annotator": "ann", "did": "ranked", "ranks": {"0f3c…": 1, "9a41…": 2}, "good": true, …}
    {"prompt_id": "p1", "annotator": "ann", "did": "undone", …}

The last line of an annotator on a prompt counts. Ranks are of completions, known by the hash of what they say
(`completion_id`), so that a judgement holds wherever the same completions turn up; 1 is best, equal ranks are a tie.
`good` says whether the best is good enough. A line is on the disk before anyone is told that it is kept. What a crash
cut short is the last line at most: a reader leaves it out and says so, the next writer removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from align.core.errors import DataError, RunError
from align.core.records import Message
from align.core.text import stable_hash

Did = Literal["ranked", "skipped", "undone"]


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one person said of one prompt's completions.

    Attributes:
        prompt_id: of the prompt.
        annotator: who said it.
        did: ranked, skipped (seen and passed by), or undone (what was said before no longer counts).
        ranks: of completions by their ids, 1 is best; empty unless ranked.
        good: whether the best is good enough.
        seconds: how long it took, where known.
        at: when it was said, ISO 8601, where known.
    """

    prompt_id: str
    annotator: str
    did: Did
    ranks: Mapping[str, int] = field(default_factory=dict)
    good: bool = True
    seconds: float | None = None
    at: str = ""

    def line(self) -> str:
        """The annotation as a line of the file."""
        said = {"prompt_id": self.prompt_id, "annotator": self.annotator, "did": self.did}
        more: dict[str, Any] = {"seconds": self.seconds, "at": self.at}
        if self.did == "ranked":
            more = {"ranks": dict(self.ranks), "good": self.good, **more}
        return json.dumps(said | {k: v for k, v in more.items() if v not in (None, "")}, ensure_ascii=False) + "\n"


def completion_id(completion: Sequence[Message]) -> str:
    """The id under which a completion is ranked: a hash of its messages, white space at their ends left out."""
    turns = [[turn["role"], turn["content"].strip(), turn.get("tool_calls")] for turn in completion]
    return stable_hash(json.dumps(turns, sort_keys=True))


def dense(ranks: Mapping[str, float]) -> dict[str, int]:
    """Ranks without gaps from any numbers whose order is that of the ranks: 2, 5, 5, 9 become 1, 2, 2, 3."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks.values())), start=1)}
    return {name: places[rank] for name, rank in ranks.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds.

    Attributes:
        standing: what counts, by (annotator, prompt), in the order in which it was said.
        torn: the last line, where a crash cut it short; else empty.
    """

    standing: dict[tuple[str, str], Annotation]
    torn: str = ""


def read_annotations(path: Path) -> Found:
    """Reads a file of annotations.

    Raises:
        DataError: it can't be read, or a line other than a torn last one is no annotation.
    """
    try:
        whole = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: can't be read ({problem.strerror or problem})") from problem
    *lines, last = whole.split(b"\n")
    standing: dict[tuple[str, str], Annotation] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _stand(standing, _annotation(line, f"{path}, line {number}"))
    torn = ""
    if last.strip():
        try:
            _stand(standing, _annotation(last, str(path)))
        except DataError:
            torn = last.decode("utf-8", "replace")
    return Found(standing, torn)


def _stand(standing: dict[tuple[str, str], Annotation], said: Annotation) -> None:
    """Takes an annotation in: the later one counts, and stands where it was said."""
    standing.pop((said.annotator, said.prompt_id), None)
    if said.did != "undone":
        standing[said.annotator, said.prompt_id] = said


def _annotation(line: bytes, where: str) -> Annotation:
    try:
        found = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{where}: is no JSON ({problem}); remove or mend the line") from problem
    return annotation_of(found, where)


def annotation_of(found: Any, where: str) -> Annotation:
    """An annotation from its JSON object.

    Raises:
        DataError: it is none; the message says what is missing or of the wrong form.
    """
    if not isinstance(found, dict):
        raise DataError(f"{where}: found {type(found).__name__}, an annotation (a JSON object) was expected")
    texts = [found.get(name) for name in ("prompt_id", "annotator")]
    ranks, seconds = found.get("ranks", {}), found.get("seconds")
    wrong = [
        (not all(isinstance(text, str) and text for text in texts), "prompt_id and annotator are texts"),
        (found.get("did") not in get_args(Did), f"did is one of {', '.join(get_args(Did))}"),
        (not isinstance(ranks, dict) or not all(map(_is_rank, ranks.values())), "ranks are whole numbers from 1"),
        (found.get("did") == "ranked" and not ranks, "ranks name at least one completion"),
        (not isinstance(found.get("good", True), bool), "good is true or false"),
        (isinstance(seconds, bool) or not isinstance(seconds, (int, float, type(None))), "seconds is a number"),
    ]
    if problems := [expected for is_wrong, expected in wrong if is_wrong]:
        raise DataError(f"{where}: is no annotation: {'; '.join(problems)}")
    return Annotation(
        prompt_id=found["prompt_id"],
        annotator=found["annotator"],
        did=found["did"],
        ranks=ranks,
        good=found.get("good", True),
        seconds=seconds,
        at=str(found.get("at", "")),
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class AnnotationFile:
    """A file of annotations that is being added to, locked against a second writer.

    Args:
        path: the file; made where it is missing.

    Attributes:
        path: the file.
        standing: what counts so far; kept up as annotations are added.
        torn: a last line that a crash had cut short and that was removed; nobody was told that it was kept.

    Raises:
        RunError: another process writes to it, or it can't be written to.
        DataError: it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as problem:
            raise RunError(
                f"{path}: can't be written to ({problem.strerror}); name another file with out="
            ) from problem
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(self._descriptor)
            raise RunError(
                f"{path}: another process adds to this file; stop it, or give each annotator a file with out="
            ) from problem
        try:
            found = read_annotations(path)
            self.standing, self.torn = found.standing, found.torn
            self._mend()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _mend(self) -> None:
        """Makes the file end with a whole line, and its name certain to be on the disk."""
        size = os.fstat(self._descriptor).st_size
        if self.torn:
            whole = self.path.read_bytes()
            os.ftruncate(self._descriptor, whole.rfind(b"\n") + 1)
        elif size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")
        os.fsync(self._descriptor)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def add(self, said: Annotation) -> None:
        """Adds an annotation; when this returns it is on the disk.

        Raises:
            RunError: it could not be written; then the file is as it was before.
        """
        line = said.line().encode()
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._descriptor)
        except OSError as problem:
            os.ftruncate(self._descriptor, before)
            raise RunError(
                f"{self.path}: nothing was saved ({problem.strerror}); mend it, then save again"
            ) from problem
        _stand(self.standing, said)

    def close(self) -> None:
        """Lets the file go."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(paths: Iterable[Path]) -> tuple[dict[tuple[str, str], Annotation], dict[str, str]]:
    """What counts in several files, and by file the last line that was cut short.

    Raises:
        DataError: a file can't be read, or one person said something of one prompt in two files.
    """
    standing: dict[tuple[str, str], Annotation] = {}
    torn: dict[str, str] = {}
    for path in paths:
        found = read_annotations(path)
        for key, said in found.standing.items():
            if key in standing:
                raise DataError(
                    f"{path}: {key[0]} ranked the prompt {key[1]} in another file too; name the annotators apart, or "
                    "leave one of the files out"
                )
            standing[key] = said
        if found.torn:
            torn[str(path)] = found.torn
    return standing, torn
