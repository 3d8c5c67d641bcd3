"""The Online Merging Optimizer: updates by hand, AdamW where it is switched off."""

from __future__ import annotations

import pytest
import torch

from align.train.merging import Merging, MergingAdamW
from align.train.shards import Layout, Quantiles, Shard, positions


def parameter(values: list[float]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def stepped(merging: Merging, tau: list[float], gradients: list[list[float]], lr: float = 0.1) -> list[float]:
    """Weights of one parameter, from zeros, after a step for each gradient."""
    weight = parameter([0.0] * len(tau))
    optimizer = MergingAdamW([("w", weight)], merging, lambda _: torch.tensor(tau), lr=lr)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return weight.detach().tolist()


@pytest.mark.parametrize("method", ["none", "ondare"])
def test_switched_off_it_is_adamw_step_for_step(method: str) -> None:
    torch.manual_seed(0)
    ours, theirs = parameter([0.3, -0.2, 0.1, 1.0]), parameter([0.3, -0.2, 0.1, 1.0])
    merging = Merging(method, alpha=0.0, keep=1.0)  # type: ignore[arg-type]
    mine = MergingAdamW([("w", ours)], merging, lambda _: torch.zeros(4), lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        ours.grad = torch.randn(4)
        theirs.grad = ours.grad.clone()
        mine.step()
        adamw.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_ties_as_in_the_paper_lets_a_conflicting_step_win_over_a_small_alpha() -> None:
    """The first AdamW step is -lr * sign(gradient): Delta = (-0.1, -0.1, 0.1).

    alpha = 0.1, all kept: terms 0.9 * Delta = (-0.09, -0.09, 0.09) and 0.1 * tau = (-0.1, 0.2, 0.05).
    Signs agree at 0: -0.19, and at 2: 0.14. They conflict at 1, where 0.2 is larger: 0.2.
    """
    merging = Merging("onties", alpha=0.1, keep=1.0, as_in="paper")
    found = stepped(merging, [-1.0, 2.0, 0.5], [[1.0, 1.0, -1.0]])
    assert found == pytest.approx([-0.19, 0.2, 0.14], abs=1e-5)


def test_the_variants_of_ties_differ_where_tau_is_larger_and_alpha_small() -> None:
    """Delta = -0.1, tau = 2, alpha = 0.01: weighted -0.099 against 0.02, so the paper keeps Delta: -0.099.

    The code elects by Delta against tau, -0.1 against 2: tau's 0.02 alone is left.
    """
    assert stepped(Merging("onties", 0.01, 1.0, "paper"), [2.0], [[1.0]]) == pytest.approx([-0.099], abs=1e-6)
    assert stepped(Merging("onties", 0.01, 1.0, "code"), [2.0], [[1.0]]) == pytest.approx([0.02], abs=1e-6)


def test_dare_keeps_a_share_of_the_step_and_the_code_scales_it_up() -> None:
    """With keep 0.5 about half of 10,000 coordinates move by -0.1 (paper), or by -0.1 / 0.5 = -0.2 (code)."""
    ones = [1.0] * 10_000
    for as_in, size in (("paper", -0.1), ("code", -0.2)):
        found = torch.tensor(stepped(Merging("ondare", 0.0, 0.5, as_in), [0.0] * 10_000, [ones]))  # type: ignore[arg-type]
        moved = found[found != 0]
        torch.testing.assert_close(moved, torch.full_like(moved, size), rtol=1e-4, atol=1e-6)
        assert 4700 < len(moved) < 5300


def test_dare_adds_tau_by_its_own_mask_once_or_anew() -> None:
    """The code: one mask, the values over keep and clamped to 1, so after two steps of no gradient a coordinate has
    moved by 0 or 2 * alpha * min(tau / keep, 1) = 2 * 0.1 * 1. The paper: a mask each step, so 0, 1 or 2 times 0.08."""
    none = [[0.0] * 1000] * 2
    code = torch.tensor(stepped(Merging("ondare", 0.1, 0.5, "code"), [0.8] * 1000, none))
    assert {round(v, 4) for v in code.tolist()} == {0.0, 0.2}
    paper = torch.tensor(stepped(Merging("ondare", 0.1, 0.5, "paper"), [0.8] * 1000, none))
    assert {round(v, 4) for v in paper.tolist()} == {0.0, 0.08, 0.16}


def test_every_k_steps_what_has_gathered_is_merged_and_decay_is_rolled_back_with_it() -> None:
    """Two AdamW steps of -0.1 on a gradient of 1 gather -0.2; OnTIES (paper) with alpha 0.5, tau -1 gives -0.6.

    With decay 1 and lr 0.1 from 1: 1 * 0.9 - 0.1 = 0.8; 0.8 * 0.9 - 0.1 = 0.62; Delta -0.38. From 1: 1 - 0.19 - 0.5.
    """
    merging = Merging("onties", 0.5, 1.0, "paper", every=2)
    assert stepped(merging, [-1.0], [[1.0], [1.0]]) == pytest.approx([-0.6], abs=1e-5)
    weight = parameter([1.0])
    optimizer = MergingAdamW([("w", weight)], merging, lambda _: torch.tensor([-1.0]), lr=0.1, weight_decay=1.0)
    for _ in range(2):
        weight.grad = torch.tensor([1.0])
        optimizer.step()
    assert weight.item() == pytest.approx(0.31, abs=1e-5)


def test_a_tiny_update_is_not_lost_in_bf16() -> None:
    """1,000 steps of 1e-5 on a weight of 1 in bf16, where each alone would vanish, are
    0.01; 0.99 is nearest to 1 - 3 * 2^-8 = 0.98828, the spacing below 1 being 2^-8."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MergingAdamW([("w", weight)], Merging(), lambda _: torch.zeros(1), lr=1e-5)
    for _ in range(1000):
        weight.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert weight.item() == pytest.approx(0.98828125)


def test_positions_are_the_asked_share_the_same_for_the_same_key_and_none_twice() -> None:
    first = positions("a", 100_000, 0.01, "cpu")
    assert torch.equal(first, positions("a", 100_000, 0.01, "cpu"))
    assert not torch.equal(first, positions("b", 100_000, 0.01, "cpu"))
    assert 850 < len(first) < 1150
    assert (first.diff() > 0).all()
    assert first.min() >= 0 and first.max() < 100_000


def test_the_threshold_lets_the_asked_share_through() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    layout = Layout([Shard(0, 200_000, 200_000)], "cpu")
    least = Quantiles(["w"], layout, 0.1, 0, "cpu").of(values)
    assert (values.abs() >= least).float().mean().item() == pytest.approx(0.1, abs=0.015)
