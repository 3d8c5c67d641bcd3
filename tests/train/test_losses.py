from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from align.train.losses import LOSSES, SORTING, Pairs, terms
from align.train.settings import DPOSettings, Loss

TOKENS = ((3, 1), (2, 4), (5, 2), (1, 1))  # of the chosen and the rejected


def settings(**more: Any) -> DPOSettings:
    return DPOSettings(learning_rate=1.0, epochs=1.0, max_length=8, **more)


def log_probs() -> torch.Tensor:
    """Of each token, (8, 6), chosen rows first, a prompt of one token: zeros where there is no token."""
    torch.manual_seed(0)
    found = -2 * torch.rand(8, 6)
    for row, tokens in enumerate([c for c, _ in TOKENS] + [r for _, r in TOKENS]):
        found[row, tokens:] = 0
    return found


REFERENCE = torch.tensor([[-2.0, -3.5, -4.0, -1.5], [-1.0, -3.0, -2.5, -0.25]])  # chosen, rejected


def pairs() -> Pairs:
    chosen, rejected = log_probs().sum(1).chunk(2)
    tokens = torch.tensor(TOKENS, dtype=torch.float32)
    return Pairs(chosen, rejected, *REFERENCE, tokens[:, 0], tokens[:, 1], mean_tokens=11 / 4)


def trl_loss(names: list[str], weights: list[float], smoothing: float) -> float:
    """TRL's own code on these numbers: its trainer and its model are stand-ins, its loss is not."""
    mask = (log_probs() != 0).long()
    whole = torch.cat([torch.zeros(8, 1, dtype=torch.long), mask], dim=1)  # the prompt's token
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=alone, aux_loss_enabled=False, ld_alpha=None, beta=0.3,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=names, loss_weights=weights,
        label_smoothing=smoothing, args=SimpleNamespace(discopop_tau=0.05), use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    nothing = torch.zeros(8, 6)
    out = FusedCausalLMOutput(log_probs=log_probs(), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    inputs = {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}
    inputs |= {"ref_chosen_logps": REFERENCE[0], "ref_rejected_logps": REFERENCE[1]}
    return float(DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False))


def ours(names: list[str], weights: list[float] | None = None, smoothing: float = 0.0, **more: Any) -> float:
    chosen = settings(beta=0.3, losses=names, loss_weights=weights, label_smoothing=smoothing, **more)
    return float(sum(weight * value for weight, value in terms(pairs(), chosen).values()))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_is_trl_s_on_the_same_numbers(name: str) -> None:
    smoothing = 0.1 if name in ("exo_pair", "robust", *SORTING) else 0.0
    assert ours([name], smoothing=smoothing) == pytest.approx(trl_loss([name], [1.0], smoothing), abs=1e-6)


def test_a_mixture_is_trl_s_weighted_sum() -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    assert ours(names, weights) == pytest.approx(trl_loss(names, weights, 0.0), abs=1e-6)


def test_every_name_of_trl_s_has_its_function() -> None:
    assert set(get_args(Loss)) == set(LOSSES)
    text = DPOTrainer._compute_loss.__code__.co_consts
    known = {const for const in text if isinstance(const, str)} | {c for t in text if isinstance(t, tuple) for c in t}
    assert set(LOSSES) <= known


def by_hand(kind: str, beta: float, e: float) -> float:
    """The mean over the four pairs in float64 of Python's, one pair after the other."""
    found = 0.0
    rows = log_probs().double().tolist()
    for i, (chosen_tokens, rejected_tokens) in enumerate(TOKENS):
        c = math.fsum(rows[i]) - REFERENCE[0, i].item()
        r = math.fsum(rows[4 + i]) - REFERENCE[1, i].item()
        if kind == "ipo":
            found += (c / chosen_tokens - r / rejected_tokens - 1 / (2 * beta)) ** 2
        else:
            h = beta * (c - r)
            found += (1 - e) * math.log1p(math.exp(-h)) + e * math.log1p(math.exp(h))
    return found / 4


@pytest.mark.parametrize(("name", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.25), ("ipo", 0.0)])
def test_the_loss_is_that_of_a_float64_computation(name: str, smoothing: float) -> None:
    assert ours([name], smoothing=smoothing) == pytest.approx(by_hand(name, 0.3, smoothing), abs=1e-6)


def one(c: float, r: float) -> Pairs:
    """One pair with these log-ratios; 2 and 4 tokens; the reference's sums are -4 and -8."""
    ratios = [torch.tensor([x]) for x in (c - 4, r - 8, -4.0, -8.0, 2.0, 4.0)]
    return Pairs(*ratios, mean_tokens=2.0)


LOG3 = math.log(3)  # s(log 3) = 3/4, s(-log 3) = 1/4


@pytest.mark.parametrize(
    ("name", "c", "r", "more", "expected"),
    [
        ("sigmoid", LOG3, 0.0, {}, math.log(4 / 3)),
        # 3/4 log(4/3) + 1/4 log 4: a quarter of the pairs believed wrong, and the model as sure as that
        ("sigmoid", LOG3, 0.0, {"label_smoothing": 0.25}, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("hinge", 0.75, 0.5, {}, 0.75),
        ("hinge", 2.0, 0.5, {}, 0.0),
        ("ipo", 2.0, 2.0, {}, (2 / 2 - 2 / 4 - 0.5) ** 2),  # 0: the margin of the means is just 1 / 2 beta
        ("ipo", 4.0, 2.0, {}, 1.0),
        ("exo_pair", LOG3, 0.0, {"label_smoothing": 0.25}, 0.0),  # the policy's preference is the labels'
        ("nca_pair", LOG3, LOG3, {}, math.log(4 / 3) + math.log(4)),
        # (3/4 log(4/3) - 1/4 log 4) / (1/2)
        ("robust", LOG3, 0.0, {"label_smoothing": 0.25}, 1.5 * math.log(4 / 3) - 0.5 * math.log(4)),
        ("bco_pair", LOG3, -LOG3, {}, 2 * math.log(4 / 3)),
        ("sppo_hard", 0.5, -0.5, {}, 0.0),
        ("sppo_hard", 1.5, 0.5, {}, 2.0),
        ("aot", LOG3, 0.0, {}, math.log(4 / 3)),
        ("aot_unpaired", LOG3, 0.0, {}, math.log(4 / 3)),
        ("apo_zero", LOG3, -LOG3, {}, 0.5),
        ("apo_down", LOG3, 0.0, {}, 1.0),  # 3/4 + 1 - 3/4
        ("apo_down", -LOG3, -2 * LOG3, {}, 0.5),  # lower, and less lower than the rejected: 1/4 + 1 - 3/4
        # h = tau log 3, so m = 3/4
        ("discopop", LOG3, 0.0, {"discopop_tau": 1.0}, 0.25 * math.log(4 / 3) + 0.75 / 3),
        ("sigmoid_norm", 2 * LOG3, 0.0, {}, math.log(4 / 3)),  # two tokens
        ("sft", 1.0, 0.0, {}, 1.5),  # -(1 - 4) / 2
    ],
)  # fmt: skip
def test_each_loss_has_the_value_of_its_equation(
    name: str, c: float, r: float, more: dict[str, Any], expected: float
) -> None:
    """beta is 1 all over."""
    value = LOSSES[name](one(c, r), settings(beta=1.0, losses=[name], **more))
    assert value.tolist() == pytest.approx([expected], abs=1e-6)


def test_aot_compares_quantiles_and_so_does_not_see_which_margin_is_whose() -> None:
    """Policy margins (0, 2), reference margins (2, 0): sorted they are equal, so log 2 each; DPO sees -2 and 2."""
    zero, tokens = torch.zeros(2), torch.ones(2)
    crossed = Pairs(torch.tensor([0.0, 2.0]), zero, torch.tensor([2.0, 0.0]), zero, tokens, tokens)
    found = LOSSES["aot"](crossed, settings(losses=["aot"]))
    torch.testing.assert_close(found, torch.full((2,), math.log(2)))
    assert LOSSES["sigmoid"](crossed, settings(beta=1.0)).tolist() == pytest.approx([2.126928, 0.126928], abs=1e-5)


def test_only_the_sorting_losses_see_more_than_one_pair() -> None:
    """Four pairs at once give what they give one by one, save where they are sorted."""
    for name, loss in LOSSES.items():
        chosen = settings(beta=0.3, losses=[name], label_smoothing=0.1 if name == "exo_pair" else 0.0)
        sides = [getattr(pairs(), field).chunk(4) for field in Pairs.__slots__[:6]]
        each = [loss(Pairs(*one_pair, mean_tokens=11 / 4), chosen) for one_pair in zip(*sides, strict=True)]
        assert torch.allclose(torch.cat(each), loss(pairs(), chosen)) == (name not in SORTING), name


def test_length_normalised_makes_every_sum_a_mean_once() -> None:
    assert ours(["sigmoid"], length_normalised=True) == pytest.approx(ours(["sigmoid_norm"]), abs=1e-7)
    assert ours(["sigmoid"], length_normalised=True) != pytest.approx(ours(["sigmoid"]), abs=1e-3)
    for name in ("ipo", "sigmoid_norm", "sft"):  # of means already, or by the global batch's tokens
        assert ours([name], length_normalised=True) == pytest.approx(ours([name]), abs=1e-7)


def test_the_nll_term_counts_pairs_alike_and_sft_counts_tokens_alike() -> None:
    """Chosen of 3, 2, 5 and 1 tokens: the mean of four means, against the sum of all by 11."""
    chosen = log_probs()[:4].sum(1).double()
    tokens = torch.tensor([3, 2, 5, 1]).double()
    found = terms(pairs(), settings(losses=["sft"], nll_weight=0.5))
    assert found["nll"][0] == 0.5
    assert found["nll"][1].item() == pytest.approx(-(chosen / tokens).mean().item(), abs=1e-6)
    assert found["sft"][1].item() == pytest.approx(-chosen.sum().item() / 11, abs=1e-6)
