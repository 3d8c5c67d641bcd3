"""The Online Merging Optimizer (arXiv:2405.17931): each step of AdamW is merged with the way from base to SFT.

With tau = theta_SFT - theta_base, fixed, and Delta the step that AdamW would take,

    OnDARE:  theta += (1 - alpha) F(Delta) + alpha F(tau)            F keeps each coordinate with probability p
    OnTIES:  theta += (1 - alpha) F(Delta) (+) alpha F(tau)          F keeps the share p of largest magnitude
             a (+) b = a + b where their signs agree, else the one of larger magnitude

The step is blended with what SFT has taught, so that preferences are learned where they cost it least. The paper's
equations and its authors' code differ; both are here, by name (`Merging.as_in`):

    =====================  ==================================  ===================================================
    what                   paper                               code
    =====================  ==================================  ===================================================
    DARE's kept Delta      as it is (eq. 4)                    divided by p, so that its mean is Delta's
    DARE's mask of tau     drawn anew at each step (alg. 1)    drawn once; divided by p, clamped to [-1, 1]
    TIES's signs           of the weighted terms (eq. 7)       of the unweighted ones: a conflicting Delta is lost
                                                               where tau is larger
    =====================  ==================================  ===================================================

Weights are updated in float32, also where the model's are bf16: an update of 1e-10 would vanish in them. Masks are
drawn from seed, step and the parameter's name by position, so that a sharded parameter has the mask of the whole one.
Differs from the paper: TIES's threshold is a quantile of a sample of positions, not of a sort (a sort costs fifty times
AdamW's own step); weight decay is AdamW's, outside of what is merged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from align.core.errors import ModelError

SAMPLED = 0.01
"""Share of positions whose magnitudes tell TIES's threshold; at least `FEW` of them."""

FEW = 4096


@dataclass(frozen=True, slots=True)
class Merging:
    """How a step is merged.

    Attributes:
        method: none (AdamW alone), dare or ties.
        alpha: weight of tau, and 1 - alpha that of Delta. The paper's 1e-7; above 5e-5 it hurts.
        keep: share of the coordinates that F keeps (p).
        as_in: whose variant, the paper's or its code's; see the module's table.
        every: merge what has gathered in so many steps; 1 merges each step.
        seed: of the masks.
    """

    method: Literal["none", "dare", "ties"] = "none"
    alpha: float = 1e-7
    keep: float = 0.01
    as_in: Literal["paper", "code"] = "code"
    every: int = 1
    seed: int = 0


class MergingAdamW(torch.optim.Optimizer):
    """AdamW whose steps are merged with tau.

    Args:
        named: the parameters with their names; groups as for any optimizer are made of them.
        merging: see there.
        tau: theta_SFT - theta_base of a parameter by its name, called once, at the first step: by then a sharded model
            has its shards. Whole tensors are given; the parameter's shard is cut out here.
        lr: learning rate.
        betas: of the moments.
        eps: AdamW's.
        weight_decay: decoupled, on the groups that ask for it.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]] | list[dict[str, Any]],
        merging: Merging,
        tau: Callable[[str], Tensor],
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.merging, self._tau = merging, tau
        self._taus: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        super().__init__(named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `state["step"]` counts them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("param_names") or [str(number) for number in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    self._step(name, parameter, group)
        return loss

    def _step(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float().clone()
            if self.merging.method != "none" and self.merging.every > 1:
                state["before"] = parameter.detach().float().clone()
        weight = _local(state.get("master", parameter))
        gradient = _local(parameter.grad).to(torch.float32)  # type: ignore[arg-type]
        plain = self.merging.method == "none" or self.merging.every > 1
        moved = weight if plain else torch.zeros_like(weight)  # AdamW from zero, without decay, is Delta
        first, second = group["betas"]
        adamw(
            [moved], [gradient], [_local(state["exp_avg"])], [_local(state["exp_avg_sq"])], [], [state["step"]],
            fused=True, amsgrad=False, beta1=first, beta2=second, lr=group["lr"], eps=group["eps"], maximize=False,
            weight_decay=group["weight_decay"] if plain else 0.0,
        )  # fmt: skip
        number = int(state["step"])
        shard = Shard.of(parameter)
        if not plain:
            if group["weight_decay"]:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            self._merge(name, weight, moved, shard, number)
        elif self.merging.method != "none" and number % self.merging.every == 0:
            before = _local(state["before"])  # everything since the last merge, its decay too, is one Delta
            gathered = weight - before
            weight.copy_(before)
            self._merge(name, weight, gathered, shard, number)
            before.copy_(weight)
        if "master" in state:
            _local(parameter).copy_(weight)

    def _merge(self, name: str, weight: Tensor, delta: Tensor, shard: Shard, number: int) -> None:
        """weight += the merged step."""
        if self.merging.method == "dare":
            self._dare(name, weight, delta, shard, number)
        else:
            self._ties(name, weight, delta, shard)

    def _dare(self, name: str, target: Tensor, step: Tensor, shard: Shard, number: int) -> None:
        merging, flat = self.merging, target.view(-1)
        code = merging.as_in == "code"
        kept = shard.mine(positions(f"{merging.seed}/{name}/step {number}", shard.whole, merging.keep, flat.device))
        flat.index_add_(0, kept, step.view(-1)[kept], alpha=(1 - merging.alpha) / (merging.keep if code else 1))
        if not merging.alpha:
            return
        tau = self._tau_of(name, target, shard)
        drawn = 0 if code else number
        of_tau = shard.mine(positions(f"{merging.seed}/{name}/tau {drawn}", shard.whole, merging.keep, flat.device))
        values = tau.view(-1)[of_tau]
        if code:
            values = (values / merging.keep).clamp_(-1, 1)
        flat.index_add_(0, of_tau, values, alpha=merging.alpha)

    def _ties(self, name: str, target: Tensor, step: Tensor, shard: Shard) -> None:
        """Only where F keeps Delta or tau anything is added: with a small `keep` few coordinates."""
        merging = self.merging
        flat, delta = target.view(-1), step.view(-1)
        if name not in self._kept:
            tau = self._tau_of(name, target, shard).view(-1)
            self._kept[name] = tau * (tau.abs() >= threshold(name, tau, shard, merging))
        b = self._kept[name]
        at = (delta.abs() >= threshold(name, delta, shard, merging)).logical_or_(b != 0).nonzero()[:, 0]
        a, b = delta[at], b[at]
        a = a * (a.abs() >= threshold(name, delta, shard, merging))
        terms = (1 - merging.alpha) * a, merging.alpha * b
        first, second = (a, b) if merging.as_in == "code" else terms
        conflict, larger = first * second < 0, first.abs() >= second.abs()
        kept = terms[0].masked_fill(conflict & ~larger, 0) + terms[1].masked_fill(conflict & larger, 0)
        flat.index_add_(0, at, kept)

    def _tau_of(self, name: str, weight: Tensor, shard: Shard) -> Tensor:
        """The shard of tau that belongs to a parameter's, float32; it never changes and is no part of a checkpoint."""
        if name not in self._taus:
            whole = self._tau(name)
            if whole.numel() != shard.whole:
                raise ModelError(
                    f"{name}: base and SFT have {whole.numel()} numbers there, the policy has {shard.whole}; "
                    "give the models that the policy was made from"
                )
            self._taus[name] = shard.cut(whole.to(weight.device, torch.float32))
        return self._taus[name]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which stretch of a whole parameter, flattened, this process holds.

    Attributes:
        start: its first position.
        size: how many there are.
        whole: positions of the whole parameter.
        group: the processes that hold the others; None where there are none.
    """

    start: int
    size: int
    whole: int
    group: Any = None

    @staticmethod
    def of(parameter: Tensor) -> Shard:
        """From a plain tensor, or one that `fully_shard` has cut along its first dimension."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        if not isinstance(parameter, DTensor):
            return Shard(0, parameter.numel(), parameter.numel())
        shape, offset = place(parameter.shape, parameter.device_mesh, parameter.placements)
        row = math.prod(parameter.shape[1:])
        if tuple(shape[1:]) != tuple(parameter.shape[1:]):
            raise ModelError("the Online Merging Optimizer takes parameters sharded along their first dimension alone")
        return Shard(offset[0] * row, math.prod(shape), parameter.numel(), parameter.device_mesh.get_group())

    def mine(self, positions: Tensor) -> Tensor:
        """Of positions in the whole parameter, those in this shard, counted from its start."""
        if self.group is None:
            return positions
        return positions[(positions >= self.start) & (positions < self.start + self.size)] - self.start

    def cut(self, whole: Tensor) -> Tensor:
        """This shard of a whole tensor, in the shard's shape."""
        return whole if self.group is None else whole.view(-1)[self.start : self.start + self.size].clone()


def positions(key: str, size: int, keep: float, device: Any) -> Tensor:
    """Each position below `size` with probability `keep`, in order, (K,); the same for the same key.

    Drawn as gaps, which are geometric, so that it costs keep * size and not size.
    """
    if keep >= 1:
        return torch.arange(size, device=device)
    generator = torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    few = int(size * keep + 6 * math.sqrt(size * keep) + 16)  # enough in all but one of a billion draws
    found = torch.zeros(0, dtype=torch.float64, device=device)
    last = -1.0
    while last < size:
        gaps = torch.empty(few, dtype=torch.float64, device=device).geometric_(keep, generator=generator)
        found = torch.cat([found, gaps.cumsum(0) + last])
        last = float(found[-1])
    return found[found < size].long()


def threshold(name: str, values: Tensor, shard: Shard, merging: Merging) -> Tensor:
    """The magnitude that the share `keep` of a parameter's coordinates reaches, over all its shards; a scalar.

    The quantile of a sample of positions; of a small parameter, of all.
    """
    share = max(SAMPLED, min(1.0, FEW / shard.whole))
    looked_at = shard.mine(positions(f"{merging.seed}/{name}/sample", shard.whole, share, values.device))
    sample = values.reshape(-1)[looked_at].abs()
    if shard.group is not None:
        sample = _of_all(sample, shard.group)
    kept = max(1, round(merging.keep * len(sample)))
    return sample.kthvalue(len(sample) - kept + 1).values


def _of_all(sample: Tensor, group: Any) -> Tensor:
    """The samples of all shards, in the shards' order."""
    import torch.distributed as dist

    sizes = [torch.zeros(1, dtype=torch.long, device=sample.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(sample)], device=sample.device), group=group)
    most = max(int(size) for size in sizes)
    padded = [sample.new_zeros(most) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(sample, (0, most - len(sample))), group=group)
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
