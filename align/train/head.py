"""The language-model head for predicted positions alone, on flat and on padded rows (see align/core/segments.py).

A model is called with `shift_labels` and `fused_lm_head=True`, as TRL's own head is, and gives log-probabilities of the
labels; on a CPU TRL's computes every position, which at a vocabulary of 32,000 is ten times the work (measured: 9.2 s a
step against 0.7 s). `score_labelled_only` puts a forward in its place that gives the same numbers.
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

from align.core.chat import IGNORED
from align.core.memory import CHUNK_ELEMENTS  # more logits are computed in parts, and again in the backward pass

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
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or shift_labels is None:
            more = {} if shift_labels is None else {"shift_labels": shift_labels}
            return trl_forward(*args, **kwargs, **more)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        mask = shift_labels != IGNORED  # (B, T)
        head = self.get_output_embeddings()
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        states, wanted = torch.split(hidden[mask], rows), torch.split(shift_labels[mask], rows)  # (S, D), (S,)
        if len(states) == 1:
            parts = [_score(head, softcap, states[0], wanted[0])]
        else:
            parts = [
                checkpoint(_score, head, softcap, *pair, use_reentrant=False)
                for pair in zip(states, wanted, strict=True)
            ]
        # masked_scatter keeps the graph connected where no position is supervised.
        log_probs = hidden.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(parts))
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=mask)

    base.forward = MethodType(forward, base)
    return True


def _score(head: Any, softcap: float | None, states: Tensor, wanted: Tensor) -> Tensor:
    """Log-probability of each wanted token, (S,), float32."""
    logits = head(states).float()  # (S, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, wanted, reduction="none")
