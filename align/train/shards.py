"""Where the numbers of whole parameters lie in one process's shards, and random places in the whole ones.

What is drawn is drawn of the whole parameters, so that it doesn't depend on how they are sharded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Shard:
    """Which stretch of a whole parameter, flattened, this process holds.

    Attributes:
        start: its first place.
        size: how many numbers there are.
        whole: numbers of the whole parameter.
        group: the processes that hold the others; None where there are none.
    """

    start: int
    size: int
    whole: int
    group: Any = None

    @staticmethod
    def of(parameter: Tensor) -> Shard:
        """From a plain tensor, or one that `fully_shard` has cut along its first dimension.

        Raises:
            RecipeError: it is cut along another dimension, or twice.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        if not isinstance(parameter, DTensor):
            return Shard(0, parameter.numel(), parameter.numel())
        cuts = [number for number, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        if not cuts:
            return Shard(0, parameter.numel(), parameter.numel())
        if len(cuts) > 1 or not parameter.placements[cuts[0]].is_shard(0):
            raise RecipeError(
                "merging: takes parameters that are cut once, along their first dimension (fully_shard); "
                f"these lie {parameter.placements}: shard them by FSDP alone, or set merging to none"
            )
        shape, offset = place(parameter.shape, parameter.device_mesh, parameter.placements)
        start = offset[0] * math.prod(parameter.shape[1:]) if math.prod(shape) else 0
        return Shard(start, math.prod(shape), parameter.numel(), parameter.device_mesh.get_group(cuts[0]))

    def cut(self, whole: Tensor) -> Tensor:
        """This shard of a whole tensor, flat."""
        return whole.reshape(-1)[self.start : self.start + self.size]


class Layout:
    """Several parameters, one behind the other: the whole ones, and this process's shards of them.

    Attributes:
        whole: numbers of the whole ones together.
        size: numbers of the shards together.
        group: see `Shard`.
    """

    def __init__(self, shards: Sequence[Shard], device: Any) -> None:
        self.shards = shards
        self.whole, self.size = sum(shard.whole for shard in shards), sum(shard.size for shard in shards)
        self.group = next((shard.group for shard in shards if shard.group is not None), None)
        ends = torch.tensor([shard.whole for shard in shards]).cumsum(0)
        starts = ends - torch.tensor([shard.whole for shard in shards])
        self._ends = ends.to(device)
        self._first = (starts + torch.tensor([shard.start for shard in shards])).to(device)
        sizes = torch.tensor([shard.size for shard in shards])
        self._sizes, self._places = sizes.to(device), (sizes.cumsum(0) - sizes).to(device)

    def mine(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Of places in the whole parameters, those in this process's shards, as places in these; and which they are."""
        if self.group is None:
            return found, torch.ones_like(found, dtype=torch.bool)
        which = torch.searchsorted(self._ends, found, right=True)
        inside = found - self._first[which]
        here = (inside >= 0) & (inside < self._sizes[which])
        return (inside + self._places[which])[here], here


def generator(key: str, device: Any) -> torch.Generator:
    """Random numbers that depend on a text alone (and on the kind of device)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def positions(key: str, size: int, keep: float, device: Any) -> Tensor:
    """Each place below `size` with probability `keep`, in order, (K,); the same for the same key.

    Drawn as gaps, which are geometric, so that it costs keep * size and not size.
    """
    if keep >= 1:
        return torch.arange(size, device=device)
    random = generator(key, device)
    few = int(size * keep + 6 * math.sqrt(size * keep) + 16)  # enough in all but one of a billion draws
    found = torch.full((1,), -1, device=device)
    while int(found[-1]) < size:
        even = torch.rand(few, device=device, generator=random)
        gaps = even.clamp_(min=1e-9).log_().mul_(1 / math.log1p(-keep)).ceil_().clamp_(min=1)
        found = torch.cat([found, gaps.long().cumsum_(0).add_(found[-1])])
    return found[1 : int(torch.searchsorted(found, size))]


def largest(magnitudes: Tensor, keep: float, key: str) -> Tensor:
    """Places of the share `keep` of largest magnitude, at least one; of equal ones those that a text's numbers draw.

    Exact, unlike `Quantiles`, and slower: for what is asked once. Differences of bf16 weights are a few numbers only,
    so that many are equal.

    Args:
        magnitudes: flat.
        keep: the share.
        key: see `generator`.
    """
    most = max(1, round(keep * len(magnitudes)))
    values = magnitudes.float().cpu()
    least = float(np.partition(values.numpy(), len(values) - most)[len(values) - most])
    above, equal = (values > least).nonzero()[:, 0], (values == least).nonzero()[:, 0]
    order = torch.randperm(len(equal), generator=generator(key, "cpu"))
    return torch.cat([above, equal[order[: most - len(above)]]])


class Quantiles:
    """The magnitude that a share of each parameter's numbers reaches, over all its shards.

    Of a large parameter, that of a sample of places, drawn once; of a small one, of all.

    Args:
        names: of the parameters.
        layout: of the same.
        keep: the share.
        least: numbers of a sample that are expected to reach it: the share is met to about 1 / sqrt(least).
        seed: of the samples.
    """

    def __init__(
        self, names: Sequence[str], layout: Layout, keep: float, seed: int, device: Any, least: int = 40
    ) -> None:
        most = max(4096, math.ceil(least / keep))
        sizes = [min(shard.whole, most) for shard in layout.shards]
        starts = [0]
        for shard in layout.shards:
            starts.append(starts[-1] + shard.whole)
        self.keep, self.group, self.device = keep, layout.group, device
        self.blocks: list[tuple[list[int], int]] = []  # parameters of one sample size, and that size
        places = []
        for size in sorted(set(sizes)):
            members = [number for number, own in enumerate(sizes) if own == size]
            self.blocks.append((members, size))
            for number in members:
                whole = layout.shards[number].whole
                random = generator(f"{seed}/{names[number]}/sample", device)
                drawn = torch.randint(whole, (size,), generator=random, device=device).sort().values
                places.append(starts[number] + (drawn if whole > most else torch.arange(size, device=device)))
        self.places, self.here = layout.mine(torch.cat(places))

    def of(self, values: Tensor) -> Tensor:
        """One number a parameter, (P,); `values` are those of the shards, flat."""
        sample = values.index_select(0, self.places).abs_()
        if self.group is not None:
            whole = sample.new_zeros(len(self.here))
            whole[self.here] = sample
            # The others have 0 there; of a parameter that isn't cut all have the same.
            torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MAX, group=self.group)
            sample = whole
        found = sample.new_empty(sum(len(members) for members, _ in self.blocks))
        start = 0
        for members, size in self.blocks:
            rows = sample[start : start + len(members) * size].view(len(members), size)
            start += rows.numel()
            kept = max(1, round(self.keep * size))
            found[members] = rows.topk(kept, dim=1, sorted=False).values.amin(1)
        return found
