"""A function in several gloo ranks (forks of this process), and the gradient of a training's first step.

So the gradient of one global batch can be compared however it is split: over micro batches, accumulation and ranks.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl  # noqa: F401 (once here, and not in every fork)
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.optim.optimizer import register_optimizer_step_pre_hook


class _EnoughError(Exception):
    """The first step's gradient has been seen."""


def in_ranks(function: Callable[[], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What `function` gives in each of some processes that torch.distributed has joined, in the order of the ranks.

    Args:
        function: any, closures too; what it gives goes through pickle. Accelerate finds the ranks by itself.
        folder: for what they give and say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _rank(function, folder, rank, ranks, port)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    said = "\n".join((folder / f"rank-{rank}.out").read_text()[-3000:] for rank in range(ranks))
    assert not any(statuses), said
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _rank(function: Callable[[], Any], folder: Path, rank: int, ranks: int, port: int) -> None:
    status = 1
    try:
        said = os.open(folder / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        for state in (AcceleratorState, PartialState, GradientState):  # what the tests before this one have left
            state._reset_state()
        given = function()
        (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(given))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def first_gradient(run: Callable[[], Any]) -> list[torch.Tensor]:
    """The gradient with which a training takes its first optimizer step, by parameter; there the training is stopped.

    Args:
        run: trains, with max_grad_norm=0 (else the gradient is the clipped one).
    """
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        raise _EnoughError

    hook = register_optimizer_step_pre_hook(look)
    try:
        run()
    except _EnoughError:
        pass
    finally:
        hook.remove()
    assert seen, "the training took no step"
    return seen


def assert_same_gradient(ours: list[torch.Tensor], theirs: list[torch.Tensor], relative: float = 1e-6) -> None:
    """Both as vectors: their difference is at most `relative` of their length."""
    mine, other = (torch.cat([g.double().flatten() for g in gradient]) for gradient in (ours, theirs))
    assert mine.shape == other.shape
    apart = float((mine - other).norm() / other.norm())
    assert apart <= relative, f"the gradients are {apart:.2g} of their length apart"
