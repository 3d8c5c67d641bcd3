"""Preference training in two processes gives what one process gives. sft and reward: in their own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from align.core.store import ModelRef, Table
from align.stages import load
from tests.train import steps
from tests.train.ranks import in_ranks
from tests.train.test_online_dpo import QUICK, prompts
from tests.train.tiny import demonstrations, preferences, save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training twice, as `one-NAME` and `two-NAME`; both ranks are forked once.

    The start is a model that answers sums in the right form and often wrongly.
    """
    folder = tmp_path_factory.mktemp("processes")
    save_model(folder / "base")
    given: dict[str, Table | ModelRef] = {
        "model": steps.policy(folder / "base"),
        "demonstrations": steps.table(folder / "d.parquet", demonstrations(24)),
    }
    strong = {"learning_rate": 1e-2, "epochs": 20.0, "global_batch_size": 8, "max_length": 128, "min_lr_ratio": 0.3}
    steps.run(load("sft"), folder / "sft", given, strong)
    policy = steps.policy(folder / "sft" / "model")
    pairs = steps.table(folder / "pairs.parquet", preferences(24))
    asked = steps.table(folder / "prompts.parquet", prompts(30))
    dpo = {"learning_rate": 1e-4, "epochs": 2.0, "global_batch_size": 8, "max_length": 128, "nll_weight": 1.0}
    trainings: dict[str, tuple[str, dict[str, Table | ModelRef], dict[str, Any]]] = {
        "full": ("dpo", {"policy": policy, "preferences": pairs}, dpo),
        "lora": ("dpo", {"policy": policy, "preferences": pairs}, dpo | {"lora_rank": 4}),
        "online": ("online-dpo", {"policy": policy, "prompts": asked}, QUICK | {"learning_rate": 1e-4}),
    }
    for name, (verb, inputs, settings) in trainings.items():
        steps.run(load(verb), folder / f"one-{name}", inputs, settings, {"micro_batch_size": 4})

    def every() -> None:
        for name, (verb, inputs, settings) in trainings.items():
            steps.run(load(verb), folder / f"two-{name}", inputs, settings, {"micro_batch_size": 2})

    in_ranks(every, folder / "ranks")
    return folder


def assert_same_weights(runs: Path, name: str, atol: float) -> None:
    start, one, two = (steps.weights(runs / run) for run in ("sft", f"one-{name}", f"two-{name}"))
    assert any(not torch.equal(start[tensor], one[tensor]) for tensor in one)
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_dpo_makes_the_weights_and_the_curves_of_one_process(runs: Path, name: str) -> None:
    assert_same_weights(runs, name, 2e-6)
    for a, b in zip(steps.curves(runs / f"one-{name}"), steps.curves(runs / f"two-{name}"), strict=True):
        for figure in ("loss", "nll", "rewards/margins", "logps/chosen"):
            assert b[figure] == pytest.approx(a[figure], abs=1e-4), figure


def test_online_dpo_samples_pairs_and_trains_as_one_process_does(runs: Path) -> None:
    for number in range(2):
        file = f"episodes/episode-{number:03d}.parquet"
        one, two = (pq.read_table(runs / f"{run}-online" / file).to_pylist() for run in ("one", "two"))
        assert any(row["outcome"] == "paired" for row in one)
        for a, b in zip(one, two, strict=True):
            for first, second in zip(a["pairs"], b["pairs"], strict=True):
                for side in ("ref_chosen_logps", "ref_rejected_logps"):
                    assert second.pop(side) == pytest.approx(first.pop(side), abs=1e-3)
            assert b.pop("sampler_logps") == pytest.approx(a.pop("sampler_logps"), abs=1e-3)
            assert b == a
    assert_same_weights(runs, "online", 1e-5)
