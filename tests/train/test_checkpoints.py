"""What a killed training finds: at every moment a whole checkpoint, and the split that it had."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.train import callbacks
from align.train.callbacks import DONE, Marks, whole_checkpoint
from tests.train import steps
from tests.train.test_sft import QUICK, STAGE, inputs


def saved(folder: Path, step: int) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "optimizer.pt").touch()


def test_while_a_checkpoint_replaces_another_one_of_them_is_whole_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at whenever a folder is removed, where a kill would leave it: what would be resumed has its optimizer."""
    resumed: list[str] = []

    def removed(folder: Path, ignore_errors: bool = False) -> None:
        marked = [path for path in sorted(tmp_path.glob("checkpoint-*")) if (path / DONE).exists()]
        assert all((path / "optimizer.pt").exists() for path in marked)
        resumed.append(marked[-1].name)
        (folder / "optimizer.pt").unlink()
        folder.rmdir()

    monkeypatch.setattr(callbacks.shutil, "rmtree", removed)
    marks = Marks(SimpleNamespace(accelerator=SimpleNamespace(wait_for_everyone=lambda: None)))  # type: ignore[arg-type]
    for step in (5, 10, 15):
        saved(tmp_path, step)
        state: Any = SimpleNamespace(is_world_process_zero=True, global_step=step)
        marks.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert resumed == ["checkpoint-10", "checkpoint-15"]
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-15"]
    saved(tmp_path, 20)  # killed before it was marked
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-15")
    assert not (tmp_path / "checkpoint-20").exists()


def test_micro_batches_are_cut_as_before_a_kill_whatever_memory_is_free_now(tmp_path: Path) -> None:
    """Another split rounds otherwise, and the weights would no longer be those of an unbroken run, bit by bit."""
    given = inputs(tmp_path)
    steps.run(STAGE, tmp_path, given, QUICK | {"epochs": 1.0})
    kept = tmp_path / "work" / "tokens_at_once.json"
    assert kept.read_text() == "4096"
    kept.write_text("77")
    shutil.rmtree(tmp_path / "work" / "checkpoints")
    summary, _ = steps.run(STAGE, tmp_path, given, QUICK | {"epochs": 1.0})
    assert summary["start"]["batch"]["tokens_at_once"] == 77
