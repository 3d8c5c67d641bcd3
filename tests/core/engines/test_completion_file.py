"""What the file of completions promises: what was finished is there after any kill, and nothing else ever is."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from align.core.engines import Completion
from align.core.engines.completion_file import CompletionFile, _Index, kept_in
from align.core.errors import RunError

ROOT = Path(__file__).parents[3]
HEAD = 32
"""Bytes of a record's head."""


def _key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def _completion(number: int) -> Completion:
    return Completion(f"answer {number} 数", (number, 7), "stop", (-0.5, -number))


def _write(path: Path, count: int) -> bytes:
    """A file with `count` records; gives its bytes."""
    file = CompletionFile(path)
    for number in range(count):
        file.put(_key(number), _completion(number))
    file.close()
    return path.read_bytes()


def _read(path: Path, count: int) -> list[Completion | None]:
    file = CompletionFile(path)
    found = [file.get(_key(number)) for number in range(count)]
    file.close()
    return found


def test_what_is_kept_comes_back_exactly(tmp_path: Path) -> None:
    kept = [
        Completion("naïve 数 \n\x00", (0, 151645, 2**32 - 1), "stop", (-0.1, -1e-30, -123.456789012345)),
        Completion("", (), "stop"),
        Completion("half a pair: \ud83d", (7,), "length", ()),
        Completion("long " * 1000, tuple(range(3000)), "length"),  # no record of one read
    ]
    file = CompletionFile(tmp_path / "deep" / "file")
    for i, completion in enumerate(kept):
        file.put(_key(i), completion)
        assert file.get(_key(i)) == completion
    file.close()
    assert _read(tmp_path / "deep" / "file", 5) == [*kept, None]
    assert kept_in(tmp_path / "deep" / "file") == (4, 3 + 0 + 1 + 3000)


def test_a_file_cut_at_any_byte_of_its_last_record_keeps_the_others_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    two, three = len(_write(tmp_path / "two", 2)), _write(path, 3)
    for size in range(two, len(three)):
        path.write_bytes(three[:size])
        assert kept_in(path) == (2, 4)
        file = CompletionFile(path)
        assert (len(file), file.damaged, file.get(_key(2))) == (2, 0, None)
        assert path.stat().st_size == two
        file.put(_key(2), _completion(2))
        file.close()
        assert path.read_bytes() == three


@pytest.mark.parametrize("size", range(20))
def test_a_file_killed_before_its_first_line_was_whole_is_begun_again(tmp_path: Path, size: int) -> None:
    whole = _write(tmp_path / "file", 1)
    (tmp_path / "file").write_bytes(whole[:size])
    assert kept_in(tmp_path / "file") == (0, 0)
    assert _write(tmp_path / "file", 1) == whole


def test_whichever_byte_is_damaged_no_other_record_is_lost_and_no_wrong_one_is_given(tmp_path: Path) -> None:
    path = tmp_path / "file"
    one, two = len(_write(tmp_path / "a", 1)), len(_write(tmp_path / "b", 2))
    whole = _write(path, 3)
    for place in range(one, two):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        file = CompletionFile(path)
        assert [file.get(_key(number)) for number in range(3)] == [_completion(0), None, _completion(2)]
        assert file.damaged == 1
        file.put(_key(1), _completion(1))  # made again, it is found from here on
        file.close()
        assert _read(path, 3) == [_completion(number) for number in range(3)]


@pytest.mark.parametrize("length", [1, HEAD, 5000])
def test_a_hole_of_zeros_as_a_power_cut_may_leave_costs_only_what_lay_there(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    whole = bytearray(_write(path, 200))
    at = len(whole) // 2
    whole[at : at + length] = bytes(length)
    path.write_bytes(whole)
    found = _read(path, 200)
    assert all(completion in (None, _completion(number)) for number, completion in enumerate(found))
    size = len(whole) // 200
    assert sum(completion is None for completion in found) <= length // size + 2
    path.write_bytes(whole[:at] + bytes(length))  # and the same as the file's end
    assert sum(completion is not None for completion in _read(path, 200)) in (99, 100)
    assert path.stat().st_size <= at + size + 1  # a sound head whose body is gone


def test_another_kind_of_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a cache, but something of the user's")
    with pytest.raises(RunError, match="no completion cache"):
        CompletionFile(path)
    path.write_bytes(b"align completions 1\nrecords of that form")
    with pytest.raises(RunError, match="another version of align"):
        CompletionFile(path)
    assert path.read_bytes() == b"align completions 1\nrecords of that form"
    assert kept_in(path) == kept_in(tmp_path / "missing") == (0, 0)


def test_two_cannot_write_one_file(tmp_path: Path) -> None:
    first = CompletionFile(tmp_path / "cache")
    with pytest.raises(RunError, match="another process"):
        CompletionFile(tmp_path / "cache")
    first.put(_key(0), _completion(0))
    assert kept_in(tmp_path / "cache") == (1, 2), "it can be looked into all the same"
    first.close()
    CompletionFile(tmp_path / "cache").close()


def test_keys_that_share_their_first_bytes_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    keys = [b"same" + _key(number)[4:] for number in range(3)]
    file = CompletionFile(path)
    for number, key in enumerate(keys[:2]):
        file.put(key, _completion(number))
    assert [file.get(key) for key in keys] == [_completion(0), _completion(1), None]
    file.close()
    file = CompletionFile(path)
    assert [file.get(key) for key in keys] == [_completion(0), _completion(1), None]
    file.close()


def test_of_two_records_with_one_key_the_later_one_counts(tmp_path: Path) -> None:
    file = CompletionFile(tmp_path / "file")
    for number in (1, 2):
        file.put(_key(0), _completion(number))
        assert file.get(_key(0)) == _completion(number)
    file.close()
    assert _read(tmp_path / "file", 1) == [_completion(2)]


def test_eight_million_completions_would_take_less_than_200_mb_of_memory() -> None:
    """25 bytes for each; measured with 100,000, added one by one, besides the 4,096 empty lists (1 MB)."""
    random.seed(0)
    tracemalloc.start()
    index = _Index()
    empty = tracemalloc.get_traced_memory()[0]
    for offset in range(100_000):
        index.add(random.randbytes(16), offset * 500)
    used = tracemalloc.get_traced_memory()[1] - empty
    tracemalloc.stop()
    assert empty < 1_000_000 and used < 100_000 * 24


CHILD = """\
import os, signal, sys
from pathlib import Path
from align.core.engines import Completion
from align.core.engines.completion_file import CompletionFile
from tests.core.engines.test_completion_file import _key

path, first, size, half_of, bytes_of_it = Path(sys.argv[1]), *map(int, sys.argv[2:])
file = CompletionFile(path)
write = os.write

def write_half(descriptor, record):
    write(descriptor, record[:bytes_of_it])
    os.kill(os.getpid(), signal.SIGKILL)

for number in range(first, 1000):
    if number == half_of:
        os.write = write_half
    file.put(_key(number), Completion(f"{number} " + "x" * size, (number,), "stop"))
    write(1, f"{number}\\n".encode())
"""


def _child(
    path: Path, first: int, size: int, half_of: int = -1, bytes_of_it: int = 0, limit: int | None = None
) -> subprocess.Popen[str]:
    """Writes completions of `size` characters from a number on and tells each when it is kept; of one number it writes
    only some bytes and ends itself with kill -9."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    numbers = map(str, (first, size, half_of, bytes_of_it))
    command = [sys.executable, "-c", CHILD, str(path), *numbers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=limited
    )


def _check(path: Path, count: int, size: int) -> None:
    file = CompletionFile(path)
    assert len(file) == count and file.damaged == 0
    for number in range(count):
        completion = file.get(_key(number))
        assert completion is not None and completion.text == f"{number} " + "x" * size
    file.close()


@pytest.mark.parametrize("bytes_of_it", [1, 40])
def test_kill_9_in_the_middle_of_a_write_loses_only_what_was_half_written(tmp_path: Path, bytes_of_it: int) -> None:
    path = tmp_path / "file"
    finished = 0
    for half_of in (5, 6):
        process = _child(path, finished, 1000, half_of, bytes_of_it)
        told, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        finished += len(told.splitlines())
        assert finished == half_of
        whole = path.stat().st_size - bytes_of_it
        _check(path, finished, 1000)
        assert path.stat().st_size == whole


def test_kill_9_at_any_time_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    """Records of 1 MB, so that most of the time goes into writing; the last may be finished and not yet told."""
    path = tmp_path / "file"
    random.seed(1)
    finished = 0
    for _ in range(5):
        process = _child(path, finished, 1_000_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        told, _ = process.communicate()
        finished += 1 + len(told.splitlines())
        assert kept_in(path)[0] - finished in (0, 1)
        finished = kept_in(path)[0]
        _check(path, finished, 1_000_000)


def test_on_a_full_disk_what_was_kept_stays_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """The limit is put by RLIMIT_FSIZE: past 60 kB every write fails as on a full disk, the last one in its middle."""
    path = tmp_path / "file"
    process = _child(path, 0, 1000, limit=60_000)
    told, errors = process.communicate(timeout=60)
    finished = len(told.splitlines())
    assert process.returncode == 1 and "what was sampled so far is kept: make room and run again" in errors
    file = CompletionFile(path)
    assert len(file) == finished == (60_000 - 20) // (HEAD + 10 + 4 + len("10 ") + 1000)
    file.put(_key(finished), _completion(finished))
    file.close()
    assert _read(path, finished + 1)[-1] == _completion(finished)


FORKS = """\
import os, sys, time
from pathlib import Path
from align.core.engines.completion_file import CompletionFile
file = CompletionFile(Path(sys.argv[1]))
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
time.sleep(60)
"""


def test_a_forked_child_that_outlives_a_killed_run_does_not_hold_the_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path / "file")], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdin and process.stdout.readline() == "ready\n"
    with pytest.raises(RunError, match="another process"):
        CompletionFile(tmp_path / "file")
    process.kill()
    process.wait()
    CompletionFile(tmp_path / "file").close()
    process.stdin.close()
    process.stdout.close()
