"""The language-model head for predicted positions alone, on flat and on padded rows (see align/core/segments.py).

TRL's trainers call the model with `labels` and `fused_lm_head=True` and get log-probabilities of the labels; on a CPU
its head computes every position, which at a vocabulary of 32,000 is ten times the work (measured: 9.2 s a step against
0.7 s). `score_labelled_only` puts a forward in its place that gives the same output.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

CHUNK_ELEMENTS = 2**26
"""Logits held at a time: 256 MiB in fp32. More are computed in parts, and again in the backward pass."""

# Architectures that scale their logits: TRL's own head knows them all.
_LEFT_TO_TRL = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def score_labelled_only(model: Any) -> bool:
    """Replaces the fused forward that TRL put on a causal language model; gives whether it did.

    Call it after TRL's trainer was made. A call without `fused_lm_head` reaches the model's own forward as before.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    config = base.config.get_text_config()
    if any(hasattr(config, name) for name in _LEFT_TO_TRL):
        return False
    softcap = getattr(config, "final_logit_softcapping", None)
    trl_forward = base.forward

    @functools.wraps(type(base).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or (labels is None and shift_labels is None):
            given = {"labels": labels, "shift_labels": shift_labels}
            return trl_forward(*args, **kwargs, **{name: each for name, each in given.items() if each is not None})
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        else:
            targets = shift_labels
        mask = targets != -100  # (B, T)
        head = self.get_output_embeddings()
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        states, wanted = torch.split(hidden[mask], rows), torch.split(targets[mask], rows)  # (S, D), (S,)
        figures = shift_labels is None  # TRL's own loss looks at them
        if len(states) == 1:
            parts = [_score(head, softcap, figures, states[0], wanted[0])]
        else:
            parts = [
                checkpoint(_score, head, softcap, figures, *pair, use_reentrant=False)
                for pair in zip(states, wanted, strict=True)
            ]
        # masked_scatter keeps the graph connected where no position is supervised.
        log_probs, *more = (
            hidden.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(part))
            for part in zip(*parts, strict=True)
        )
        entropy, mean_logits, top1 = more or (None, None, None)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=None if top1 is None else top1.bool(),
            label_mask=mask,
        )

    base.forward = MethodType(forward, base)
    return True


def _score(head: Any, softcap: float | None, figures: bool, states: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
    """Log-probability of each wanted token; of its distribution the entropy, the mean logit, whether it is the top."""
    logits = head(states).float()  # (S, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if not figures:
        return (-F.cross_entropy(logits, wanted, reduction="none"),)
    log_probs = F.log_softmax(logits, dim=-1)
    picked = log_probs.gather(1, wanted[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        top1 = (log_probs.argmax(-1) == wanted).to(picked.dtype)
    return picked, entropy, logits.detach().mean(-1), top1
