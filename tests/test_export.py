"""`align export`: full weights, what lies beside them, the check after writing, and the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForSequenceClassification

from align import export
from align.core.errors import ModelError, RunError
from align.core.store import ModelRef
from reward.loading import Head, template_hash
from reward.model import Card, load_reward_model
from tests.e2e.command import align, refused
from tests.train.tiny import make_model, make_tokenizer, save_model

PAIR = ([{"role": "user", "content": "What is 3 plus 4?"}], [{"role": "assistant", "content": "7"}])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Path(save_model(tmp_path / "policy" / "model"))
    (folder / "README.md").write_text("# made by sft\n")
    (folder / "training_args.bin").write_text("of another machine")
    return folder


def test_a_policy_is_written_in_the_precision_asked_for_with_all_that_lies_beside_it(
    model: Path, tmp_path: Path
) -> None:
    told = align("export", model.parent, f"out={tmp_path / 'out'}", "dtype=bfloat16")
    assert "policy: bfloat16" in told and "loaded again it is the same" in told
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, before[name].bfloat16()), name
    assert exported.generation_config.eos_token_id == make_model().generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == make_tokenizer().chat_template
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "README.md" in names and "training_args.bin" not in names
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("head", ["scalar", "logprob"])
def test_a_reward_model_keeps_its_head_and_its_scores(head: Head, tmp_path: Path) -> None:
    config = make_model().config
    config.num_labels = 1
    judge = Qwen2ForSequenceClassification(config) if head == "scalar" else make_model()
    judge.save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    Card(head, 0.3, template=template_hash(make_tokenizer())).write(tmp_path / "judge")
    align("export", tmp_path / "judge", f"out={tmp_path / 'out'}")
    before, after = (load_reward_model(tmp_path / name).score_many([PAIR]) for name in ("judge", "out"))
    assert after == pytest.approx(before, abs=1e-6) and before != [0.0]
    assert Card.read(tmp_path / "out" / "reward_model.json") == Card.read(tmp_path / "judge" / "reward_model.json")


def test_what_is_not_what_was_written_is_noticed_and_not_put_in_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, or a library, that loses a layer's weights."""
    beside = export._copy_beside

    def and_spoil(source: Path, to: Path) -> None:
        beside(source, to)
        weights = load_file(to / "model.safetensors")
        save_file({name: torch.zeros_like(t) if "layers.1.mlp.down" in name else t for name, t in weights.items()},
                  to / "model.safetensors", {"format": "pt"})  # fmt: skip

    monkeypatch.setattr(export, "_copy_beside", and_spoil)
    with pytest.raises(ModelError, match="loaded again, the model differs by"):
        export.write(ModelRef.find(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_input_is_refused_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    assert "out is missing: the folder for the model" in refused("export", model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is there already and not empty" in refused("export", model, f"out={tmp_path / 'full'}")
    assert "push: found 'me', expected user/name" in refused("export", model, f"out={tmp_path / 'o'}", "push=me")
    assert "dtype: expected" in refused("export", model, f"out={tmp_path / 'o'}", "dtype=int8")
    assert "no such model folder" in refused("export", tmp_path / "gone", f"out={tmp_path / 'o'}")


def test_without_a_token_nothing_is_loaded_for_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = refused("export", model, f"out={tmp_path / 'out'}", "push=me/it")
    assert "no token of the Hugging Face Hub is here" in said and "HF_TOKEN" in said
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_a_repository_and_then_given_the_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is replaced here by one that takes what the real one takes; no Hub was reached."""
    import inspect

    from huggingface_hub import HfApi

    asked: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str) -> None:
            asked.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **more: Any) -> str:
            inspect.signature(HfApi.create_repo).bind(self, repo_id, **more)
            asked.append(("create_repo", {"repo_id": repo_id} | more))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **given: Any) -> None:
            inspect.signature(HfApi.upload_folder).bind(self, **given)
            asked.append(("upload_folder", given))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    told = align("export", model, f"out={tmp_path / 'out'}", "push=me/it", "private=false")
    assert "pushed to https://hub/me/it" in told
    assert asked[0] == ("token", {"token": "hf_x"})
    assert asked[1] == ("create_repo", {"repo_id": "me/it", "private": False, "exist_ok": True, "repo_type": "model"})
    assert (asked[2][1]["repo_id"], asked[2][1]["folder_path"]) == ("me/it", tmp_path / "out")


def test_a_hub_that_does_not_answer_is_told_and_the_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(RunError, match=r"push: me/it: the Hub did not take it: no route; the model is in "):
        export.upload(tmp_path, "me/it", True, "x", "hf_x")


def test_adapters_whose_config_names_no_base_are_told(model: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(model, tmp_path / "lost")
    (lost / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone", "peft_type": "LORA"}))
    assert "which isn't there" in refused("export", lost, f"out={tmp_path / 'o'}")
