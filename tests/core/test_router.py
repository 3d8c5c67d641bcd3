from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align.core.errors import ModelError
from align.core.router import RouterLoss, balance_loss
from tests.train.tiny import make_model


def test_the_loss_is_that_of_a_computation_by_hand() -> None:
    """Two tokens, two experts, one each. Probabilities (3/4, 1/4) and (2/3, 1/3): both go to the first expert.

    f = (1, 0), P = (17/24, 7/24), E Σ f P = 2 · 17/24 = 17/12. With the second token masked: 2 · 3/4 = 3/2.
    """
    logits = [torch.tensor([[0.75, 0.25], [2 / 3, 1 / 3]]).log()]
    assert balance_loss(logits, 1).item() == pytest.approx(17 / 12)
    assert balance_loss(logits, 1, torch.tensor([[True, False]])).item() == pytest.approx(1.5)


def test_it_is_the_one_that_the_library_computes() -> None:
    torch.manual_seed(0)
    logits = tuple(torch.randn(12, 6) for _ in range(3))
    mask = torch.rand(3, 4) > 0.3
    for ours, theirs in ((None, None), (mask, mask.long())):
        expected = load_balancing_loss_func(logits, 6, 2, theirs)
        torch.testing.assert_close(balance_loss(list(logits), 2, ours), expected)


def test_routers_are_read_only_while_they_are_watched_and_a_repeated_pass_is_not() -> None:
    model, ids = make_model("qwen2_moe"), torch.arange(10).reshape(2, 5)
    router = RouterLoss(model, 0.5)
    model(ids)
    assert router.term() == 0.0
    with router.watching():
        logits = model(ids, output_router_logits=True).router_logits
    model(ids)  # what checkpointing does in the backward pass
    expected = load_balancing_loss_func(logits, 4, 2)
    assert torch.as_tensor(router.term(share=0.25)).item() == pytest.approx(0.5 * 0.25 * expected.item())
    assert router.last == pytest.approx(expected.item())
    assert router.term() == 0.0, "a pass counts once"


def test_with_the_experts_of_the_whole_global_batch_its_gradient_does_not_depend_on_the_split() -> None:
    """f has no gradient, so with it given the loss is a mean over tokens; without it, it is not."""
    model, ids = make_model("qwen2_moe"), torch.arange(28).reshape(4, 7)
    router, weight = RouterLoss(model, 1.0), model.model.layers[0].mlp.gate.weight

    def gradient(parts: int, sent: torch.Tensor | None) -> torch.Tensor:
        model.zero_grad()
        for part in ids.chunk(parts):
            with router.watching():
                model(part)
            torch.as_tensor(router.term(1 / parts, sent=sent)).backward()
        assert weight.grad is not None
        return weight.grad.clone()

    counts = torch.zeros(5)
    for part in ids.chunk(4):
        with torch.no_grad(), router.watching():
            model(part)
        counts += router.counts()
    assert counts[4] == 28 * 2 and counts[:4].sum() == 2 * 28 * 2  # 28 tokens, 2 layers, 2 experts each
    whole = gradient(1, None)
    torch.testing.assert_close(gradient(4, counts[:4] / counts[4]), whole, atol=1e-7, rtol=1e-5)
    assert not torch.allclose(gradient(4, None), whole, rtol=1e-2)


def test_none_is_the_models_own_coefficient_and_a_dense_model_has_no_such_loss() -> None:
    assert RouterLoss(make_model("qwen2_moe"), None).weight == 0.001
    assert RouterLoss(make_model("qwen2_moe"), 0.0).weight == 0.0
    assert RouterLoss(make_model(), None).weight == 0.0
    with pytest.raises(ModelError, match="Qwen2ForCausalLM has no experts"):
        RouterLoss(make_model(), 0.01)
