from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from align.train import head
from tests.train.tiny import make_model


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """Two rows of unlike length, the second padded; the supervised positions are scattered."""
    torch.manual_seed(1)
    ids = torch.randint(5, vocabulary, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :2] = -100
    labels[1, 6:] = -100
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return {"input_ids": ids, "attention_mask": mask, "shift_labels": following}


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "gemma"])
@pytest.mark.parametrize("chunk", [2**26, 1000])
def test_our_head_gives_what_trl_s_gives_and_the_same_gradient(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 logits are 3 positions at a vocabulary of about 300, so the second case computes in parts."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    outputs: list[Any] = []
    gradients: list[list[torch.Tensor]] = []
    for ours in (False, True):
        model = make_model(family)
        add_fused_lm_head(model)
        if ours:
            assert head.score_labelled_only(model)
        out = model(**batch(model.config.vocab_size), fused_lm_head=True)
        (out.log_probs * torch.arange(9)).sum().backward()
        outputs.append(out)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    trl, our = outputs
    for name in ("log_probs", "loss"):
        torch.testing.assert_close(getattr(our, name), getattr(trl, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(our.label_mask, trl.label_mask)
    for mine, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_a_batch_without_a_supervised_position_gives_zeros_and_can_be_differentiated() -> None:
    model = make_model("qwen2")
    add_fused_lm_head(model)
    head.score_labelled_only(model)
    inputs = batch(model.config.vocab_size)
    inputs["shift_labels"] = torch.full_like(inputs["shift_labels"], -100)
    out = model(**inputs, fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.log_probs.abs().sum() == 0


def test_a_call_without_the_fused_head_reaches_the_model_s_own_forward() -> None:
    model = make_model("qwen2")
    ids = batch(model.config.vocab_size)["input_ids"]
    inputs = {"input_ids": ids, "labels": ids}
    before = model(**inputs)
    add_fused_lm_head(model)
    head.score_labelled_only(model)
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
