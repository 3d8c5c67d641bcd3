from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from align.core import writer as module
from align.core.card import Card
from align.core.errors import DataError, RunError
from align.core.records import Kind, Row
from align.core.store import Table
from align.core.writer import DatasetWriter, replace_file, write_rows


def a_prompt(number: int, **more: Any) -> Row:
    return {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"q{number}"}], "split": "train", **more}


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "data").iterdir())


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GROUP_ROWS", 2)


def test_load_dataset_gives_back_what_was_written(tmp_path: Path):
    import datasets

    rows = [a_prompt(i, source="here", extra=i) for i in range(5)]
    assert write_rows(tmp_path / "d", rows, Kind.PROMPTS, Card(licenses={"here": "mit"})) == 5
    loaded = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"]["extra"] == [0, 1, 2, 3, 4]
    assert loaded["train"][3]["prompt"] == [{"role": "user", "content": "q3"}]


def test_columns_that_are_null_in_all_rows_keep_their_type(tmp_path: Path):
    write_rows(tmp_path / "d", [a_prompt(0)], Kind.PROMPTS)
    schema = pq.read_schema(shards(tmp_path / "d")[0])
    assert schema.field("reference").type == pa.string()
    assert schema.field("prompt").type == pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert schema.names == ["prompt_id", "prompt", "split", "source", "task", "family", "reference"]


def test_no_rows_make_a_dataset_of_no_rows_with_the_kinds_columns(tmp_path: Path):
    assert write_rows(tmp_path / "d", [], Kind.PREFERENCES) == 0
    table = Table.open(tmp_path / "d")
    assert len(table) == 0
    assert table.columns == ("prompt_id", "prompt", "split", "chosen", "rejected", "margin")
    assert list(table.rows()) == []


@pytest.mark.usefixtures("small_groups")
def test_a_type_that_widens_and_a_column_that_comes_late_are_in_every_shard(tmp_path: Path):
    rows = [
        a_prompt(0, x=1),
        a_prompt(1, x=None),
        a_prompt(2, x=1.5),
        a_prompt(3, x=2, late=["a"]),
        a_prompt(4, d={"k": 1}),
    ]
    with DatasetWriter(tmp_path / "d", Kind.PROMPTS, shard_bytes=1) as writer:
        for row in rows:
            writer.write(row)
    assert len(shards(tmp_path / "d")) == 3
    assert len({str(pq.read_schema(shard)) for shard in shards(tmp_path / "d")}) == 1
    read = list(Table.open(tmp_path / "d").rows())
    assert [row["x"] for row in read] == [1.0, None, 1.5, 2.0, None]
    assert [row["late"] for row in read] == [None, None, None, ["a"], None]
    assert read[4]["d"] == {"k": 1}


@pytest.mark.usefixtures("small_groups")
def test_a_value_of_another_type_names_row_and_column(tmp_path: Path):
    with pytest.raises(DataError, match=r"rows 2 to 3, column 'x': string was found, and the rows before held int64"):
        write_rows(tmp_path / "a", [a_prompt(i, x="many" if i > 1 else i) for i in range(4)], Kind.PROMPTS)
    with pytest.raises(DataError, match=r"row 1, column 'x': 'many' was found, int64 was expected"):
        write_rows(tmp_path / "b", [a_prompt(0, x=1), a_prompt(1, x="many")], Kind.PROMPTS)
    with pytest.raises(DataError, match=r"row 3, column 'reference': \{'answer': 4\} was found, string was expected"):
        write_rows(
            tmp_path / "c", [a_prompt(i, reference={"answer": 4} if i == 3 else None) for i in range(4)], Kind.PROMPTS
        )
    assert not (tmp_path / "b" / "README.md").exists()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "text"}, "row 1, column 'prompt': str was found, a list of messages was expected"),
        ({"prompt": [{"role": "user"}]}, "row 1, column 'prompt': {'role': 'user'} is no message"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 1, column 'prompt'"),
        ({"prompt_id": None}, "row 1: has no 'prompt_id', which prompts need"),
        ({"x": "\ud800"}, r"row 1, column 'x': '\\ud800'"),
        ({"x": 2**70}, "row 1, column 'x': 118"),
    ],
)
def test_a_row_that_cannot_be_stored_is_named(tmp_path: Path, bad: Row, says: str):
    with pytest.raises(DataError) as found:
        write_rows(tmp_path / "d", [a_prompt(0), a_prompt(1) | bad], Kind.PROMPTS)
    assert says.replace("\\\\", "\\") in str(found.value)


def test_empty_objects_and_awkward_values_can_be_stored(tmp_path: Path):
    write_rows(
        tmp_path / "d", [a_prompt(0, meta={}, flags=[True], text="a\x00b\n|€"), a_prompt(1, meta={})], Kind.PROMPTS
    )
    first = next(Table.open(tmp_path / "d").rows())
    assert (first["meta"], first["flags"], first["text"]) == (None, [True], "a\x00b\n|€")


@pytest.mark.usefixtures("small_groups")
def test_shards_roll_at_their_size_and_the_rows_stay_in_order(tmp_path: Path):
    with DatasetWriter(tmp_path / "d", Kind.PROMPTS, shard_bytes=1) as writer:
        for number in range(7):
            writer.write(a_prompt(number))
    assert [shard.name for shard in shards(tmp_path / "d")] == [f"part-{n:05d}.parquet" for n in range(4)]
    assert [row["prompt_id"] for row in Table.open(tmp_path / "d").rows()] == [f"p{n}" for n in range(7)]


@pytest.mark.usefixtures("small_groups")
def test_an_exception_leaves_no_half_written_shard_and_no_card(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "d", Kind.PROMPTS) as writer:
        for number in range(5):
            writer.write(a_prompt(number))
        raise KeyboardInterrupt
    assert shards(tmp_path / "d") == []
    assert not (tmp_path / "d" / "README.md").exists()


@pytest.mark.usefixtures("small_groups")
def test_a_second_attempt_removes_what_the_first_left(tmp_path: Path):
    with DatasetWriter(tmp_path / "d", Kind.PROMPTS, shard_bytes=1) as writer:
        for number in range(6):
            writer.write(a_prompt(number))
    (tmp_path / "d" / "data" / "part-00009.parquet.part").write_bytes(b"half")
    write_rows(tmp_path / "d", [a_prompt(9)], Kind.PROMPTS)
    assert [shard.name for shard in shards(tmp_path / "d")] == ["part-00000.parquet"]


def test_a_killed_writer_leaves_whole_shards_and_a_part(tmp_path: Path):
    code = (
        "import sys, os, signal\nfrom pathlib import Path\nfrom align.core import writer\n"
        "from align.core.records import Kind\nwriter.GROUP_ROWS = 2\n"
        "w = writer.DatasetWriter(Path(sys.argv[1]), Kind.PROMPTS, shard_bytes=3000)\n"
        "for n in range(50):\n"
        "    prompt = [{'role': 'user', 'content': os.urandom(200).hex()}]\n"
        "    w.write({'prompt_id': str(n), 'prompt': prompt, 'split': 'train'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    whole = [shard for shard in shards(tmp_path / "d") if shard.suffix == ".parquet"]
    assert whole
    assert all(pq.read_metadata(shard).num_rows > 0 for shard in whole)
    assert not (tmp_path / "d" / "README.md").exists()


def test_a_full_disk_stops_with_a_remedy_and_leaves_nothing_that_looks_done(tmp_path: Path):
    """A real limit of the system on the size of files stands for the full disk: the write fails in the same place."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = (a_prompt(n, noise=os.urandom(500).hex()) for n in range(30_000))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        with pytest.raises(RunError, match=r"no space left to write to.*free some space"):
            write_rows(tmp_path / "d", rows, Kind.PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert shards(tmp_path / "d") == []
    assert not (tmp_path / "d" / "README.md").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system_stops_with_a_remedy(tmp_path: Path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting isn't allowed here")
    try:
        rows = (a_prompt(n, noise=os.urandom(500).hex()) for n in range(12_000))
        with pytest.raises(RunError, match="no space left to write to"):
            write_rows(place / "d", rows, Kind.PROMPTS)
        assert shards(place / "d") == []
        (place / "ballast").write_bytes(b"0" * (os.statvfs(place).f_bavail * os.statvfs(place).f_bsize))
        with pytest.raises(RunError, match="no space left to write to"):
            replace_file(place / "manifest.json", "x" * 8192)
        assert not (place / "manifest.json").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written to"):
        write_rows(tmp_path / "file" / "d", [], Kind.PROMPTS)


def test_the_card_says_what_made_the_rows_from_what_how_many_and_under_which_licences(tmp_path: Path):
    card = Card(
        title="Sampled", stage="reject 1", settings={"n": 4, "path": Path("a/b")}, inputs={"prompts": "step prompts"},
        licenses={"gsm8k": "mit", "mine": "cc-by-4.0"}, summary={"yield": {"read": 4, "kept": 3}, "lost": {"same": 1}},
    )  # fmt: skip
    rows = [a_prompt(0, source="gsm8k"), a_prompt(1, source="mine|x"), a_prompt(2, source="gsm8k", split="test")]
    write_rows(tmp_path / "d", [row | {"split": row["split"]} for row in rows], Kind.PROMPTS, card)
    text = (tmp_path / "d" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == ["cc-by-4.0", "mit"]
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "3 rows, made by the stage `reject 1`" in text
    assert "- prompts: step prompts" in text
    assert "| gsm8k | 2 |" in text
    assert "## Yield\n\n| step | count |\n|---|---|\n| read | 4 |\n| kept | 3 |\n" in text
    assert "## Lost\n\n| why | count |\n|---|---|\n| same | 1 |\n" in text
    assert "| mine\\|x | 1 |" in text
    assert "| train | 2 |" in text
    assert "n: 4\npath: a/b" in text
    assert Table.open(tmp_path / "d").licenses == {"gsm8k": "mit", "mine": "cc-by-4.0"}


def test_replacing_a_file_leaves_no_part_behind(tmp_path: Path):
    replace_file(tmp_path / "x.json", "one")
    replace_file(tmp_path / "x.json", "two")
    assert (tmp_path / "x.json").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
