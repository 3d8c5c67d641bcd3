"""What a user gets wrong, at the command line: each is refused in plain words, with what was found and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reward.model import load_reward_model
from tests.e2e.command import align, jsonl, manifest, refused
from tests.train.tiny import save_model

QUESTIONS = [f"What is {a} plus {7 - a}?" for a in range(4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its LoRA adapters, demonstrations and pairs; the model's path in the adapters is relative to nothing."""
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "base", "llama")
    jsonl(folder / "d.jsonl", [{"instruction": q, "output": "7"} for q in QUESTIONS])
    jsonl(folder / "p.jsonl", [{"prompt": q, "chosen": "7", "rejected": "8"} for q in QUESTIONS])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        align("sft", "model=base", "demonstrations=d.jsonl", "lora_rank=2", "save_merged=false", "out=lora")
        align("reward", "model=base", "completions=p.jsonl", "lora_rank=2", "save_merged=false", "held_out_share=0.5",
              "out=judge")  # fmt: skip
    return folder


def sft(files: Path, out: Path, *arguments: str, model: object = None, data: object = None) -> tuple[str, ...]:
    given = (f"model={model or files / 'base'}", f"demonstrations={data or files / 'd.jsonl'}", f"out={out / 'out'}")
    return ("sft", *given, *arguments)


def changed(files: Path, to: Path, name: str, **entries: Any) -> Path:
    """A copy of the model or of the adapters with other entries in its configuration."""
    shutil.copytree(files / ("lora/model" if name == "adapter_config.json" else "base"), to)
    (to / name).write_text(json.dumps(json.loads((to / name).read_text()) | entries))
    return to


def test_weights_that_do_not_fit_their_config_are_refused_in_training_and_in_sampling(
    files: Path, tmp_path: Path
) -> None:
    wide = changed(files, tmp_path / "wide", "config.json", hidden_size=64)
    assert "its weights have other shapes than its config.json says" in refused(*sft(files, tmp_path, model=wide))
    asked = jsonl(tmp_path / "q.jsonl", [{"question": q, "answer": "#### 7"} for q in QUESTIONS])
    said = refused("evaluate", f"policy={wide}", f"prompts={asked}", "split=all", f"out={tmp_path / 'eval'}")
    assert "its weights have other shapes than its config.json says" in said


def test_an_unknown_architecture_is_refused_in_one_line(files: Path, tmp_path: Path) -> None:
    said = refused(*sft(files, tmp_path, model=changed(files, tmp_path / "new", "config.json", model_type="foo3")))
    assert "`foo3`" in said and len(said.strip().splitlines()) == 1


def test_a_model_without_tokenizer_is_refused_with_what_to_do(files: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(files / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    assert "save the tokenizer into the model's folder" in refused(*sft(files, tmp_path, model=bare))


@pytest.mark.parametrize("base", ["/nowhere/base", None])
def test_adapters_whose_base_is_gone_are_refused_before_anything_runs(
    files: Path, tmp_path: Path, base: str | None
) -> None:
    lost = changed(files, tmp_path / "lost", "adapter_config.json", base_model_name_or_path=base)
    said = refused(*sft(files, tmp_path, model=lost))
    assert said.startswith("align sft: model: ") and "base_model_name_or_path" in said
    assert not (tmp_path / "out").exists()


def test_adapters_find_their_base_from_any_folder_are_laid_upon_others_and_are_exported_whole(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    align(*sft(files, tmp_path, "lora_rank=2", "save_merged=false", model=files / "lora"))
    assert manifest(tmp_path / "out").summary["saved"].startswith("adapters of base (those of lora and the new ones")
    assert "merged with its base" in align("export", tmp_path / "out", "out=whole")
    assert (tmp_path / "whole" / "README.md").exists() and (tmp_path / "whole" / "model.safetensors").exists()
    align("export", files / "judge", "out=judge")
    pairs = [([{"role": "user", "content": q}], [{"role": "assistant", "content": "7"}]) for q in QUESTIONS]
    before, after = (load_reward_model(each).score_many(pairs) for each in (files / "judge" / "model", "judge"))
    assert after == pytest.approx(before, abs=1e-5)


def test_lora_targets_that_the_model_has_not_are_refused_and_one_name_will_do(files: Path, tmp_path: Path) -> None:
    said = refused(*sft(files, tmp_path, "lora_rank=2", "lora_targets=query"))
    assert "lora_targets: the model has no module query" in said
    align(*sft(files, tmp_path / "b", "lora_rank=2", "lora_targets=q_proj"))


def test_a_max_length_below_every_row_is_refused_with_the_counts(files: Path, tmp_path: Path) -> None:
    assert "no demonstration to train on: 4 too_long; raise max_length" in refused(
        *sft(files, tmp_path, "max_length=8")
    )


def test_empty_completions_are_left_out_and_counted_and_refused_where_there_is_nothing_else(
    files: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": q, "output": " "} for q in QUESTIONS]
    said = refused(*sft(files, tmp_path, data=jsonl(tmp_path / "e.jsonl", rows)))
    assert "no demonstration to train on: 4 empty" in said
    rows[0]["output"] = "7"
    align(*sft(files, tmp_path / "b", data=jsonl(tmp_path / "f.jsonl", rows)))
    assert manifest(tmp_path / "b" / "out").summary["empty"] == 3

    pairs = jsonl(tmp_path / "p.jsonl", [{"prompt": q, "chosen": "", "rejected": "8"} for q in QUESTIONS])
    said = refused("dpo", f"policy={files / 'base'}", f"preferences={pairs}", f"out={tmp_path / 'dpo'}")
    assert "no pair to train on: 4 empty_chosen" in said


def test_preferences_given_as_demonstrations_are_refused_with_the_way_to_take_the_chosen(
    files: Path, tmp_path: Path
) -> None:
    said = refused(*sft(files, tmp_path, data=files / "p.jsonl"))
    assert "columns: {chosen: completion, rejected: null}" in said
    align("sft", f"model={files / 'base'}", f"demonstrations.path={files / 'p.jsonl'}",
          "demonstrations.columns={chosen: completion, rejected: null}", f"out={tmp_path / 'b'}")  # fmt: skip


def test_too_few_pairs_to_hold_some_out_are_refused_with_the_setting(files: Path, tmp_path: Path) -> None:
    said = refused("reward", f"model={files / 'base'}", f"completions={files / 'p.jsonl'}", "held_out_share=0.001",
                   f"out={tmp_path / 'out'}")  # fmt: skip
    assert "none of the 4 prompts is held out" in said and "raise held_out_share" in said


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("learning_rat=1", "learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("lora_rank=2.5", "lora_rank: expected a whole number, found 2.5"),
        ("device=cuda:99", "device"),
    ],
)
def test_settings_that_cannot_be_are_refused(files: Path, tmp_path: Path, setting: str, told: str) -> None:
    assert told in refused(*sft(files, tmp_path, setting))
