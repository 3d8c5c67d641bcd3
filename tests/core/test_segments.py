"""The flat layout gives what plain rows give."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from align.core.segments import Branch, Tree, by_branch, can_be_flat, collate, model_inputs
from align.train.head import score_labelled_only

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128,
}  # fmt: skip
TREES = [
    Tree([3, 4, 5, 6, 7], [Branch([8, 9, 10]), Branch([11, 12]), Branch([8, 13, 14, 15], [8, -100, 14, 15])]),
    Tree([20], [Branch([21, 22, 23, 24, 25])]),
    Tree([30, 31], [Branch([32]), Branch([33, 34])]),
]
"""Trees of three, one and two branches; lengths differ, and one branch has a token that isn't supervised."""


def model_of(config: object, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = Auto.from_config(config).eval()
    for parameter in model.parameters():  # far enough from zero for attention to matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def scored(model: PreTrainedModel, flat: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed log-probability of each branch, (6,), and the gradient of a weighted sum of them."""
    batch = collate(TREES, flat)
    out = model(**model_inputs(batch), fused_lm_head=True)
    logps = by_branch(out.log_probs, batch["branch"], 6)
    model.zero_grad()
    (logps * torch.arange(1.0, 7.0)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL),
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL, sliding_window=3),
        Gemma3TextConfig(**SMALL, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
        Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
    ],
    ids=["qwen2", "qwen3", "llama", "mistral", "gemma3", "qwen2_moe"],
)
def test_a_flat_batch_gives_the_log_probs_and_gradients_of_padded_rows(config: object) -> None:
    model = model_of(config)
    assert score_labelled_only(model)
    expected, padded_gradients = scored(model, flat=False)
    assert can_be_flat(model)
    found, gradients = scored(model, flat=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == padded_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=1e-4, atol=2e-5)


def test_each_branch_has_the_log_probability_that_the_model_alone_gives_it() -> None:
    """Computed row by row, without padding, batch or head of ours: the sum of log-softmax at each supervised token."""
    model = model_of(Qwen2Config(**SMALL))
    expected = []
    for tree in TREES:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prompt, *branch.ids]])
            with torch.no_grad():
                logps = model(ids).logits.double().log_softmax(-1)[0]
            labels = branch.ids if branch.labels is None else branch.labels
            places = range(len(tree.prompt) - 1, ids.shape[1] - 1)
            expected.append(sum(logps[at, t].item() for at, t in zip(places, labels, strict=True) if t != -100))
    assert score_labelled_only(model)
    assert can_be_flat(model)
    assert scored(model, flat=True)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_shared_prompt_is_computed_once() -> None:
    """5 tokens of prompt, of which 4 are shared; branches of 1+3-1, 1+2-1 and 1+4-1 positions: 4 + 3 + 2 + 4 = 13.

    The padded batch has three rows of the longest, 5 + 4 - 1 = 8 positions.
    """
    assert collate(TREES[:1], flat=True)["input_ids"].shape == (1, 13)
    assert collate(TREES[:1], flat=False)["input_ids"].shape == (3, 8)


def test_positions_and_next_tokens_are_those_of_the_docstring() -> None:
    """a b c with completions d e and f, as in the module's picture."""
    batch = collate([Tree([1, 2, 3], [Branch([4, 5]), Branch([6])])], flat=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 4, 5, 6]]
    assert batch["branch"].tolist() == [[-1, -1, 0, 0, 1]]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64),
        Gemma2Config(**SMALL, attn_implementation="eager"),
    ],
    ids=["gpt2", "gemma2"],
)
def test_a_model_that_cannot_read_flat_rows_stays_as_it_was_or_reads_them_right(config: object) -> None:
    """GPT-2 may learn to; Gemma 2 caps its scores, which sdpa can't, so its attention is left alone."""
    model = model_of(config)
    assert score_labelled_only(model)
    before = model.config._attn_implementation
    expected = scored(model, flat=False)[0]
    if can_be_flat(model):
        torch.testing.assert_close(scored(model, flat=True)[0], expected, rtol=1e-5, atol=1e-5)
    else:
        assert model.config._attn_implementation == before
    torch.testing.assert_close(scored(model, flat=False)[0], expected)


def test_plain_rows_and_generation_are_unchanged_by_the_attention_of_segments() -> None:
    model = model_of(Qwen2Config(**SMALL))
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits[:, 2:]
        said = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert can_be_flat(model)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 2:], before)
        again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert again.tolist() == said.tolist()
