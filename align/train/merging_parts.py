"""Parameters that are merged together by the Online Merging Optimizer (merging.py): masks, tau and remainders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from align.core.errors import ModelError
from align.train.shards import Layout, Quantiles, Shard, largest, positions
from align.train.tau import plain_name

if TYPE_CHECKING:
    from align.train.merging import Merging


class Part:
    """Parameters that are merged together: their shards one behind the other, as in the buffer.

    Attributes:
        merging: how.
        parameters: of one group of the optimizer, the `number`-th.
        layout: where they lie.
        kept: places at which F keeps tau; all, where they are drawn anew at each step; none where alpha is 0.
        tau: there, after F where they are fixed.
        low: what float32 rounds away of the weights there; None before the first merge, and after a load.
        own: each parameter's state.
        buffer: see the module.
        views: of it, in the parameters' shapes.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], number: int, group: dict[str, Any], merging: Merging
    ) -> None:
        self.merging = merging
        self.names = [plain_name(name) for name, _ in named]  # masks are by name, and don't depend on wrappers
        self.parameters = [parameter for _, parameter in named]
        for name, parameter in named:
            if not local(parameter).is_contiguous():
                raise ModelError(
                    f"merging: {name}'s numbers don't lie one behind the other (a transposed view?); give it "
                    "contiguous, or set merging to none"
                )
        self.number, self.group, self.device = number, group, local(self.parameters[0]).device
        self.layout = Layout([Shard.of(parameter) for parameter in self.parameters], self.device)
        self.sizes = [shard.size for shard in self.layout.shards]
        self._edges = torch.tensor([0, *self.sizes], device=self.device).cumsum(0)
        self.redraws = merging.method == "ondare" and merging.as_in == "paper"
        self.kept = torch.zeros(0, dtype=torch.long, device=self.device)
        self.tau = torch.zeros(0, device=self.device)
        self.low: Tensor | None = None
        self.own: list[dict[str, Any]] = []
        self.buffer = torch.zeros(0, device=self.device)
        self.views: list[Tensor] = []
        self._kept_in: list[tuple[int, tuple[Tensor, ...]]] = []
        self.quantiles: Quantiles | None = None
        if merging.method == "onties" and merging.keep < 1:
            self.quantiles = Quantiles(self.names, self.layout, merging.keep, merging.seed, self.device)

    # --- their tensors ----------------------------------------------------------------------------------------------

    def begin(self, state: Any) -> None:
        """Finds each parameter's state, and gives what it lacks; the moments with its first gradient."""
        self.own = [state[parameter] for parameter in self.parameters]
        for parameter, own in zip(self.parameters, self.own, strict=True):
            if "master" not in own and parameter.dtype != torch.float32:
                own["master"] = parameter.detach().float().clone()
            if "before" not in own and self.merging.method != "none" and self.merging.every > 1:
                own["before"] = parameter.detach().float().clone()
            if "low" not in own and self.redraws and self.merging.alpha:
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

    def use(self, shared: Tensor) -> None:
        """Takes its buffer off a longer one that all parts share: what lies in it has no meaning."""
        self.buffer = shared[: self.layout.size]
        pieces = self.buffer.split_with_sizes(self.sizes) if len(self.buffer) else []
        self.views = [piece.view(local(p).shape) for piece, p in zip(pieces, self.parameters, strict=False)]

    def by_parameter(self, at: Tensor, *beside: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
        """Places in order, and what goes with them, by the parameter's number; counted from each one's first."""
        counts = torch.searchsorted(at, self._edges).diff()
        inside = at - torch.repeat_interleave(self._edges[:-1], counts, output_size=len(at))
        sizes = counts.tolist()
        pieces = zip(*(each.split_with_sizes(sizes) for each in (inside, *beside)), strict=True)
        return [(number, piece) for number, piece in enumerate(pieces) if sizes[number]]

    # --- F of a step ------------------------------------------------------------------------------------------------

    def draw(self, what: str) -> Tensor:
        """Places that stay, each with probability `keep`."""
        key = f"{self.merging.seed}/{self.names[0]}/{what}"
        return self.layout.mine(positions(key, self.layout.whole, self.merging.keep, self.device))[0]

    def add_drawn(self, weights: list[Tensor]) -> None:
        """weights += OnDARE's F of the buffer."""
        if self.merging.keep >= 1:
            torch._foreach_add_(weights, self.views)
            return
        drawn = self.draw(f"step {self.group['steps']}")
        values = self.buffer.index_select(0, drawn)
        if self.merging.as_in == "code":
            values /= self.merging.keep
        for number, (at, found) in self.by_parameter(drawn, values):
            weights[number].view(-1).index_add_(0, at, found)

    def trim(self) -> None:
        """OnTIES's F of the buffer: what is smaller than its tensor's threshold becomes 0; what is as large stays."""
        if self.quantiles is None:
            return
        least = self.quantiles.of(self.buffer)
        below = torch.nextafter(least, torch.zeros_like(least)).tolist()
        for piece, limit in zip(self.views, below, strict=True):
            torch.hardshrink(piece, limit, out=piece)

    # --- tau --------------------------------------------------------------------------------------------------------

    def read_tau(self, tau: Callable[[str], Tensor] | None) -> None:
        """Takes each parameter's shard of it, and F of that where F is fixed."""
        if tau is None:
            raise ModelError("merging: there is no tau; give base and SFT, or set alpha to 0")
        flat = self.buffer
        trims = self.quantiles is not None
        for name, shard, piece in zip(self.names, self.layout.shards, flat.split_with_sizes(self.sizes), strict=True):
            whole = tau(name)
            if whole.numel() != shard.whole:
                raise ModelError(
                    f"{name}: base and SFT have {whole.numel()} numbers there, the policy has {shard.whole}; "
                    "give the models that the policy was made from"
                )
            if trims:
                stays = largest(whole.reshape(-1).abs(), self.merging.keep, f"{self.merging.seed}/{name}/ties")
                whole = torch.zeros(whole.numel()).index_copy_(0, stays, whole.reshape(-1)[stays].float().cpu())
            piece.copy_(shard.cut(whole))
        if self.redraws:
            self.tau = flat.clone()
        elif self.merging.method == "ondare":
            self.kept = self.draw("tau")
            self.tau = (flat[self.kept] / self.merging.keep).clamp_(-1, 1)
        else:
            self.kept = flat.nonzero()[:, 0]
            self.tau = flat[self.kept]

    def taught(self) -> tuple[Tensor, Tensor]:
        """Where OnDARE adds to the weights what SFT has taught, and alpha F(tau) there, float64."""
        at, tau = self.kept, self.tau
        if self.redraws and self.merging.alpha:
            at = self.draw(f"tau {self.group['steps']}")
            tau = tau.index_select(0, at)
        return at, tau.double().mul_(self.merging.alpha)

    def elect(self) -> tuple[Tensor, Tensor]:
        """OnTIES: where signs conflict, the smaller one becomes 0, in the buffer or in what SFT has taught.

        Returns:
            See `taught`.
        """
        a, b = self.buffer.index_select(0, self.kept).double(), self.tau.double()
        taught = self.merging.alpha * b
        mine, other = (a / (1 - self.merging.alpha), b) if self.merging.as_in == "code" else (a, taught)
        conflict, larger = mine * other < 0, mine.abs() >= other.abs()
        self.buffer.index_copy_(0, self.kept, a.masked_fill_(conflict & ~larger, 0).float())
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
