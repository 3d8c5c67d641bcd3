from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from align.core.errors import DataError, ModelError
from align.core.records import Kind, Row
from align.core.store import ModelRef, Table
from align.core.writer import write_rows


def a_prompt(number: int, **more: Any) -> Row:
    return {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"q{number}"}], "split": "train", **more}


def a_model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **config}))
    save_file({"w": np.zeros(4)}, folder / "model.safetensors")
    return folder


def cut(file: Path, at: int) -> None:
    file.write_bytes(file.read_bytes()[:at])


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = [a_prompt(i, tags=["a", "b"] if i else None, score=i / 2) for i in range(3)]
    write_rows(tmp_path / "d", rows, Kind.PROMPTS)
    table = Table.open(tmp_path / "d")
    assert len(table) == 3
    assert table.columns[:3] == ("prompt_id", "prompt", "split")
    read = list(table.rows())
    assert [row["prompt"] for row in read] == [row["prompt"] for row in rows]
    assert [(row["tags"], row["score"], row["reference"]) for row in read] == [
        (None, 0.0, None), (["a", "b"], 0.5, None), (["a", "b"], 1.0, None),
    ]  # fmt: skip


def test_only_the_columns_asked_for_are_read_in_the_order_asked_for(tmp_path: Path):
    write_rows(tmp_path / "d", [a_prompt(1)], Kind.PROMPTS)
    assert list(next(Table.open(tmp_path / "d").rows(["split", "prompt_id"])).items()) == [
        ("split", "train"), ("prompt_id", "p1"),
    ]  # fmt: skip


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    write_rows(tmp_path / "d", [a_prompt(1)], Kind.PROMPTS)
    with pytest.raises(DataError, match=r"no column tags; it has prompt_id, prompt, "):
        list(Table.open(tmp_path / "d").rows(["tags"]))


def test_several_folders_follow_one_another_and_a_column_of_only_one_is_null_in_the_other(tmp_path: Path):
    write_rows(tmp_path / "a", [a_prompt(1, mark="x")], Kind.PROMPTS)
    write_rows(tmp_path / "b", [a_prompt(2)], Kind.PROMPTS)
    table = Table.open(tmp_path / "a", tmp_path / "b")
    assert [(row["prompt_id"], row["mark"]) for row in table.rows()] == [("p1", "x"), ("p2", None)]
    assert len(table) == 2
    assert table.name == "a + b"


def test_tool_calls_survive_and_messages_without_them_get_none(tmp_path: Path):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    write_rows(tmp_path / "d", [a_prompt(1) | {"prompt": talk}, a_prompt(2)], Kind.PROMPTS)
    first, second = Table.open(tmp_path / "d").rows()
    assert first["prompt"] == talk
    assert second["prompt"] == [{"role": "user", "content": "q2"}]


def test_the_same_rows_come_as_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "d", [a_prompt(i) for i in range(4)], Kind.PROMPTS)
    dataset = Table.open(tmp_path / "d").hf()
    assert dataset["prompt_id"] == ["p0", "p1", "p2", "p3"]
    assert dataset[2]["prompt"] == [{"role": "user", "content": "q2"}]


def test_a_file_cut_short_is_named(tmp_path: Path):
    write_rows(tmp_path / "d", [a_prompt(i) for i in range(100)], Kind.PROMPTS)
    file = tmp_path / "d" / "data" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-00000\.parquet.*cut short"):
        list(Table.open(tmp_path / "d").rows())


def test_a_folder_without_rows_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="has no rows"):
        Table.open(tmp_path)


def test_the_fingerprint_of_a_table_is_of_its_rows_and_not_of_its_card(tmp_path: Path):
    write_rows(tmp_path / "a", [a_prompt(1)], Kind.PROMPTS)
    write_rows(tmp_path / "b", [a_prompt(1)], Kind.PROMPTS)
    write_rows(tmp_path / "c", [a_prompt(2)], Kind.PROMPTS)
    (tmp_path / "b" / "README.md").write_text("other words")
    prints = [Table.open(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_model_folder_a_steps_folder_and_an_adapter_are_models(tmp_path: Path):
    folder = a_model(tmp_path / "sft" / "model")
    assert ModelRef.open(folder, Kind.MODEL).path == str(folder)
    by_step = ModelRef.open(tmp_path / "sft", Kind.MODEL)
    assert (by_step.path, by_step.name) == (str(folder), "sft")
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"task_type": "CAUSAL_LM", "base_model_name_or_path": "{folder}"}}')
    save_file({"w": np.zeros(4)}, adapter / "adapter_model.safetensors")
    opened = ModelRef.open(adapter, Kind.MODEL)
    assert opened.kind is Kind.MODEL
    save_file({"w": np.ones(4)}, folder / "model.safetensors")
    assert ModelRef.open(adapter, Kind.MODEL).fingerprint != opened.fingerprint, "its base is another one"


@pytest.mark.parametrize("mark", ["file", "architecture"])
def test_a_reward_model_given_for_a_policy_is_refused_and_the_reverse(tmp_path: Path, mark: str):
    policy = a_model(tmp_path / "policy")
    reward = a_model(
        tmp_path / "reward", **({} if mark == "file" else {"architectures": ["XForSequenceClassification"]})
    )
    if mark == "file":
        (reward / "reward_model.json").write_text("{}")
    with pytest.raises(ModelError, match="reward: is a reward model, a policy was expected"):
        ModelRef.open(reward, Kind.MODEL)
    with pytest.raises(ModelError, match="policy: is a policy, a reward model was expected"):
        ModelRef.open(policy, Kind.REWARD_MODEL)
    assert ModelRef.open(reward, Kind.REWARD_MODEL).kind is Kind.REWARD_MODEL


def test_a_model_is_another_when_its_weights_change(tmp_path: Path):
    folder = a_model(tmp_path / "m")
    before = ModelRef.open(folder, Kind.MODEL).fingerprint
    save_file({"w": np.ones(4)}, folder / "model.safetensors")
    assert ModelRef.open(folder, Kind.MODEL).fingerprint != before


def test_a_hub_id_carries_its_revision(tmp_path: Path):
    pinned = ModelRef.open("Qwen/Qwen2.5-0.5B@abc123", Kind.MODEL)
    assert (pinned.path, pinned.revision, pinned.fingerprint) == (
        "Qwen/Qwen2.5-0.5B",
        "abc123",
        "Qwen/Qwen2.5-0.5B@abc123",
    )
    assert ModelRef.open("Qwen/Qwen2.5-0.5B", Kind.REWARD_MODEL).revision is None


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
        (lambda m: cut(m / "model.safetensors", -1), "model.safetensors: is damaged.*cut short"),
        (lambda m: cut(m / "model.safetensors", 20), "model.safetensors: is damaged"),
        (lambda m: cut(m / "model.safetensors", 0), "model.safetensors: is damaged"),
        (lambda m: (m / "model.safetensors").write_bytes(b"<html>no such page</html>"), "or no safetensors file"),
        (lambda m: (m / "config.json").write_text('{"arch'), "can't be read as JSON"),
        (lambda m: (m / "config.json").unlink(), "is no model: it has neither config.json"),
        (
            lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}'),
            "names model-2.safetensors, missing here",
        ),
    ],
)
def test_a_broken_model_folder_is_refused_with_what_is_missing(tmp_path: Path, break_it: Any, says: str):
    folder = a_model(tmp_path / "m")
    break_it(folder)
    with pytest.raises(ModelError, match=says):
        ModelRef.open(folder, Kind.MODEL)


def test_a_path_that_does_not_exist_is_no_hub_id(tmp_path: Path):
    with pytest.raises(ModelError, match="no such model folder"):
        ModelRef.open(tmp_path / "nowhere", Kind.MODEL)
    with pytest.raises(ModelError, match="no such model folder"):
        ModelRef.open("./nowhere", Kind.MODEL)


def test_the_stage_contract_and_the_store_import_none_of_the_heavy_libraries():
    code = (
        "import sys, align.core.stage, align.core.sources, align.core.writer, align.core.lineage; "
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert found.stdout.strip() == "[]"
