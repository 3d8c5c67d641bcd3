"""The Online Merging Optimizer: updates by hand, AdamW where it is switched off, checkpoints, shards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from align.core.errors import ModelError
from align.train.merging import Merging, MergingAdamW
from align.train.shards import Layout, Quantiles, Shard, largest, positions
from tests.train.ranks import in_ranks

VARIANTS = [(method, as_in) for method in ("ondare", "onties") for as_in in ("paper", "code")]


def parameter(values: list[float]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def stepped(merging: Merging, tau: list[float], gradients: list[list[float]], start: float = 0.0) -> list[float]:
    """Weights of one parameter after a step for each gradient, at learning rate 0.1."""
    weight = parameter([start] * len(tau))
    optimizer = MergingAdamW([("w", weight)], merging, lambda _: torch.tensor(tau), lr=0.1)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return weight.detach().tolist()


# --- AdamW ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "ondare", "onties"])
@pytest.mark.parametrize("every", [1, 2])
def test_switched_off_it_is_adamw_step_for_step(method: Any, every: int) -> None:
    """alpha 0, all kept; two groups of which one decays, and a parameter that has a gradient at every third step."""
    torch.manual_seed(0)
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append([torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))])
    (matrix, vector), (their_matrix, their_vector) = sides
    groups = [{"params": [("m", matrix)], "weight_decay": 0.1}, {"params": [("v", vector)], "weight_decay": 0.0}]
    ours = MergingAdamW(groups, Merging(method, alpha=0.0, keep=1.0, every=every), lr=0.01)
    theirs = torch.optim.AdamW(
        [{"params": [their_matrix], "weight_decay": 0.1}, {"params": [their_vector], "weight_decay": 0.0}], lr=0.01
    )
    for step in range(6):
        for mine, other in ((matrix, their_matrix), (vector, their_vector)):
            mine.grad = torch.randn_like(mine) if mine is matrix or step % 3 == 0 else None
            other.grad = None if mine.grad is None else mine.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(matrix, their_matrix, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(vector, their_vector, rtol=1e-6, atol=1e-7)


# --- updates by hand --------------------------------------------------------------------------------------------------


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


def test_ties_keeps_the_largest_of_the_step_and_of_tau_each_by_itself() -> None:
    """After gradients (1, 1, 1, 1) and (1, 0, 0, -1): m = 0.9 * 0.1 * 1 + 0.1 g = (0.19, 0.09, 0.09, -0.01), over
    1 - 0.9^2 = 0.19: (1, 0.4737, 0.4737, -0.0526); v over its own is g^2's mean: 1 at 0 and 3, 0.49975 at 1 and 2
    (0.999 / 1.999), its root 0.70693. Delta = -0.1 * (1, 0.67007, 0.67007, -0.0526).

    keep 0.5 of four: of the second Delta 0, 1 and 2 (the second largest and what equals it) stay, of the first all,
    which are equal. tau (3, 0.1, -0.2, 4) keeps 0 and 3. With the paper's signs and alpha 0.01:
    step 1: 0.99 * -0.1 = -0.099 each; at 0 0.03 conflicts and is smaller, at 3 0.04 too: -0.099 everywhere.
    step 2: at 0 -0.099 against 0.03: -0.099; at 1 and 2 -0.066337; at 3 the step is cut, tau's 0.04 is left.
    """
    merging = Merging("onties", alpha=0.01, keep=0.5, as_in="paper")
    found = stepped(merging, [3.0, 0.1, -0.2, 4.0], [[1.0] * 4, [1.0, 0.0, 0.0, -1.0]])
    assert found == pytest.approx([-0.198, -0.165337, -0.165337, -0.059], abs=1e-5)


@pytest.mark.parametrize("as_in", ["paper", "code"])
def test_dare_adds_the_drawn_coordinates_of_the_step_and_of_tau(as_in: Any) -> None:
    """The masks are known: places drawn for `seed/name/step N` and `seed/name/tau [N]`. Delta is -0.1 at both steps.

    alpha 0.1, p 0.5. Paper: 0.9 * -0.1 = -0.09 at a drawn place, and 0.1 * 0.8 = 0.08 at one drawn for tau, anew each
    step. Code: -0.09 / 0.5 = -0.18; tau / p = 1.6 is clamped to 1: 0.1, at the same places each step.
    """
    merging, size = Merging("ondare", 0.1, 0.5, as_in, seed=3), 1000
    found = torch.tensor(stepped(merging, [0.8] * size, [[1.0] * size] * 2))
    expected = torch.zeros(size)
    for step in (1, 2):
        tau_mask = "3/w/tau" if as_in == "code" else f"3/w/tau {step}"
        expected[positions(f"3/w/step {step}", size, 0.5, "cpu")] += -0.18 if as_in == "code" else -0.09
        expected[positions(tau_mask, size, 0.5, "cpu")] += 0.1 if as_in == "code" else 0.08
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(expected.unique()) >= 6, "each mask is seen by itself"


def test_every_k_steps_what_has_gathered_is_merged_and_decay_is_rolled_back_with_it() -> None:
    """Two AdamW steps of -0.1 on a gradient of 1 gather -0.2; OnTIES (paper) with alpha 0.5, tau -1 gives -0.6.

    With decay 1 and lr 0.1 from 1: 1 * 0.9 - 0.1 = 0.8; 0.8 * 0.9 - 0.1 = 0.62; Delta -0.38. From 1: 1 - 0.19 - 0.5.
    A third step: 0.31 * 0.9 - 0.1 = 0.179, which `finish` merges: Delta -0.131, 0.31 - 0.0655 - 0.5 = -0.2555.
    All parameters are merged, not the first alone.
    """
    merging = Merging("onties", 0.5, 1.0, "paper", every=2)
    assert stepped(merging, [-1.0], [[1.0], [1.0]]) == pytest.approx([-0.6], abs=1e-5)
    weights = [parameter([1.0]), parameter([1.0])]
    named = [("a", weights[0]), ("b", weights[1])]
    optimizer = MergingAdamW(named, merging, lambda _: torch.tensor([-1.0]), lr=0.1, weight_decay=1.0)
    seen = []
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.tensor([1.0])
        optimizer.step()
        seen.append([weight.item() for weight in weights])
    for _ in range(2):
        optimizer.finish()  # the second time nothing has gathered
    assert optimizer.merges == 2
    assert seen[0] == pytest.approx([0.8, 0.8], abs=1e-5)
    assert seen[1] == pytest.approx([0.31, 0.31], abs=1e-5)
    assert [weight.item() for weight in weights] == pytest.approx([-0.2555, -0.2555], abs=1e-5)


def test_decay_is_outside_of_what_is_merged() -> None:
    """From 1 with decay 0.5 and lr 0.1: 1 * 0.95, then OnDARE (code) with all kept: 0.5 * -0.1 + 0.5 * 0.3."""
    weight = parameter([1.0])
    optimizer = MergingAdamW(
        [("w", weight)], Merging("ondare", 0.5, 1.0), lambda _: torch.tensor([0.3]), lr=0.1, weight_decay=0.5
    )
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    assert weight.item() == pytest.approx(0.95 - 0.05 + 0.15, abs=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_at_a_learning_rate_of_0_no_weight_moves(every: int) -> None:
    """torch makes a sharded optimizer's state by such a step before it loads a checkpoint."""
    weight = parameter([0.5])
    optimizer = MergingAdamW([("w", weight)], Merging("ondare", 0.1, 1.0, every=every), lambda _: torch.ones(1), lr=0.0)
    for _ in range(2):
        weight.grad = torch.zeros(1)
        optimizer.step()
    assert weight.item() == 0.5


# --- small updates, checkpoints ---------------------------------------------------------------------------------------


def test_a_tiny_update_is_not_lost_in_bf16() -> None:
    """300 steps of 1e-4 on a weight of 1 in bf16, where each alone would vanish (the spacing below 1 is 2^-8), are
    0.03; 1 - 8 * 2^-8 = 0.96875 is nearest to 0.97."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MergingAdamW([("w", weight)], Merging(), lr=1e-4)
    for _ in range(300):
        weight.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert weight.item() == 0.96875


@pytest.mark.parametrize(("method", "as_in"), VARIANTS)
def test_what_is_too_small_for_float32_gathers(method: Any, as_in: Any) -> None:
    """alpha 1e-7 times tau 1e-3 is 1e-10; at 0.01 float32's numbers are 9.3e-10 apart. 100 steps are 1e-8."""
    found = stepped(Merging(method, 1e-7, 1.0, as_in), [1e-3] * 3, [[0.0] * 3] * 100, start=0.01)
    start = torch.tensor(0.01).item()
    assert (torch.tensor(0.01) + 1e-10).item() == start
    assert [value - start for value in found] == pytest.approx([1e-8] * 3, abs=5e-10)


@pytest.mark.parametrize(("method", "as_in"), VARIANTS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_checkpoint_in_the_middle_changes_no_bit(method: Any, as_in: Any, every: int) -> None:
    """Seven steps, of a float32 and a bf16 parameter; four, saved, loaded into new ones, and three; the same loaded
    into those that went on, which takes steps back."""
    gradients = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    tau = torch.linspace(-1, 1, 40)

    def begun(weights: list[Tensor]) -> tuple[list[Any], MergingAdamW]:
        own = [torch.nn.Parameter(weight.clone()) for weight in weights]
        named = [(f"w{number}", weight) for number, weight in enumerate(own)]
        merging = Merging(method, 1e-4, 0.2, as_in, every)
        return own, MergingAdamW(named, merging, lambda _: tau, lr=1e-3, weight_decay=0.1)

    def take(own: list[Any], optimizer: MergingAdamW, steps: Any) -> None:
        for step in steps:
            for weight in own:
                weight.grad = gradients[step].to(weight.dtype)
            optimizer.step()

    start = [torch.linspace(0, 0.1, 40), torch.linspace(0, 0.1, 40).bfloat16()]
    whole, optimizer = begun(start)
    take(whole, optimizer, range(7))
    first, optimizer = begun(start)
    take(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [weight.detach() for weight in first]], file)
    saved, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    second, again = begun(weights)
    again.load_state_dict(saved)
    take(second, again, range(4, 7))

    take(first, optimizer, range(4, 6))  # to be undone, as an episode is
    saved, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for weight, kept in zip(first, weights, strict=True):
        weight.data.copy_(kept)
    optimizer.load_state_dict(saved)
    take(first, optimizer, range(4, 7))
    for one, other, third in zip(whole, second, first, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize(("method", "as_in"), VARIANTS)
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_was_not_finite_leaves_nothing_once_it_is_taken_back(method: Any, as_in: Any, every: int) -> None:
    """Two steps, one of NaN that makes every weight NaN, the state after the two again, and the third."""
    whole, undone = parameter([0.1] * 50), parameter([0.1] * 50)
    optimizers = [
        MergingAdamW([("w", own)], Merging(method, 1e-3, 0.5, as_in, every), lambda _: torch.ones(50), lr=0.1)
        for own in (whole, undone)
    ]
    gradients = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for step, gradient in enumerate(gradients):
        for own, optimizer in zip((whole, undone), optimizers, strict=True):
            if step == 2 and own is undone:
                file = io.BytesIO()
                torch.save([optimizer.state_dict(), own.detach()], file)
                own.grad = torch.full((50,), float("nan"))
                optimizer.step()
                assert own.isnan().any()
                saved, weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
                own.data.copy_(weights)
                optimizer.load_state_dict(saved)
            own.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(whole, undone)


def test_a_weight_of_0_without_a_gradient_stays_0_beside_others_that_move() -> None:
    weight = parameter([0.0, 0.0])
    optimizer = MergingAdamW([("w", weight)], Merging("ondare", 0.0, 1.0), lr=1e-3)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - 0.0371 * step)
        weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
    assert weight[1].item() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("method", "as_in"), VARIANTS)
@pytest.mark.parametrize("every", [1, 2])
def test_on_a_gpu_a_step_is_that_of_a_cpu(method: Any, as_in: Any, every: int) -> None:
    """With all kept, since each kind of device draws masks of its own; and thinned, it runs and moves few weights."""
    found = {}
    for device in ("cpu", "cuda"):
        for keep in (1.0, 0.1):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(300, 20).to(device))
            gradients, tau = torch.randn(4, 300, 20), torch.randn(300, 20)
            start = weight.detach().clone()
            merging = Merging(method, 1e-3, keep, as_in, every)
            optimizer = MergingAdamW([("w", weight)], merging, lambda _, tau=tau: tau, lr=1e-2, eps=0.1)
            for gradient in gradients:
                weight.grad = gradient.to(device)
                optimizer.step()
            found[device, keep] = weight.detach().cpu()
            assert keep == 1 or (weight != start).float().mean() < 0.6
    torch.testing.assert_close(found["cuda", 1.0], found["cpu", 1.0], rtol=1e-5, atol=1e-6)


# --- masks, thresholds, shards ----------------------------------------------------------------------------------------


def test_positions_are_the_asked_share_the_same_for_the_same_key_and_none_twice() -> None:
    first = positions("a", 100_000, 0.01, "cpu")
    assert torch.equal(first, positions("a", 100_000, 0.01, "cpu"))
    assert not torch.equal(first, positions("b", 100_000, 0.01, "cpu"))
    assert 850 < len(first) < 1150
    assert (first.diff() > 0).all()
    assert first.min() >= 0 and first.max() < 100_000
    counts = torch.zeros(20)
    for number in range(500):
        counts[positions(str(number), 20, 0.3, "cpu")] += 1  # 150 each, give or take four times 10.2
    assert (counts - 150).abs().max() < 41


def test_the_threshold_lets_the_asked_share_through() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    layout = Layout([Shard(0, 199_000, 199_000), Shard(0, 1000, 1000)], "cpu")
    least = Quantiles(["w", "b"], layout, 0.1, 0, "cpu").of(values)
    assert (values[:199_000].abs() >= least[0]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (values[199_000:].abs() >= least[1]).sum() == 100  # a small one is looked at whole


def test_of_equal_magnitudes_as_many_stay_as_were_asked_for() -> None:
    """Of 1,000 numbers 5 are 2 and 400 are 1, as differences of bf16 weights are; a tenth is 5 of 2 and 95 of 1."""
    magnitudes = torch.zeros(1000)
    magnitudes[100:500], magnitudes[[3, 200, 400, 600, 999]] = 1.0, 2.0
    found = largest(magnitudes, 0.1, "a")
    assert len(found.unique()) == len(found) == 100
    assert sorted(magnitudes[found].tolist()) == [1.0] * 95 + [2.0] * 5
    assert torch.equal(found, largest(magnitudes, 0.1, "a"))
    assert found[5:].float().mean().item() == pytest.approx(300, abs=60)  # not the first ones: 95 of 100 to 499
    assert largest(torch.tensor([0.0, 3.0]), 0.01, "a").tolist() == [1]


def test_places_are_found_in_the_shards_that_hold_them() -> None:
    """Two parameters of 6 and 4 numbers, of which this process has 3 to 5 and 2 to 3: local places 0-2 and 3-4."""
    layout = Layout([Shard(3, 3, 6, group="g"), Shard(2, 2, 4, group="g")], "cpu")
    mine, here = layout.mine(torch.tensor([0, 3, 5, 6, 8, 9]))
    assert mine.tolist() == [0, 2, 3, 4]
    assert here.tolist() == [False, True, True, False, True, True]


def test_shards_on_two_ranks_give_the_weights_of_one(tmp_path: Path) -> None:
    """Layers whose rows two ranks can't share evenly, one of more numbers than a sample, a number that one rank lacks;
    and one layer sharded beside one that isn't.

    The ranks have the same data, so the mean of their gradients is that of one. eps is large, so that no step's
    coordinates are all equal and the threshold isn't decided by rounding.
    """
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    taus = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(5))
        for name, shape in zip(names, [(71, 70), (71,), (1, 71), (1,)], strict=True)
    }

    def trained(shard: bool, method: Any, as_in: Any, every: int, all_of_it: bool = True) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(70, 71), torch.nn.Linear(71, 1))
        data = torch.randn(8, 70)
        if shard:
            from torch.distributed.fsdp import fully_shard

            for layer in model if all_of_it else model[:1]:
                fully_shard(layer)
            if all_of_it:
                fully_shard(model)
        merging = Merging(method, 1e-2, 0.3, as_in, every)
        optimizer = MergingAdamW(model.named_parameters(), merging, lambda name: taus[name], lr=1e-2, eps=0.1)
        for _ in range(4):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        return {name: weight.detach().clone() for name, weight in whole.items()}

    cases = [(*variant, 1) for variant in VARIANTS] + [("onties", "code", 2), ("onties", "code", 1, False)]

    def on_ranks() -> list[dict[str, Tensor]]:
        torch.distributed.init_process_group("gloo")
        return [trained(True, *case) for case in cases]

    for found in in_ranks(on_ranks, tmp_path):
        for case, sharded in zip(cases, found, strict=True):
            for name, whole in trained(False, *case).items():
                torch.testing.assert_close(sharded[name], whole, rtol=1e-6, atol=1e-7, msg=f"{case}: {name}")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_tau_of_another_size_or_none_is_refused() -> None:
    with pytest.raises(ModelError, match="have 2 numbers there, the policy has 3"):
        _step_with(lambda _: torch.zeros(2))
    with pytest.raises(ModelError, match="no tau; give base and SFT"):
        _step_with(None)


def test_a_parameter_whose_numbers_lie_apart_is_refused() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6).t())
    weight.grad = torch.ones(6, 4)
    with pytest.raises(ModelError, match=r"merging: w's numbers don't lie one behind the other"):
        MergingAdamW([("w", weight)], Merging("ondare"), lambda _: torch.ones(6, 4)).step()


def _step_with(tau: Any) -> None:
    weight = parameter([0.0] * 3)
    weight.grad = torch.ones(3)
    MergingAdamW([("w", weight)], Merging("ondare"), tau).step()
