"""Public preference data through `align reward-bench`, as a person would give it on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.manifest import Manifest
from align.core.store import Table
from align.pipeline import run
from align.recipe import load_stage
from reward.loading import distinct_pad_id, template_hash
from reward.model import Card
from tests.train.tiny import make_tokenizer

pytestmark = pytest.mark.real_data
DATA = Path(os.environ.get("ALIGN_TEST_DATA", ""))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model of one layer that reads 4,096 tokens."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, num_labels=1, pad_token_id=distinct_pad_id(tokenizer),
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Card(template=template_hash(tokenizer)).write(folder)
    return folder


def measured(judge: Path, out: Path, preferences: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the rows of `align reward-bench reward_model=… preferences=… out=…`."""
    arguments = [f"reward_model={judge}", f"preferences={preferences}", f"out={out}", "device=cpu", *more]
    run(load_stage("reward-bench", arguments))
    manifest = Manifest.read(out)
    assert manifest is not None
    return manifest.summary, list(Table.open(out).rows())


def test_llmbar_reads_as_it_is(judge: Path, tmp_path: Path) -> None:
    file = DATA / "llmbar_natural" / "dataset.json"
    summary, rows = measured(judge, tmp_path / "out", f"{{path: {file}, count: 40}}")
    assert summary["scores"]["pairs"]["overall"]["n"] == len(rows) == 40
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert set(summary["overall"]["length"]) == {"correlation", "matched", "shorter_right", "longer_right"}


def test_hh_reads_without_the_dialogues_that_part_early(judge: Path, tmp_path: Path) -> None:
    folder = DATA / "hh_harmless_test_even"
    summary, rows = measured(judge, tmp_path / "out", f"{{path: {folder}, count: 40, bad_rows: drop}}", "by=source")
    assert summary["scores"]["pairs"]["overall"]["n"] == 40
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)


def test_samples_with_verdicts_give_a_best_of_n_curve(judge: Path, tmp_path: Path) -> None:
    """8 samples of each problem, right or wrong. Of 50 problems 7 have both kinds; the first has none wrong."""
    records = (DATA / "math_cot_rm8_even" / "math_cot_50.jsonl").read_text().splitlines()
    mixed = [line for line in records if 0 < sum(json.loads(line)["score"]) < 8]
    (tmp_path / "samples.jsonl").write_text("\n".join([records[0], *mixed]))
    spec = f"{{path: {tmp_path / 'samples.jsonl'}, columns: {{score: verdict}}, family: math}}"
    summary, rows = measured(judge, tmp_path / "out", spec)
    assert len(rows) == 64
    assert sum(row["verdict"] == "passed" for row in rows) == 8 + 3 + 2 + 1 + 4 + 3 + 6 + 4
    assert summary["scores"]["best-of-n"]["overall"]["n"] == 7
    assert summary["left_out"] == {"one_sided": 1}
    assert [point["n"] for point in summary["by_family"]["math"]["best_of_n_curve"]] == [1, 2, 4, 8]
