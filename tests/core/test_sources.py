from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core import writer
from align.core.errors import AlignError, DataError, RecipeError
from align.core.records import COLUMNS, Kind, Row
from align.core.source_spec import parse_sources
from align.core.sources import open_source, source_fingerprint
from align.core.store import Table
from align.core.writer import write_rows


def jsonl(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def asked(count: int, name: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}", "completion": f"a {n}"} for n in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def questions(table: Table) -> list[str]:
    return [row["prompt"][-1]["content"] for row in table.rows(["prompt"])]


@pytest.mark.parametrize("kind", [Kind.PROMPTS, Kind.DEMONSTRATIONS, Kind.COMPLETIONS])
def test_a_file_becomes_rows_with_all_columns_of_the_kind(tmp_path: Path, cache: Path, kind: Kind):
    table = open_source(str(jsonl(tmp_path / "x.jsonl", asked(3))), kind, cache)
    assert set(COLUMNS[kind]) <= set(table.columns)
    rows = list(table.rows())
    assert [row["source"] for row in rows] == ["x.jsonl"] * 3
    assert [row["source_row"] for row in rows] == [0, 1, 2]
    assert len({row["prompt_id"] for row in rows}) == 3


def test_plain_demonstrations_all_train_and_plain_prompts_are_divided(tmp_path: Path, cache: Path):
    file = str(jsonl(tmp_path / "x.jsonl", asked(1000)))
    assert {row["split"] for row in open_source(file, Kind.DEMONSTRATIONS, cache).rows()} == {"train"}
    splits = [row["split"] for row in open_source(file, Kind.PROMPTS, cache).rows()]
    assert 20 < splits.count("dev") < 80  # 50 expected, standard deviation 6.9
    assert 20 < splits.count("test") < 80


def test_a_second_call_reads_what_the_first_converted_until_the_file_changes(tmp_path: Path, cache: Path):
    file = jsonl(tmp_path / "x.jsonl", asked(3))
    first = open_source(str(file), Kind.PROMPTS, cache)
    stamp = first.files[0].stat().st_mtime_ns
    assert open_source(str(file), Kind.PROMPTS, cache).files[0].stat().st_mtime_ns == stamp
    jsonl(file, asked(4))
    again = open_source(str(file), Kind.PROMPTS, cache)
    assert len(again) == 4
    assert again.fingerprint != first.fingerprint


def test_a_folder_that_a_step_wrote_is_read_where_it_lies(tmp_path: Path, cache: Path):
    rows = [{"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], "split": "dev"}]
    write_rows(tmp_path / "step", rows, Kind.PROMPTS)
    table = open_source(tmp_path / "step", Kind.PROMPTS, cache)
    assert table.files == [tmp_path / "step" / "data" / "part-00000.parquet"]
    assert not cache.exists()


def test_a_half_written_step_is_refused(tmp_path: Path, cache: Path):
    write_rows(tmp_path / "step", [], Kind.PROMPTS)
    (tmp_path / "step" / "README.md").unlink()
    with pytest.raises(DataError, match="half-written"):
        open_source(tmp_path / "step", Kind.PROMPTS, cache)


def test_splits_of_a_folder_are_told_by_its_files_names(tmp_path: Path, cache: Path):
    jsonl(tmp_path / "d" / "train-00000-of-00002.jsonl", asked(2, "a"))
    jsonl(tmp_path / "d" / "train-00001-of-00002.jsonl", asked(2, "b"))
    jsonl(tmp_path / "d" / "validation.jsonl", asked(1, "c"))
    jsonl(tmp_path / "d" / "test.jsonl", asked(1, "d"))
    table = open_source(tmp_path / "d", Kind.DEMONSTRATIONS, cache)
    assert {row["prompt"][0]["content"][0]: row["split"] for row in table.rows()} == {
        "a": "train", "b": "train", "c": "dev", "d": "test",
    }  # fmt: skip
    only = open_source({"source": str(tmp_path / "d"), "split": "test"}, Kind.DEMONSTRATIONS, cache)
    assert [(row["prompt"][0]["content"], row["split"]) for row in only.rows()] == [("d 0", "test")]
    with pytest.raises(DataError, match="has no split 'tset'; it has test, train, validation"):
        open_source({"source": str(tmp_path / "d"), "split": "tset"}, Kind.DEMONSTRATIONS, cache)
    jsonl(tmp_path / "d" / "more.jsonl", asked(1))
    with pytest.raises(DataError, match=r"more\.jsonl, whose name tells none"):
        open_source(tmp_path / "d", Kind.DEMONSTRATIONS, cache)


def test_a_folder_of_plain_files_and_a_glob_are_read_in_the_order_of_names(tmp_path: Path, cache: Path):
    jsonl(tmp_path / "d" / "b.jsonl", asked(1, "b"))
    jsonl(tmp_path / "d" / "a.jsonl", asked(1, "a"))
    (tmp_path / "d" / "NOTES.txt").write_text("no data")
    assert questions(open_source(tmp_path / "d", Kind.PROMPTS, cache)) == ["a 0", "b 0"]
    assert questions(open_source(str(tmp_path / "d" / "[a-b].jsonl"), Kind.PROMPTS, cache)) == ["a 0", "b 0"]
    with pytest.raises(DataError, match="no file matches"):
        open_source(str(tmp_path / "d" / "z*.jsonl"), Kind.PROMPTS, cache)


def test_datasets_saved_to_disk_are_read(tmp_path: Path, cache: Path):
    import datasets

    one = datasets.Dataset.from_list(asked(3))
    one.save_to_disk(str(tmp_path / "one"))
    assert questions(open_source(tmp_path / "one", Kind.PROMPTS, cache)) == ["q 0", "q 1", "q 2"]
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(str(tmp_path / "two"))
    splits = [row["split"] for row in open_source(tmp_path / "two", Kind.DEMONSTRATIONS, cache).rows()]
    assert splits == ["train"] * 3 + ["test"]


def test_a_rows_own_split_counts_and_may_be_chosen(tmp_path: Path, cache: Path):
    rows = [row | {"split": name} for row, name in zip(asked(3), ("train", "validation", "test"), strict=True)]
    file = str(jsonl(tmp_path / "x.jsonl", rows))
    assert [row["split"] for row in open_source(file, Kind.PROMPTS, cache).rows()] == ["train", "dev", "test"]
    chosen = open_source({"source": file, "split": "validation"}, Kind.PROMPTS, cache)
    assert questions(chosen) == ["q 1"]
    with pytest.raises(DataError, match="split 'gold' was found, one of train, dev and test was expected"):
        open_source(str(jsonl(tmp_path / "y.jsonl", [rows[0] | {"split": "gold"}])), Kind.PROMPTS, cache)
    with pytest.raises(DataError, match="there is no column `split`"):
        open_source({"source": str(jsonl(tmp_path / "z.jsonl", asked(1))), "split": "test"}, Kind.PROMPTS, cache)


def test_columns_are_renamed_and_left_out(tmp_path: Path, cache: Path):
    file = str(jsonl(tmp_path / "x.jsonl", [{"frage": "q", "antwort": "a", "prompt": "not this", "noise": [1]}]))
    spec = {"source": file, "columns": {"frage": "prompt", "antwort": "completion", "noise": None}}
    (row,) = open_source(spec, Kind.DEMONSTRATIONS, cache).rows()
    assert (row["prompt"][0]["content"], row["completion"][0]["content"]) == ("q", "a")
    assert "noise" not in row
    with pytest.raises(DataError, match="`columns` names fragen; the columns are frage, antwort"):
        open_source({"source": file, "columns": {"fragen": "prompt"}}, Kind.DEMONSTRATIONS, cache)


def test_a_subset_is_random_seeded_and_of_the_exact_size(tmp_path: Path, cache: Path):
    file = str(jsonl(tmp_path / "x.jsonl", asked(200)))

    def drawn(seed: int = 0, **spec: Any) -> list[int]:
        table = open_source({"source": file, **spec}, Kind.PROMPTS, cache, seed=seed)
        return [row["source_row"] for row in table.rows()]

    tenth = drawn(fraction=0.1)
    assert len(tenth) == len(set(tenth)) == 20
    assert tenth == sorted(tenth) != list(range(20))
    assert drawn(fraction=0.1) == tenth
    assert drawn(seed=1, fraction=0.1) != tenth
    assert len(drawn(count=7)) == 7
    assert len(drawn(fraction=0.5, count=7)) == 7
    assert drawn(count=200) == list(range(200))
    with pytest.raises(DataError, match="count asks for 201 rows, 200 are there"):
        drawn(count=201)


def test_a_sources_own_seed_counts_before_the_steps(tmp_path: Path, cache: Path):
    spec = {"source": str(jsonl(tmp_path / "x.jsonl", asked(50))), "count": 5, "seed": 3}
    first, second = (questions(open_source(spec, Kind.PROMPTS, cache / str(seed), seed=seed)) for seed in (1, 2))
    assert first == second


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        # 90 and 50 rows. 1:1 gives 50 each; 3:1 gives 90 and 30; 1:3 gives floor(50/3 = 16.67) = 16 and 50.
        ((1, 1), (50, 50)),
        ((3, 1), (90, 30)),
        ((1, 3), (16, 50)),
        ((0.75, 0.25), (90, 30)),
        ((None, None), (90, 50)),
    ],
)
def test_a_mixture_is_the_largest_with_these_shares(tmp_path: Path, cache: Path, weights: Any, counts: tuple[int, int]):
    files = [jsonl(tmp_path / f"{name}.jsonl", asked(n, name)) for name, n in (("a", 90), ("b", 50))]
    spec = [
        {"source": str(file)} | ({} if weight is None else {"weight": float(weight)})
        for file, weight in zip(files, weights, strict=True)
    ]
    names = [question[0] for question in questions(open_source(spec, Kind.PROMPTS, cache))]
    assert (names.count("a"), names.count("b")) == counts
    assert names == sorted(names)


def test_count_applies_before_the_weights(tmp_path: Path, cache: Path):
    """10 of 90 and 50 rows at 1:1 make 10 and 10."""
    files = [jsonl(tmp_path / f"{name}.jsonl", asked(n, name)) for name, n in (("a", 90), ("b", 50))]
    spec = [{"source": str(files[0]), "count": 10, "weight": 1.0}, {"source": str(files[1]), "weight": 1.0}]
    names = [question[0] for question in questions(open_source(spec, Kind.PROMPTS, cache))]
    assert (names.count("a"), names.count("b")) == (10, 10)


def test_all_problems_of_a_spec_are_told_at_once():
    with pytest.raises(RecipeError) as found:
        parse_sources([{"sorce": "x"}, {"source": "y", "fraction": 2.0}, {"source": "z", "weight": 1.0}, 5])
    text = str(found.value)
    assert "source 1 of 4: sorce: unknown key; did you mean 'source'?" in text
    assert "source 2 of 4: fraction: Input should be less than or equal to 1 (2.0 was found)" in text
    assert "source 4 of 4: 5 was found, a name or a mapping was expected" in text


def test_a_mixture_where_only_some_have_a_weight_is_refused():
    with pytest.raises(RecipeError, match="give all of them one"):
        parse_sources([{"source": "x", "weight": 1.0}, "y"])
    with pytest.raises(RecipeError, match="an empty list"):
        parse_sources([])


def test_a_mistyped_path_gets_the_nearest_name(tmp_path: Path, cache: Path):
    jsonl(tmp_path / "train.jsonl", asked(1))
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*train\.jsonl\?"):
        open_source(str(tmp_path / "trian.jsonl"), Kind.PROMPTS, cache)


def test_a_name_that_is_no_file_is_asked_for_at_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: no such file or folder, and it can't be loaded as a Hub"):
        open_source("nobody/nothing", Kind.PROMPTS, cache)


def test_a_model_folder_and_a_folder_without_data_are_refused(tmp_path: Path, cache: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="is a model's folder, data was expected"):
        open_source(tmp_path / "model", Kind.PROMPTS, cache)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"a folder without data .*it holds notes\.txt"):
        open_source(tmp_path / "empty", Kind.PROMPTS, cache)


def test_a_bad_row_stops_with_its_place_or_is_left_out_and_counted_when_asked(tmp_path: Path, cache: Path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {"messages": []}]
    file = str(jsonl(tmp_path / "x.jsonl", rows))
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: messages is \[\].*leave such rows out with bad_rows: drop"):
        open_source(file, Kind.DEMONSTRATIONS, cache)
    assert not [*cache.glob("*")]
    table = open_source({"source": file, "bad_rows": "drop"}, Kind.DEMONSTRATIONS, cache)
    assert len(table) == 1
    assert "Left out: 1 rows; first: " in (table.files[0].parents[1] / "README.md").read_text()


def test_a_file_may_mix_shapes_and_types_of_unknown_columns(tmp_path: Path, cache: Path):
    rows = [
        {"instruction": "q", "output": "a", "id": 1, "meta": {"x": 1}},
        {"prompt": "q2", "completion": "a2", "id": "two", "meta": {"y": "z"}},
    ]
    read = list(open_source(str(jsonl(tmp_path / "x.jsonl", rows)), Kind.DEMONSTRATIONS, cache).rows())
    assert [row["id"] for row in read] == ["1", "two"]
    assert [json.loads(row["meta"]) for row in read] == [{"x": 1}, {"y": "z"}]


@pytest.mark.parametrize(
    ("record", "reference_from", "task", "reference"),
    [
        ({"question": "q", "answer": "so\n#### 1,234"}, "gsm8k", "math", {"answer": "1234"}),
        ({"prompt": "q", "gold": 5}, "gold", None, {"answer": "5"}),
        (
            {"prompt": "q", "test": "def check(f): ...", "entry_point": "f"},
            {"check": "test", "entry_point": "entry_point"}, None, {"check": "def check(f): ...", "entry_point": "f"},
        ),
        (
            {"prompt": "q", "instruction_id_list": ["a:b"], "kwargs": [{"n": 3, "m": None}]}, "ifeval", "constraints",
            {"constraints": [{"id": "a:b", "kwargs": {"n": 3}}]},
        ),
    ],
)  # fmt: skip
def test_references_are_made_from_the_columns_named(
    tmp_path: Path, cache: Path, record: Row, reference_from: Any, task: str | None, reference: Any
):
    file = str(jsonl(tmp_path / "x.jsonl", [record]))
    (row,) = open_source({"source": file, "reference_from": reference_from}, Kind.PROMPTS, cache).rows()
    assert (row["task"], json.loads(row["reference"])) == (task, reference)
    assert not {"gold", "test", "kwargs"} & set(row)
    with pytest.raises(DataError, match="needs nowhere; the columns are"):
        open_source({"source": file, "reference_from": "nowhere"}, Kind.PROMPTS, cache)


def test_scores_from_a_table_of_text_are_numbers(tmp_path: Path, cache: Path):
    (tmp_path / "x.csv").write_text("prompt,completion,reward,reference\nq,a,0.5,\n")
    (row,) = open_source(str(tmp_path / "x.csv"), Kind.COMPLETIONS, cache).rows()
    assert (row["reward"], row["reference"]) == (0.5, None)
    (tmp_path / "y.csv").write_text("prompt,completion,reward\nq,a,good\n")
    with pytest.raises(DataError, match=r"y\.csv, line 2: reward is 'good', a number was expected"):
        open_source(str(tmp_path / "y.csv"), Kind.COMPLETIONS, cache)


def test_rows_to_verify_come_in_order_and_none_is_refused(tmp_path: Path, cache: Path):
    rows = [
        {"id": "a", "task": "math", "prompt": "q", "completion": "5", "reference": {"answer": "5"}},
        {"id": 2, "task": 7, "prompt": None, "completion": {"x": 1}, "reference": "not json", "reward": "high"},
        {"id": None},
    ]
    read = list(open_source(str(jsonl(tmp_path / "x.jsonl", rows)), None, cache).rows())
    assert [row["id"] for row in read] == ["a", "2", None]
    assert json.loads(read[0]["reference"]) == {"answer": "5"}
    assert read[0]["completion"] == [{"role": "assistant", "content": "5"}]
    assert (read[1]["completion"], read[1]["task"], read[1]["reference"], read[1]["reward"]) == (
        None,
        "7",
        "not json",
        None,
    )
    assert len({row["prompt_id"] for row in read}) == 3


def test_licences_are_taken_from_the_spec_and_from_cards(tmp_path: Path, cache: Path):
    jsonl(tmp_path / "d" / "a.jsonl", asked(1))
    (tmp_path / "d" / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello\n")
    file = str(jsonl(tmp_path / "x.jsonl", asked(1)))
    table = open_source([str(tmp_path / "d"), {"source": file, "license": "mit"}], Kind.PROMPTS, cache)
    assert table.licenses == {"d": "apache-2.0", "x.jsonl": "mit"}


def test_the_fingerprint_of_a_setting_follows_the_content_it_names(tmp_path: Path):
    file = jsonl(tmp_path / "x.jsonl", asked(1))
    (tmp_path / "rules.txt").write_text("be kind")
    specs: list[Any] = [
        str(file),
        {"source": str(file), "count": 1},
        [str(file)],
        str(tmp_path / "rules.txt"),
        {"tiny": {"n": 1}},
        [],
    ]
    before = [source_fingerprint(spec) for spec in specs]
    assert len(set(before)) == len(before)
    assert [source_fingerprint(spec) for spec in specs] == before
    jsonl(file, asked(2))
    after = [source_fingerprint(spec) for spec in specs]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, True, True, False, False, False]


def test_the_place_of_a_file_does_not_show_in_the_rows(tmp_path: Path, cache: Path):
    one = open_source(str(jsonl(tmp_path / "a" / "x.jsonl", asked(2))), Kind.PROMPTS, cache)
    other = open_source(str(jsonl(tmp_path / "b" / "x.jsonl", asked(2))), Kind.PROMPTS, cache / "other")
    assert one.fingerprint == other.fingerprint


def test_parquet_is_converted_in_bounded_memory(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """20 MB of prompts, written in groups of 1 MB: Python's own memory peaks at the 1,000 rows of a batch, 5 MB."""
    import tracemalloc

    monkeypatch.setattr(writer, "GROUP_CHARACTERS", 1_000_000)
    text = "abcde" * 1000
    batch = pa.table({"prompt": [text + str(n) for n in range(1000)], "completion": ["a"] * 1000})
    with pq.ParquetWriter(tmp_path / "x.parquet", batch.schema) as out:
        for _ in range(4):
            out.write_table(batch)
    del batch
    tracemalloc.start()
    table = open_source(str(tmp_path / "x.parquet"), Kind.DEMONSTRATIONS, cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 4000
    assert peak < 12e6


def test_a_failed_conversion_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q"}\n{"prompt": ')
    with pytest.raises(AlignError):
        open_source(str(tmp_path / "x.jsonl"), Kind.PROMPTS, cache)
    assert [*cache.rglob("*.parquet")] == []
    assert [*cache.iterdir()] == []


def test_the_splits_of_a_hub_dataset_become_ours_or_one_must_be_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """No network in tests: what `load_dataset` would bring is made here."""
    import datasets

    def brought(*names: str) -> None:
        parts = {name: datasets.Dataset.from_list(asked(2, name)) for name in names}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(parts))

    brought("train_sft", "test_sft")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # its name alone is known here
    table = open_source("owner/name", Kind.DEMONSTRATIONS, cache)
    assert [(row["source"], row["split"]) for row in table.rows()] == [("owner/name", "train")] * 2 + [
        ("owner/name", "test")
    ] * 2
    brought("train_sft", "train_prefs")
    with pytest.raises(DataError, match="has the splits train_sft, train_prefs; choose one, as in split: train_sft"):
        open_source("owner/name", Kind.DEMONSTRATIONS, cache)
    chosen = open_source({"source": "owner/name", "split": "train_prefs"}, Kind.DEMONSTRATIONS, cache)
    assert questions(chosen) == ["train_prefs 0", "train_prefs 1"]


def test_completions_are_no_demonstrations_and_no_prompts(tmp_path: Path, cache: Path):
    """They have all the columns of both: without this, failed completions would be trained on."""
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], "split": "train", "verdict": "failed"}
    write_rows(tmp_path / "s", [row | {"completion": [{"role": "assistant", "content": "a"}]}], Kind.COMPLETIONS)
    for kind in (Kind.DEMONSTRATIONS, Kind.PROMPTS):
        with pytest.raises(DataError, match=rf"holds completions, {kind.value} were expected; .*`demonstrate`"):
            open_source(tmp_path / "s", kind, cache)
    for kinds in (Kind.COMPLETIONS, (Kind.COMPLETIONS, Kind.PROMPTS), None):
        assert len(open_source(tmp_path / "s", kinds, cache)) == 1


def test_of_several_kinds_the_one_that_a_folder_holds_is_read(tmp_path: Path, cache: Path):
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], "split": "train"}
    write_rows(tmp_path / "p", [row | {"answer": [{"role": "assistant", "content": "a"}]}], Kind.PROMPTS)
    table = open_source(tmp_path / "p", (Kind.COMPLETIONS, Kind.PROMPTS), cache)
    assert "answer" in table.columns
    assert "completion" not in table.columns


def test_completions_of_one_prompt_are_numbered(tmp_path: Path, cache: Path):
    rows = [{"prompt": q, "completion": a} for q, a in (("q", "1"), ("q", "2"), ("r", "1"), ("r", "2"), ("r", "3"))]
    table = open_source(str(jsonl(tmp_path / "x.jsonl", rows)), Kind.COMPLETIONS, cache)
    assert [row["sample_index"] for row in table.rows()] == [0, 1, 0, 1, 2]


def test_a_runs_folder_is_no_dataset(tmp_path: Path, cache: Path):
    write_rows(tmp_path / "run" / "sample", [], Kind.PROMPTS)
    (tmp_path / "run" / "sample" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"is a run's folder; name one of its steps, such as .*run/sample"):
        open_source(tmp_path / "run", Kind.PROMPTS, cache)
