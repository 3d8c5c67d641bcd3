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
    OnDARE's kept Delta    as it is (eq. 4)                    divided by p, so that its mean is Delta's
    OnDARE's mask of tau   drawn anew at each step (alg. 1)    drawn once; tau divided by p, clamped to [-1, 1]
    OnTIES's signs         of the weighted terms (eq. 7)       of the unweighted ones: a conflicting Delta is lost
                                                               where tau is larger
    every K steps          all parameters                      the first one alone, by mistake: not done so here
    =====================  ==================================  ===================================================

Every K steps: AdamW goes its own way, and each K-th step all that has gathered, weight decay with it, is taken back and
merged as one Delta. Otherwise decay is AdamW's, outside of what is merged.

For each group of parameters up to `AT_ONCE` numbers, all by a few operations on one flat buffer:

    buffer = 0; one AdamW call moves it, without decay, at the learning rate (1 - alpha) eta:  (1 - alpha) Delta
    F: draw the places that stay, or cut below a quantile of each tensor's magnitudes
    at the places where F keeps tau: add or elect
    theta += buffer

At the paper's alpha of 1e-7 tau's term is about 1e-10, and in float32 a weight of 0.02 changes by 2e-9 or not at all.
So bf16 weights have a float32 master, and at the places where F(tau) is not 0 what float32 rounds away is kept (`low`,
another float32) and added when it has grown. OnDARE in the paper's variant has no fixed places: there it is lost.
Masks and samples are drawn of the whole parameters (shards.py), so a sharded model has those of a whole one.
Differs from the paper: OnTIES's threshold is a quantile of a sample of places, drawn once, and not of a sort, which
alone takes fifty times AdamW's step. It is one of each tensor, over all its shards, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from align.core.errors import ModelError
from align.train.shards import Layout, Quantiles, Shard, positions

AT_ONCE = 2**24
"""Numbers of the parameters that are merged at once, at most, where one parameter alone has not more."""


@dataclass(frozen=True, slots=True)
class Merging:
    """How a step is merged.

    Attributes:
        method: none (AdamW alone), ondare or onties.
        alpha: weight of tau, and 1 - alpha that of Delta. The paper's 1e-7; above 5e-5 it hurts.
        keep: share of the coordinates that F keeps (p).
        as_in: whose variant, the paper's or its code's; see the module's table.
        every: merge what has gathered in so many steps; 1 merges each step.
        seed: of the masks.
    """

    method: Literal["none", "ondare", "onties"] = "none"
    alpha: float = 1e-7
    keep: float = 0.01
    as_in: Literal["paper", "code"] = "code"
    every: int = 1
    seed: int = 0


class MergingAdamW(torch.optim.Optimizer):
    """AdamW whose steps are merged with tau.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq` as AdamW's; `master` of a parameter that isn't float32;
    `before`, its weights after the last merge, where steps gather; `low`, see the module, in the order of its kept
    places. (A sharded parameter's `low` is in no checkpoint, since its length is the shard's own: a run that goes on
    begins it at 0.) Groups count their `steps`. Tau and its mask are in no checkpoint: they are the same again.

    Args:
        named: the parameters with their names; groups as for any optimizer are made of them.
        merging: see there.
        tau: theta_SFT - theta_base of a parameter by its name, whole, any precision. Asked once for each, at the first
            step: by then a sharded model has its shards. Not asked where alpha is 0.
        lr: learning rate. At 0 nothing is merged either.
        betas: of the moments.
        eps: AdamW's.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]] | list[dict[str, Any]],
        merging: Merging,
        tau: Callable[[str], Tensor] | None = None,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.merging, self._tau = merging, tau
        self._parts: list[Part] = []
        self._buffer = torch.empty(0)
        super().__init__(named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; tau's term goes to all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
        gathers = self.merging.method == "none" or self.merging.every > 1
        for part in self._all_parts():
            part.begin(self.state, self.merging)
            if gathers:
                self._adamw(part, part.weights(self.state), part.group["lr"], part.group["weight_decay"])
                if self.merging.method != "none" and part.group["steps"] % self.merging.every == 0:
                    self._merge_gathered(part)
            elif part.group["lr"]:
                self._merge_step(part)
            part.round_to_model(self.state)
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Merges what has gathered since the last merge; for the end of a training that `every` doesn't divide."""
        for part in self._all_parts():
            if self.merging.method != "none" and part.group["steps"] % self.merging.every:
                self._merge_gathered(part)
                part.round_to_model(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; only that float32 state of bf16 parameters stays float32."""
        super().load_state_dict(state_dict)
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, order, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.detach().to(parameter.device, copy=True)
        for part in self._parts:
            part.high = None  # of the weights that are there now

    # --- one part of the parameters ---------------------------------------------------------------------------------

    def _merge_step(self, part: Part) -> None:
        """Decay, then the merged step, on the weights."""
        weights, group = part.weights(self.state), part.group
        decay = 1 - group["lr"] * group["weight_decay"]
        part.read_high(weights, self.state)
        buffer = self._scratch(part)
        self._adamw(part, part.views(buffer), group["lr"] * (1 - self.merging.alpha), 0.0)
        if decay != 1:
            torch._foreach_mul_([weights[number] for number in part.moving()], decay)
            part.decay_high(decay)
        self._merge(part, weights, buffer)

    def _merge_gathered(self, part: Part) -> None:
        """What AdamW has done since the last merge is taken back, and merged as one Delta."""
        weights, before = part.weights(self.state), part.locals(self.state, "before")
        part.read_high(before, self.state)
        buffer = self._scratch(part)
        views = part.views(buffer)
        torch._foreach_copy_(views, weights)
        torch._foreach_sub_(views, before)
        buffer.mul_(1 - self.merging.alpha)
        torch._foreach_copy_(weights, before)
        self._merge(part, weights, buffer)
        torch._foreach_copy_(before, weights)

    def _adamw(self, part: Part, targets: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        """AdamW's step of the parameters that have a gradient, on `targets`."""
        moving = part.moving()
        if not moving:
            return
        first, second = part.group["betas"]
        states = [self.state[part.parameters[number]] for number in moving]
        adamw(
            [targets[number] for number in moving],
            [gradient(part.parameters[number]) for number in moving],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True, amsgrad=False, beta1=first, beta2=second, lr=lr, eps=part.group["eps"], maximize=False,
            weight_decay=weight_decay,
        )  # fmt: skip

    def _merge(self, part: Part, weights: list[Tensor], step: Tensor) -> None:
        """weights += the merged step, of the buffer's (1 - alpha) Delta."""
        merging = self.merging
        code = merging.as_in == "code"
        if merging.method == "ondare":
            part.drop(step, merging, scale=1 / merging.keep if code else 1.0)
        else:
            part.trim(step)
        if merging.alpha and merging.method == "ondare" and not code:
            drawn = part.draw(f"tau {part.group['steps']}", merging)
            step.index_add_(0, drawn, part.tau[drawn], alpha=merging.alpha)
        elif merging.alpha:
            part.add_tau(step, merging)
        torch._foreach_add_(weights, part.views(step))

    def _scratch(self, part: Part) -> Tensor:
        """The buffer, as long as the part, zeros; all parts share one."""
        if len(self._buffer) < part.layout.size or self._buffer.device != part.device:
            most = max(each.layout.size for each in self._parts)
            self._buffer = torch.empty(most, device=part.device)
        return self._buffer[: part.layout.size].zero_()

    def _all_parts(self) -> list[Part]:
        """Made at the first step."""
        if not self._parts:
            number = 0
            for group in self.param_groups:
                names = group.get("param_names") or [str(number + i) for i in range(len(group["params"]))]
                number += len(names)
                named: list[tuple[str, Tensor]] = []
                for name, parameter in zip(names, group["params"], strict=True):
                    if named and sum(p.numel() for _, p in named) + parameter.numel() > AT_ONCE:
                        self._parts.append(Part(named, group, self.merging))
                        named = []
                    named.append((name, parameter))
                if named:
                    self._parts.append(Part(named, group, self.merging))
            if self.merging.method != "none" and self.merging.alpha:
                for part in self._parts:
                    part.read_tau(self._tau, self.merging)
        return self._parts


class Part:
    """Parameters that are merged together: their shards one behind the other, as in the buffer.

    Attributes:
        parameters: of one group of the optimizer.
        layout: where they lie.
        tau: of all places, or of those alone at which F keeps it.
        kept: these places, where they are fixed.
        high: the weights there, as float32 has them; None where they must be read anew.
        low: what float32 rounds away of them.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], group: dict[str, Any], merging: Merging) -> None:
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.group, self.device = group, local(self.parameters[0]).device
        self.layout = Layout([Shard.of(parameter) for parameter in self.parameters], self.device)
        self.sizes = [shard.size for shard in self.layout.shards]
        self.tau = self.kept = self.low = torch.zeros(0, device=self.device)
        self.high: Tensor | None = None
        self._in_each: list[int] = []
        self.quantiles: Quantiles | None = None
        if merging.method == "onties" and merging.keep < 1:
            self.quantiles = Quantiles(self.names, self.layout, merging.keep, merging.seed, self.device)

    # --- their tensors ----------------------------------------------------------------------------------------------

    def begin(self, state: Any, merging: Merging) -> None:
        """Gives a parameter that has its first gradient its state."""
        for parameter in self.parameters:
            own = state[parameter]
            if "master" not in own and parameter.dtype != torch.float32:
                own["master"] = parameter.detach().float().clone()
            if "before" not in own and merging.method != "none" and merging.every > 1:
                own["before"] = parameter.detach().float().clone()
            if "step" not in own and parameter.grad is not None:
                own["step"] = torch.zeros((), device=self.device)
                for moment in ("exp_avg", "exp_avg_sq"):
                    zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
                    own[moment] = zeros

    def moving(self) -> list[int]:
        """Numbers of the parameters that have a gradient."""
        return [number for number, p in enumerate(self.parameters) if p.grad is not None and self.sizes[number]]

    def weights(self, state: Any) -> list[Tensor]:
        """In float32, as they lie in this process."""
        return [local(state[p].get("master", p)) if p in state else local(p) for p in self.parameters]

    def locals(self, state: Any, name: str) -> list[Tensor]:
        """A piece of every parameter's state."""
        return [local(state[parameter][name]) for parameter in self.parameters]

    def round_to_model(self, state: Any) -> None:
        """Writes masters into the model's own weights."""
        of = [p for p in self.parameters if "master" in state.get(p, {})]
        if of:
            torch._foreach_copy_([local(p) for p in of], [local(state[p]["master"]) for p in of])

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A buffer as tensors of the parameters' shapes."""
        pieces = buffer.split_with_sizes(self.sizes)
        return [piece.view(local(p).shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    # --- what is kept -----------------------------------------------------------------------------------------------

    def draw(self, what: str, merging: Merging) -> Tensor:
        """Places that stay, each with probability `keep`."""
        key = f"{merging.seed}/{self.names[0]}/{what}"
        return self.layout.mine(positions(key, self.layout.whole, merging.keep, self.device))[0]

    def drop(self, step: Tensor, merging: Merging, scale: float) -> None:
        """OnDARE's F of a step."""
        if merging.keep >= 1:
            return
        drawn = self.draw(f"step {self.group['steps']}", merging)
        values = step[drawn].mul_(scale)
        step.zero_()
        step[drawn] = values

    def trim(self, step: Tensor) -> None:
        """OnTIES's F: what is smaller than its tensor's threshold becomes 0; what is as large stays."""
        if self.quantiles is None:
            return
        least = self.quantiles.of(step)
        below = torch.nextafter(least, torch.zeros_like(least)).tolist()
        for piece, limit in zip(step.split_with_sizes(self.sizes), below, strict=True):
            torch.hardshrink(piece, limit, out=piece)

    # --- tau --------------------------------------------------------------------------------------------------------

    def read_tau(self, tau: Callable[[str], Tensor] | None, merging: Merging) -> None:
        """Takes each parameter's shard of it, and F of that where F is fixed."""
        if tau is None:
            raise ModelError("merging: there is no tau; give base and SFT, or set alpha to 0")
        flat = torch.empty(self.layout.size, device=self.device)
        for name, shard, piece in zip(self.names, self.layout.shards, flat.split_with_sizes(self.sizes), strict=True):
            whole = tau(name)
            if whole.numel() != shard.whole:
                raise ModelError(
                    f"{name}: base and SFT have {whole.numel()} numbers there, the policy has {shard.whole}; "
                    "give the models that the policy was made from"
                )
            piece.copy_(shard.cut(whole))
        if merging.method == "ondare" and merging.as_in == "paper":
            self.tau = flat
            return
        if merging.method == "ondare":
            self.kept = self.draw("tau", merging)
            self.tau = (flat[self.kept] / merging.keep).clamp_(-1, 1)
        else:
            self.trim(flat)
            self.kept = flat.nonzero()[:, 0]
            self.tau = flat[self.kept]
        edges = torch.tensor([0, *self.sizes]).cumsum(0).to(self.device)
        self._in_each = torch.searchsorted(self.kept, edges).diff().tolist()

    def read_high(self, weights: Sequence[Tensor], state: Any) -> None:
        """The weights where tau is kept, and what float32 has rounded away of them: at the first step, or after a load.

        The parameters' `low` are views of the part's.
        """
        if self.high is not None or not len(self.kept):
            return
        inside = self.kept.split_with_sizes(self._in_each)
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        pieces = [w.reshape(-1)[at - start] for w, at, start in zip(weights, inside, starts, strict=True)]
        self.high = torch.cat(pieces)
        lows = [state[p].get("low", torch.zeros_like(piece)) for p, piece in zip(self.parameters, pieces, strict=True)]
        self.low = torch.cat(lows)
        if self.layout.group is None:
            for parameter, low in zip(self.parameters, self.low.split_with_sizes(self._in_each), strict=True):
                state[parameter]["low"] = low

    def decay_high(self, decay: float) -> None:
        """As the weights that have a gradient are decayed, bit by bit."""
        if self.high is not None:
            pieces = self.high.split_with_sizes(self._in_each)
            torch._foreach_mul_([pieces[number] for number in self.moving()], decay)

    def add_tau(self, step: Tensor, merging: Merging) -> None:
        """alpha F(tau) where it is not 0, added or, in OnTIES, elected; with what float32 has rounded away before."""
        if not len(self.kept):
            return
        assert self.high is not None
        a, b = step[self.kept].double(), self.tau.double()
        taught = merging.alpha * b
        if merging.method == "ondare":
            found = a + taught
        else:
            mine, other = (a / (1 - merging.alpha), b) if merging.as_in == "code" else (a, taught)
            winner = torch.where(mine.abs() >= other.abs(), a, taught)
            found = torch.where(mine * other < 0, winner, a + taught)
        exact = self.high.double() + self.low + found
        high = exact.float()
        step[self.kept] = high - self.high
        self.low.copy_(exact - high)
        self.high.copy_(high)


def gradient(parameter: Tensor) -> Tensor:
    """In float32, as it lies in this process."""
    assert parameter.grad is not None
    return local(parameter.grad).float().contiguous()


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies in this process."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
