"""`align make-tiny`, and the checkpoint that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import align.tiny
from align.core.errors import DataError
from align.tiny.make import TURN_END, make, make_tokenizer

SHIPPED = Path(align.tiny.__file__).parent / "base"


def test_the_shipped_model_is_small_and_says_how_it_was_made() -> None:
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 5_000_000
    made = json.loads((SHIPPED / "made.json").read_text())
    assert made["parameters"] < 1_000_000
    assert made["made_by"] == "align make-tiny"


def test_the_shipped_tokenizer_is_the_one_that_the_command_makes() -> None:
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert made["model"]["merges"] == shipped["model"]["merges"]


def test_chat_costs_few_tokens_and_every_text_comes_back() -> None:
    tokenizer = make_tokenizer(sample=2000)
    text = "Grüße, 世界!\n\tx = 10"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False
    )
    assert len(empty) <= 9
    assert tokenizer.eos_token == TURN_END != tokenizer.pad_token


@pytest.mark.slow
def test_a_smaller_base_is_made_the_same_way_and_learns(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.tiny.make import make_model, train

    folder = make(tmp_path / "base", steps=60, hidden=32, layers=2, rows=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert tokenizer.chat_template
    assert json.loads((folder / "made.json").read_text())["final_loss"] < 6.3  # ln 768 = 6.64 knows nothing
    with pytest.raises(DataError, match="holds a model already"):
        make(folder)

    import torch

    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(train(make_model(tokenizer, 32, 1), tokenizer, steps=3, rows=4))
    assert losses[0] == losses[1], "the same seed trains the same model"
