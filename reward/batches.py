"""Rewards of many completions in few passes of a model, with or without gradient.

The completions of a prompt are branches behind it (`align.core.segments`): the prompt is computed once, nothing is
padded, and training, scoring and every device share this code. A model that can't read such rows is given padded ones,
each completion behind its own prompt; the rewards are the same (tests/reward/test_batches.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.chat import IGNORED
from align.core.segments import Branch, Tree, by_branch, can_be_flat, collate, model_inputs
from reward.loading import Head

Encoded = tuple[list[int], list[int]]
"""Token ids of prompt and completion, and labels: the completion's ids at its places, IGNORED elsewhere."""

BATCH_TOKENS = 16_384
LOGITS_AT_ONCE = 2**27
"""Bounds of a batch when scoring: tokens, and (log-prob head) logits, half a gigabyte of float32."""

_tried: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Rewards(torch.nn.Module):
    """A model under its head: from a batch of `reward_batch` to rewards. A module, so that processes can share it."""

    def __init__(self, model: Any, head: Head, coef: float) -> None:
        super().__init__()
        self.model, self.head, self.coef = model, head, coef

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Rewards, (B,), float32, in the order of the branches; logits only where a token is predicted."""
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        given = model_inputs(batch)
        targets, branch = given.pop("shift_labels"), batch["branch"]
        count = int(branch.max()) + 1
        if self.head == "logprob":
            wanted = targets != IGNORED
            columns = wanted.any(dim=0).nonzero()[:, 0]
            logits = self.model(**given, use_cache=False, logits_to_keep=columns).logits[wanted[:, columns]]
            logps = -F.cross_entropy(logits.float(), targets[wanted], reduction="none")
            return self.coef * by_branch(logps, branch[wanted], count)
        bare = _bare(self.model)
        ends = (branch >= 0) & (branch != F.pad(branch[:, 1:], (0, 1), value=-1))
        hidden = bare.base_model(**given, use_cache=False).last_hidden_state[ends]
        return _in_float32(bare.score, hidden)[:, 0]


def batch_rewards(model: Any, head: Head, coef: float, encoded: Sequence[Encoded]) -> Tensor:
    """Rewards of encoded completions, (B,), float32, in their order."""
    batch, order = reward_batch(model, head, encoded)
    return in_order(Rewards(model, head, coef)(batch), order)


def reward_batch(
    model: Any, head: Head, encoded: Sequence[Encoded], prompts: Sequence[Sequence[int]] | None = None
) -> tuple[dict[str, Any], list[int]]:
    """What `Rewards` takes, and the places in `encoded` of its branches.

    A scalar head is read at a completion's last token, so a token that nobody reads stands behind it: rows end before
    the last one.

    Args:
        model: decides whether rows are flat.
        head: see above.
        encoded: completions with their prompts.
        prompts: the places of each prompt's completions; by default those whose prompts are equal are together.
    """
    prompts = prompts or _places_by_prompt(encoded)
    trees = []
    for places in prompts:
        start = _start(encoded[places[0]])
        branches = []
        for place in places:
            ids, labels = encoded[place][0][start:], encoded[place][1][start:]
            branches.append(Branch([*ids, ids[-1]], [*labels, IGNORED]) if head == "scalar" else Branch(ids, labels))
        trees.append(Tree(encoded[places[0]][0][:start], branches))
    pad_id = _bare(model).config.get_text_config().pad_token_id
    return collate(trees, reads_flat(model), pad_id or 0), [place for places in prompts for place in places]


def in_order(rewards: Tensor, order: Sequence[int]) -> Tensor:
    """Rewards of branches, (B,), put at the places that `reward_batch` gave."""
    return torch.zeros_like(rewards).index_copy(0, torch.tensor(order, device=rewards.device), rewards)


def batches_to_score(model: Any, head: Head, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
    """Places of the completions of each batch: like lengths together, and a prompt's completions."""
    flat = reads_flat(model)
    logits = LOGITS_AT_ONCE // _bare(model).config.get_text_config().vocab_size
    prompts = _places_by_prompt(encoded) if flat else [[place] for place in range(len(encoded))]
    sizes = [_size(encoded, places) for places in prompts]
    batch: list[int] = []
    tokens = predicted = 0
    for number in sorted(range(len(prompts)), key=lambda n: sizes[n]):
        more, new = sizes[number]
        tokens, predicted = tokens + more, predicted + new
        if not flat:  # every row is as long as the longest, which comes last
            tokens = predicted = (len(batch) + 1) * more
        if batch and (tokens > BATCH_TOKENS or (head == "logprob" and predicted > logits)):
            yield batch
            batch, tokens, predicted = [], more, new
        batch = batch + prompts[number]
    if batch:
        yield batch


def reads_flat(model: Any) -> bool:
    """Whether a model reads flat rows; tried once, in bfloat16 on a GPU, where rows have a kernel of their own."""
    bare = _bare(model)
    if bare not in _tried:
        weight = next(bare.parameters())
        whole = weight.dtype == torch.float32 and not weight.is_cuda
        _tried[bare] = can_be_flat(bare, "fp32" if whole else "bf16")
    return _tried[bare]


def _in_float32(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """What a head makes of hidden states, (B, 1): near 5 bfloat16 tells rewards apart that differ by 0.03, no closer.

    The head may be kept in bfloat16, or be peft's wrapper of one that is trained beside adapters.
    """
    weights = {name: weight.float() for name, weight in head.named_parameters()}
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = torch.func.functional_call(head, weights, (hidden.float(),))
    return found


def _bare(model: Any) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _places_by_prompt(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Places of the completions that have the same ids before their first label."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(encoded):
        prompts.setdefault(tuple(one[0][: _start(one)]), []).append(place)
    return list(prompts.values())


def _start(one: Encoded) -> int:
    """Where the completion begins; a sequence without labels is all prompt but for its last token."""
    return next((at for at, label in enumerate(one[1]) if label != IGNORED), len(one[0]) - 1)


def _size(encoded: Sequence[Encoded], places: Sequence[int]) -> tuple[int, int]:
    """Tokens of a prompt and its completions, and how many are predicted."""
    start = _start(encoded[places[0]])
    own = [len(encoded[place][0]) - start for place in places]
    return start + sum(own), sum(own)
