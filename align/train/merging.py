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
merged as one Delta; so is what is left where a training ends, or an episode of online DPO. Otherwise decay is AdamW's,
outside of what is merged.

For each group of parameters up to 2**24 numbers, all by a few operations on one flat buffer:

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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from align.core.memory import MERGED_AT_ONCE
from align.train.merging_parts import Part, gradient, local


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
    since its length is the shard's own: a run that goes on begins it at 0.) Groups count their `steps` and `merges`,
    and have the step of the last one (`merged`). Tau and its mask are in no checkpoint: they are the same again.

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
        counts = {"steps": 0, "merges": 0, "merged": 0}
        super().__init__(named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | counts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; tau's term goes to all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        merging = self.merging
        for group in self.param_groups:
            group["steps"] += 1
            if merging.method != "none" and group["lr"] > 0 and group["steps"] % merging.every == 0:
                _count_merge(group)
        for part in self._all_parts():
            part.begin(self.state)
            group = part.group
            merges = group["merged"] == group["steps"]
            if merges and merging.every == 1:
                self._merge_step(part)
            else:
                self._adamw(part, part.weights(), group["lr"], group["weight_decay"])
                if merges:
                    self._merge_gathered(part)
            part.round_to_model()
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Merges what has gathered since the last merge, if anything has.

        For the end of a training that `every` doesn't divide, and wherever its weights are judged or used.
        """
        if self.merging.method == "none" or self.merging.every == 1:
            return
        left = [group for group in self.param_groups if group["merged"] < group["steps"]]
        for group in left:
            _count_merge(group)
        for part in self._all_parts() if left else []:
            if any(part.group is group for group in left):
                part.begin(self.state)
                self._merge_gathered(part)
                part.round_to_model()

    @property
    def merges(self) -> int:
        """How often tau was added; what was undone by loading an earlier state doesn't count."""
        return max(int(group["merges"]) for group in self.param_groups)

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
        part.buffer.zero_()  # a decay of 1 / lr would do it in passing, but leave a NaN, and for good
        self._adamw(part, part.views, group["lr"] * (1 - self.merging.alpha), 0.0)
        if group["weight_decay"]:
            torch._foreach_mul_([weights[number] for number in part.moving()], 1 - group["lr"] * group["weight_decay"])
        self._merge(part, weights)

    def _merge_gathered(self, part: Part) -> None:
        """What AdamW has done since the last merge is taken back, and merged as one Delta."""
        weights, before = part.weights(), part.states("before")
        torch._foreach_copy_(part.views, weights)
        torch._foreach_sub_(part.views, before)
        part.buffer.mul_(1 - self.merging.alpha)
        torch._foreach_copy_(weights, before)
        self._merge(part, weights)
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

    def _merge(self, part: Part, weights: list[Tensor]) -> None:
        """weights += the merged step, where (1 - alpha) Delta lies in the buffer."""
        merging = self.merging
        if merging.method == "ondare":
            part.add_drawn(weights)
            at, taught = part.taught()
        else:
            part.trim()
            at, taught = part.elect()
            torch._foreach_add_(weights, part.views)
        if len(at):
            part.add_exactly(weights, at, taught)

    def _all_parts(self) -> list[Part]:
        """Made at the first step."""
        if not self._parts:
            before = 0
            for number, group in enumerate(self.param_groups):
                names = group.get("param_names") or [str(before + i) for i in range(len(group["params"]))]
                before += len(names)
                named: list[tuple[str, Tensor]] = []
                for name, parameter in zip(names, group["params"], strict=True):
                    if named and sum(p.numel() for _, p in named) + parameter.numel() > MERGED_AT_ONCE:
                        self._parts.append(Part(named, number, group, self.merging))
                        named = []
                    named.append((name, parameter))
                if named:
                    self._parts.append(Part(named, number, group, self.merging))
            most = max(part.layout.size for part in self._parts)
            shared = torch.zeros(most if self.merging.method != "none" else 0, device=self._parts[0].device)
            for part in self._parts:
                part.use(shared)
                if self.merging.method != "none" and self.merging.alpha:
                    part.read_tau(self._tau)
        return self._parts


def _count_merge(group: dict[str, Any]) -> None:
    """The merge after the step that the group is at."""
    group["merges"] += 1
    group["merged"] = group["steps"]
