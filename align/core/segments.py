"""The flat layout: rows of tokens one behind the other in a single row, without padding, a shared prompt only once.

A row is a tree: a prompt and any number of branches (completions). The prompt's tokens see the prompt; a branch's
tokens see the prompt and their own branch. Every branch begins with the prompt's last token again, at its own place,
so that each position predicts one next token, also where the completions of a prompt begin differently.

    prompt a b c, completions d e and f   ->   ids         a b | c d | c     (the last token predicts nothing: left out)
                                               positions   0 1 | 2 3 | 2
                                               next        - - | d e | f

What follows from it: no position is computed for padding, none twice for a prompt, and the log-probabilities are those
of plain rows (tests/core/test_segments.py). Attention runs segment by segment: on a GPU in torch's kernel for rows of
unlike length, elsewhere through scaled_dot_product_attention. It is plugged into transformers' models as an attention
implementation of its own; `can_be_flat` tries a model on a toy batch, and one that doesn't give the same hidden states
(state-space layers, attention of its own) is fed padded rows by the same call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.core.chat import IGNORED

NAME = "align_segments"
"""Of the attention implementation, among transformers' ("sdpa", "eager", ...)."""


@dataclass(frozen=True, slots=True)
class Branch:
    """What follows a prompt, and what its tokens count in the loss.

    Attributes:
        ids: the completion's tokens.
        labels: the same, or `IGNORED` where a token's prediction isn't wanted; None: all are.
    """

    ids: Sequence[int]
    labels: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its branches, see above.

    Attributes:
        prompt: its tokens, at least one; nothing of it is predicted.
        branches: at least one.
    """

    prompt: Sequence[int]
    branches: Sequence[Branch]


@dataclass(frozen=True)
class Segments:
    """Which stretches of a flat row see what; travels through a model's forward as the argument `segments`.

    Attributes:
        spans: (start, end, prompt's start, prompt's end) of each stretch: its tokens see the prompt's stretch and, of
            their own, what is not behind them. A prompt itself has an empty one.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    _on_device: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def lengths(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For the kernel: cumulative lengths of queries and keys, (N+1,), places of the keys, and the longest."""
        if device not in self._on_device:
            queries = torch.tensor([end - start for start, end, _, _ in self.spans])
            before = torch.tensor([last - first for _, _, first, last in self.spans])
            places = torch.cat([torch.cat([torch.arange(f, t), torch.arange(s, e)]) for s, e, f, t in self.spans])
            sums = [F.pad(each.cumsum(0), (1, 0)).to(torch.int32).to(device) for each in (queries, queries + before)]
            longest = int(queries.max()), int((queries + before).max())
            self._on_device[device] = (*sums, places.to(device), *longest)
        found: tuple[Tensor, Tensor, Tensor, int, int] = self._on_device[device]
        return found


def collate(trees: Sequence[Tree], flat: bool, pad_id: int = 0) -> dict[str, Any]:
    """A batch as a model takes it, and which row each prediction belongs to.

    Args:
        trees: prompts with their branches.
        flat: one row without padding; or else a padded row for each branch, its prompt before it.
        pad_id: any token; padding is masked.

    Returns:
        `input_ids`, `position_ids` and `shift_labels`, (R, T), the label at a position being the *next* token's;
        `attention_mask`, (R, T), or in a flat batch `segments` and a mask that says nothing (a model makes none of its
        own then); and `branch`, (R, T): the number of the branch, over all trees, that a position belongs to, -1 where
        it belongs to none.
    """
    return _flat(trees) if flat else _padded(trees, pad_id)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward takes."""
    names = ("input_ids", "position_ids", "shift_labels", "segments", "attention_mask")
    return {name: batch[name] for name in names if name in batch}


def by_branch(values: Tensor, branch: Tensor, branches: int) -> Tensor:
    """Sums of values at positions, (R, T), by branch, (branches,)."""
    mine = branch >= 0
    return torch.zeros(branches, dtype=values.dtype, device=values.device).index_add(0, branch[mine], values[mine])


def _flat(trees: Sequence[Tree]) -> dict[str, Any]:
    ids: list[int] = []
    positions: list[int] = []
    following: list[int] = []
    owner: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    number = 0
    for tree in trees:
        single = len(tree.branches) == 1
        shared = 0 if single else len(tree.prompt) - 1
        begin = len(ids)
        if shared:
            ids += tree.prompt[:shared]
            positions += range(shared)
            following += [IGNORED] * shared
            owner += [-1] * shared
            spans.append((begin, begin + shared, begin, begin))
        for branch in tree.branches:
            labels = branch.ids if branch.labels is None else branch.labels
            own = [*tree.prompt[shared:], *branch.ids][:-1]
            silent = len(tree.prompt) - shared - 1
            at = len(ids)
            ids += own
            positions += range(shared, shared + len(own))
            following += [IGNORED] * silent
            following += labels
            owner += [number] * len(own)
            spans.append((at, at + len(own), begin, begin + shared))
            number += 1
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([following]),
        "segments": Segments(tuple(spans)),
        "attention_mask": torch.zeros(1, 1, 1, 1),
        "branch": torch.tensor([owner]),
    }


def _padded(trees: Sequence[Tree], pad_id: int) -> dict[str, Any]:
    rows = []
    for tree in trees:
        for branch in tree.branches:
            labels = branch.ids if branch.labels is None else branch.labels
            ids = [*tree.prompt, *branch.ids][:-1]
            rows.append((ids, [IGNORED] * (len(tree.prompt) - 1) + list(labels)))
    longest = max(len(ids) for ids, _ in rows)
    short = [longest - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([[*ids, *[pad_id] * n] for (ids, _), n in zip(rows, short, strict=True)]),
        "position_ids": torch.arange(longest).repeat(len(rows), 1),
        "shift_labels": torch.tensor([labels + [IGNORED] * n for (_, labels), n in zip(rows, short, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(rows, short, strict=True)]),
        "branch": torch.tensor(
            [[r] * len(ids) + [-1] * n for r, ((ids, _), n) in enumerate(zip(rows, short, strict=True))]
        ),
    }


# --- attention ----------------------------------------------------------------------------------------------------


def use_segments(model: Any) -> None:
    """Gives a transformers model (bare, or with adapters) the attention that understands `segments`.

    Calls without `segments` are answered by scaled_dot_product_attention as before.

    Raises:
        ValueError: its attention can't be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _bare(model).set_attn_implementation(NAME)


def can_be_flat(model: Any, precision: str = "fp32") -> bool:
    """Whether a causal language model gives flat rows the hidden states that it gives padded ones: tries a toy batch.

    Where it does, it has been given the attention of `use_segments`; where not, it is as it was.

    Args:
        precision: fp32, or bf16 for a computation in autocast.
    """
    bare = _bare(model)
    config = bare.config.get_text_config()
    before = bare.config._attn_implementation
    if before not in ("sdpa", NAME):
        return False
    if next(bare.parameters()).is_cuda and (precision != "bf16" or _varlen_kernel() is None):
        return (
            False  # segment by segment a GPU would wait for the next launch all the time: 2.1 times TRL's padded rows
        )
    most = max(2, min(config.vocab_size, 1000))
    toy = [Tree([1 % most, 2 % most, 3 % most], [Branch([5 % most, 7 % most]), Branch([2 % most] * 4)])]
    toy += [Tree([4 % most] * 5, [Branch([3 % most, 6 % most])])]
    training, device = bare.training, next(bare.parameters()).device
    bare.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            expected = _hidden(bare, collate(toy, flat=False), device)
            use_segments(bare)
            found = _hidden(bare, collate(toy, flat=True), device)
        alike = bool((found - expected).norm() <= (0.02 if precision == "bf16" else 1e-4) * expected.norm())
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError):
        alike = False
    finally:
        bare.train(training)
    if not alike and bare.config._attn_implementation != before:
        bare.set_attn_implementation(before)
    return alike


def _hidden(model: Any, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """Hidden states where something is predicted, branch by branch, (S, D)."""
    given = {name: value for name, value in model_inputs(batch).items() if name != "shift_labels"}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    states = model.base_model(**given, use_cache=False).last_hidden_state
    wanted = batch["shift_labels"] != IGNORED
    return states[wanted.to(device)].float()  # type: ignore[no-any-return]


def _bare(model: Any) -> Any:
    from accelerate.utils import is_peft_model

    return model.get_base_model() if is_peft_model(model) else model


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (1, H, T, D), key and value (1, H_kv, T, D); gives (1, T, H, D).

    Args:
        module: the layer's attention.
        query: see above.
        key: see above.
        value: see above.
        attention_mask: of plain rows; not looked at where there are segments.
        segments: of a flat row; None for plain rows.
        dropout: share of attention weights dropped.
        scaling: of the scores; 1/√D where not given.
        sliding_window: how many tokens back a token sees, itself among them; None: all.

    Raises:
        ValueError: the layer asks for something that it can't do in segments (attention sinks, soft capping).
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotary positions have made queries and keys float32
        low = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(low), key.to(low), value.to(low)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("segments: no soft capping, attention sinks or position bias")
    if getattr(module, "is_causal", True) is False:
        raise ValueError("segments: causal attention only")
    kernel = _varlen_kernel() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is not None and not dropout and query.shape[-1] <= 256:
        queries, keys, places, most_q, most_k = segments.lengths(query.device)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        key, value = key[0, :, places], value[0, :, places]
        grouped = {}
        if query.shape[1] != key.shape[0]:
            if "enable_gqa" in signature(kernel).parameters:
                grouped = {"enable_gqa": True}
            else:  # torch before 2.12 takes as many heads of keys as of queries
                each = query.shape[1] // key.shape[0]
                key, value = (heads.repeat_interleave(each, 0) for heads in (key, value))
        out = kernel(
            query[0].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), queries, keys, most_q, most_k,
            scale=scaling, window_size=window, **grouped,
        )  # fmt: skip
        return out[None], None
    parts = []
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    sizes = [end - start for start, end, _, _ in segments.spans]  # they follow each other and leave nothing out
    split = [torch.split(each, sizes, dim=2) for each in (query, key, value)]  # its gradient is one concatenation
    at = {start: number for number, (start, *_) in enumerate(segments.spans)}
    for number, (start, end, first, last) in enumerate(segments.spans):
        q, k, v = (each[number] for each in split)
        if first < last:
            k, v = (torch.cat([each[at[first]], own], dim=2) for each, own in zip(split[1:], (k, v), strict=True))
        plain = first == last and (sliding_window is None or end - start <= sliding_window)
        mask = None if plain else _seen(end - start, last - first, sliding_window, str(query.device))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=plain, dropout_p=dropout, scale=scaling, **grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


@cache
def _varlen_kernel() -> Any:
    """torch's attention over rows of unlike length, where this torch has it in the form that is called here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in signature(varlen_attn).parameters else None


def _seen(tokens: int, before: int, window: int | None, device: str) -> Tensor:
    """What each of some tokens sees of `before` tokens and of itself and its like, (tokens, before + tokens)."""
    size = 2 ** math.ceil(math.log2(before + tokens))  # few sizes, so that they are made once
    whole = _lower_right(size, window, device)
    # the last rows and columns of a causal matrix are one again
    return whole[size - tokens :, size - tokens - before :]


@lru_cache(maxsize=4)  # a long one is large
def _lower_right(size: int, window: int | None, device: str) -> Tensor:
    seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
