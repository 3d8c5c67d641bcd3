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

    one AdamW call on the buffer instead of the weights, at the learning rate (1 - alpha) eta:  (1 - alpha) Delta
    OnDARE: draw places; theta += the buffer at these
    OnTIES: cut the buffer below a quantile of each tensor's magnitudes, elect where F keeps tau; theta += the buffer
    theta += alpha F(tau), at its places

At the paper's alpha of 1e-7 tau's term is about 1e-10, and in float32 a weight of 0.02 changes by 2e-9 or not at all.
So bf16 weights have a float32 master, and what float32 rounds away of tau's term is kept (`low`, another float32, at
the places where F(tau) is not 0) and added when it has grown.
Masks and samples are drawn of the whole parameters (shards.py), so a sharded model has those of a whole one.
Differs from the paper: OnTIES's threshold is a quantile of a sample of places, drawn once, and not of a sort, which
alone takes fifty times AdamW's step. It is one of each tensor, over all its shards, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
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
    places, or of all where they are drawn anew. (Where a parameter is sharded, the first kind is in no checkpoint,
    since its length is the shard's own: a run that goes on begins it at 0.) Groups count their `steps`. Tau and its
    mask are in no checkpoint: they are the same again.

    Args:
        named: the parameters with their names; groups as for any optimizer are made of them.
        merging: see there.
        tau: theta_SFT - theta_base of a parameter by its name, whole, any precision. Asked once for each, at the first
            step: by then a sharded model has its shards. Not asked where alpha is 0.
        lr: learning rate. At 0 no weight moves; tau waits too.
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
        merging = self.merging
        for part in self._all_parts():
            part.begin(self.state, merging)
            group = part.group
            merges = merging.method != "none" and group["lr"] > 0
            if merges and merging.every == 1:
                self._merge_step(part)
            else:
                self._adamw(part, part.weights(), group["lr"], group["weight_decay"])
                if merges and group["steps"] % merging.every == 0:
                    self._merge_gathered(part)
            part.round_to_model()
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Merges what has gathered since the last merge; for the end of a training that `every` doesn't divide."""
        for part in self._all_parts():
            part.begin(self.state, self.merging)
            if self.merging.method != "none" and part.group["steps"] % self.merging.every:
                self._merge_gathered(part)
                part.round_to_model()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; only that float32 state of bf16 parameters stays float32."""
        super().load_state_dict(state_dict)
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, order, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.detach().to(parameter.device, copy=True)
        for part in self._parts:
            part.group, part.low = self.param_groups[part.number], None

    # --- one part of the parameters ---------------------------------------------------------------------------------

    def _merge_step(self, part: Part) -> None:
        """Decay, then the merged step, on the weights."""
        weights, group = part.weights(), part.group
        buffer, lr = self._buffer_of(part), group["lr"] * (1 - self.merging.alpha)
        self._adamw(part, part.views(buffer), lr, 1 / lr)  # a decay of 1 / lr takes what lay in the buffer before
        if group["weight_decay"]:
            torch._foreach_mul_([weights[number] for number in part.moving()], 1 - group["lr"] * group["weight_decay"])
        self._merge(part, weights, buffer)

    def _merge_gathered(self, part: Part) -> None:
        """What AdamW has done since the last merge is taken back, and merged as one Delta."""
        weights, before = part.weights(), part.states("before")
        buffer = self._buffer_of(part)
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
        states = [part.own[number] for number in moving]
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

    def _merge(self, part: Part, weights: Sequence[Tensor], step: Tensor) -> None:
        """weights += the merged step; `step` is the buffer with (1 - alpha) Delta."""
        merging = self.merging
        if merging.method == "ondare":
            part.add_drawn(weights, step, merging)
            at, taught = part.taught(merging)
        else:
            part.trim(step)
            at, taught = part.elect(step, merging)
            torch._foreach_add_(list(weights), part.views(step))
        if len(at):
            part.add_exactly(weights, at, taught)

    def _buffer_of(self, part: Part) -> Tensor:
        """As long as the part; all parts share one. What lies in it is finite, and has no meaning."""
        if len(self._buffer) < part.layout.size or self._buffer.device != part.device:
            most = max(each.layout.size for each in self._parts)
            self._buffer = torch.zeros(most, device=part.device)
        buffer = self._buffer[: part.layout.size]
        if len(part.moving()) < len(part.parameters):
            buffer.zero_()  # AdamW passes by where there is no gradient
        return buffer

    def _all_parts(self) -> list[Part]:
        """Made at the first step."""
        if not self._parts:
            before = 0
            for number, group in enumerate(self.param_groups):
                names = group.get("param_names") or [str(before + i) for i in range(len(group["params"]))]
                before += len(names)
                named: list[tuple[str, Tensor]] = []
                for name, parameter in zip(names, group["params"], strict=True):
                    if named and sum(p.numel() for _, p in named) + parameter.numel() > AT_ONCE:
                        self._parts.append(Part(named, number, group, self.merging))
                        named = []
                    named.append((name, parameter))
                if named:
                    self._parts.append(Part(named, number, group, self.merging))
            if self.merging.method != "none" and self.merging.alpha:
                for part in self._parts:
                    part.read_tau(self._tau, self.merging)
        return self._parts


class Part:
    """Parameters that are merged together: their shards one behind the other, as in the buffer.

    Attributes:
        parameters: of one group of the optimizer, the `number`-th.
        layout: where they lie.
        kept: places at which F keeps tau; all, where they are drawn anew at each step; none where alpha is 0.
        tau: there, after F where they are fixed.
        low: what float32 rounds away of the weights there; None before the first merge, and after a load.
        own: each parameter's state.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], number: int, group: dict[str, Any], merging: Merging
    ) -> None:
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.number, self.group, self.device = number, group, local(self.parameters[0]).device
        self.layout = Layout([Shard.of(parameter) for parameter in self.parameters], self.device)
        self.sizes = [shard.size for shard in self.layout.shards]
        self._edges = torch.tensor([0, *self.sizes], device=self.device).cumsum(0)
        self.redraws = merging.method == "ondare" and merging.as_in == "paper"
        self.kept = torch.zeros(0, dtype=torch.long, device=self.device)
        self.tau = torch.zeros(0, device=self.device)
        self.low: Tensor | None = None
        self.own: list[dict[str, Any]] = []
        self._kept_in: list[tuple[int, tuple[Tensor, ...]]] = []
        self.quantiles: Quantiles | None = None
        if merging.method == "onties" and merging.keep < 1:
            self.quantiles = Quantiles(self.names, self.layout, merging.keep, merging.seed, self.device)

    # --- their tensors ----------------------------------------------------------------------------------------------

    def begin(self, state: Any, merging: Merging) -> None:
        """Finds each parameter's state, and gives what it lacks; the moments with its first gradient."""
        self.own = [state[parameter] for parameter in self.parameters]
        for parameter, own in zip(self.parameters, self.own, strict=True):
            if "master" not in own and parameter.dtype != torch.float32:
                own["master"] = parameter.detach().float().clone()
            if "before" not in own and merging.method != "none" and merging.every > 1:
                own["before"] = parameter.detach().float().clone()
            if "low" not in own and self.redraws and merging.alpha:
                own["low"] = _zeros(parameter)
            if "step" not in own and parameter.grad is not None:
                own["step"] = torch.zeros((), device=self.device)
                own["exp_avg"], own["exp_avg_sq"] = _zeros(parameter), _zeros(parameter)

    def moving(self) -> list[int]:
        """Numbers of the parameters that have a gradient."""
        return [number for number, p in enumerate(self.parameters) if p.grad is not None and self.sizes[number]]

    def weights(self) -> list[Tensor]:
        """In float32, as they lie in this process."""
        return [local(own.get("master", p)) for own, p in zip(self.own, self.parameters, strict=True)]

    def states(self, name: str) -> list[Tensor]:
        """A piece of every parameter's state, as it lies in this process."""
        return [local(own[name]) for own in self.own]

    def round_to_model(self) -> None:
        """Writes masters into the model's own weights."""
        pairs = [(p, own["master"]) for own, p in zip(self.own, self.parameters, strict=True) if "master" in own]
        if pairs:
            torch._foreach_copy_([local(model) for model, _ in pairs], [local(master) for _, master in pairs])

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A buffer as tensors of the parameters' shapes."""
        pieces = buffer.split_with_sizes(self.sizes)
        return [piece.view(local(p).shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def by_parameter(self, at: Tensor, *beside: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
        """Places in order, and what goes with them, by the parameter's number; counted from each one's first."""
        counts = torch.searchsorted(at, self._edges).diff()
        inside = at - torch.repeat_interleave(self._edges[:-1], counts, output_size=len(at))
        sizes = counts.tolist()
        pieces = zip(*(each.split_with_sizes(sizes) for each in (inside, *beside)), strict=True)
        return [(number, piece) for number, piece in enumerate(pieces) if sizes[number]]

    # --- F of a step ------------------------------------------------------------------------------------------------

    def draw(self, what: str, merging: Merging) -> Tensor:
        """Places that stay, each with probability `keep`."""
        key = f"{merging.seed}/{self.names[0]}/{what}"
        return self.layout.mine(positions(key, self.layout.whole, merging.keep, self.device))[0]

    def add_drawn(self, weights: Sequence[Tensor], step: Tensor, merging: Merging) -> None:
        """weights += OnDARE's F of a step."""
        if merging.keep >= 1:
            torch._foreach_add_(list(weights), self.views(step))
            return
        drawn = self.draw(f"step {self.group['steps']}", merging)
        values = step.index_select(0, drawn)
        if merging.as_in == "code":
            values /= merging.keep
        for number, (at, found) in self.by_parameter(drawn, values):
            weights[number].view(-1).index_add_(0, at, found)

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
        if self.redraws:
            self.tau = flat
        elif merging.method == "ondare":
            self.kept = self.draw("tau", merging)
            self.tau = (flat[self.kept] / merging.keep).clamp_(-1, 1)
        else:
            self.trim(flat)
            self.kept = flat.nonzero()[:, 0]
            self.tau = flat[self.kept]

    def taught(self, merging: Merging) -> tuple[Tensor, Tensor]:
        """Where OnDARE adds to the weights what SFT has taught, and alpha F(tau) there, float64."""
        at, tau = self.kept, self.tau
        if self.redraws and merging.alpha:
            at = self.draw(f"tau {self.group['steps']}", merging)
            tau = tau.index_select(0, at)
        return at, tau.double().mul_(merging.alpha)

    def elect(self, step: Tensor, merging: Merging) -> tuple[Tensor, Tensor]:
        """OnTIES: where signs conflict, the smaller one becomes 0, in the step or in what SFT has taught.

        Returns:
            See `taught`.
        """
        a, b = step.index_select(0, self.kept).double(), self.tau.double()
        taught = merging.alpha * b
        mine, other = (a / (1 - merging.alpha), b) if merging.as_in == "code" else (a, taught)
        conflict, larger = mine * other < 0, mine.abs() >= other.abs()
        step.index_copy_(0, self.kept, a.masked_fill_(conflict & ~larger, 0).float())
        return self.kept, taught.masked_fill_(conflict & larger, 0)

    def add_exactly(self, weights: Sequence[Tensor], at: Tensor, values: Tensor) -> None:
        """weights += values at some places, and what float32 has rounded away there before."""
        found = self.by_parameter(at) if self.redraws else self._fixed()
        flat = {number: weights[number].view(-1) for number, _ in found}
        lows = {number: local(self.own[number]["low"]).view(-1) for number, _ in found if self.redraws}
        low = _select(lows, found) if self.redraws else self._low(found)
        exact = _select(flat, found).double().add_(low).add_(values)
        rounded = exact.float()
        low.copy_(exact.sub_(rounded))
        sizes = [len(inside) for _, (inside,) in found]
        for (number, (inside,)), new, rest in zip(
            found, rounded.split_with_sizes(sizes), low.split_with_sizes(sizes), strict=True
        ):
            flat[number].index_copy_(0, inside, new)
            if self.redraws:
                lows[number].index_copy_(0, inside, rest)

    def _fixed(self) -> list[tuple[int, tuple[Tensor, ...]]]:
        if not self._kept_in:
            self._kept_in = self.by_parameter(self.kept)
        return self._kept_in

    def _low(self, found: Sequence[tuple[int, tuple[Tensor, ...]]]) -> Tensor:
        """Of the fixed places; the parameters' own are views of it."""
        if self.low is None:
            new = [torch.zeros(len(inside), device=self.device) for _, (inside,) in found]
            own = [self.own[number] for number, _ in found]
            self.low = torch.cat([each.get("low", zeros) for each, zeros in zip(own, new, strict=True)])
            if self.layout.group is None:
                for each, view in zip(own, self.low.split_with_sizes([len(zeros) for zeros in new]), strict=True):
                    each["low"] = view
        return self.low


def _select(flat: Mapping[int, Tensor], found: Sequence[tuple[int, tuple[Tensor, ...]]]) -> Tensor:
    return torch.cat([flat[number].index_select(0, inside) for number, (inside,) in found])


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)


def gradient(parameter: Tensor) -> Tensor:
    """In float32, as it lies in this process."""
    assert parameter.grad is not None
    return local(parameter.grad).float().contiguous()


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
