"""The load-balancing loss of mixture-of-experts models (arXiv:2101.03961, equations 4 to 6), beside any stage's loss.

    E · Σ_e f_e · P_e        f_e: tokens sent to expert e over all tokens;  P_e: mean probability that it got

both over all layers, tokens and the k experts of a token, so that it is k where every expert gets the same.

It is read off the routers themselves by hooks: no head and no output of the model need to know of it.

A global batch is split, and the loss is a product of two means. Of the two only P has a gradient: with f of the whole
global batch, counted beforehand in passes without gradient, the loss is a sum over micro batches and the same however
they are cut. That is balance over the global batch (arXiv:2501.11873), and `counts` and `sent` are for it. Without
`sent`, f is that of the micro batch: each of them is then asked to be balanced for itself, which is stricter, and the
gradient depends on the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from align.core.engines.decoder import bare_model
from align.core.errors import ModelError


class RouterLoss:
    """Reads the routers of one model while it is watched.

    Args:
        model: a transformers model, or a wrapper of one (peft, distributed).
        weight: of the loss; None for the coefficient in the model's config, 0 for none.

    Attributes:
        weight: what the loss counts; 0.0 where there is none.
        last: the loss of the last micro batch, unweighted; None before the first.

    Raises:
        ModelError: a weight was given, and the model has no experts.
    """

    def __init__(self, model: Any, weight: float | None) -> None:
        bare = bare_model(model)
        config = bare.config.get_text_config()
        for each in (bare.config, config):
            if getattr(each, "output_router_logits", False):
                each.output_router_logits = False  # or the model would add a loss of its own
        routers = _routers(bare)
        if weight and not routers:
            raise ModelError(
                f"router_loss_weight: {weight}, but {type(bare).__name__} has no experts whose load could be balanced; "
                "leave the setting out"
            )
        own = getattr(config, "router_aux_loss_coef", None) or 0.0
        self.weight = float((own if weight is None else weight) if routers else 0.0)
        self.last: float | None = None
        self._top_k = int(getattr(config, "num_experts_per_tok", None) or 1)
        self._logits: list[Tensor] = []
        self._watched = False
        if self.weight:
            for router, index in routers:
                router.register_forward_hook(self._hook(index))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward pass whose loss is wanted; the passes that checkpointing repeats are not seen."""
        self._logits, self._watched = [], bool(self.weight)
        try:
            yield
        finally:
            self._watched = False

    def counts(self, mask: Tensor | None = None) -> Tensor:
        """Of the pass that was watched: tokens sent to each expert, and last the tokens, over all layers; (E + 1,).

        Args:
            mask: see `term`.
        """
        logits, self._logits = self._logits, []
        sent, _, tokens = _sums(logits, self._top_k, mask)
        return torch.cat([sent, tokens[None]]).detach()

    def term(self, share: float = 1.0, mask: Tensor | None = None, sent: Tensor | None = None) -> Tensor | float:
        """Weight times loss times share of the pass that was watched; 0.0 where the loss is off.

        Args:
            share: how much of the step this micro batch is; over a step of one process the shares sum to 1. With
                `sent` they are shares of tokens, else as a rule one over the number of micro batches.
            mask: which tokens count, (B, T) bool; all of them where not given (rows without padding).
            sent: f of the global batch, (E,): `counts` summed over it, the experts' divided by the tokens.
        """
        if not self.weight or not self._logits:
            return 0.0
        logits, self._logits = self._logits, []
        loss = balance_loss(logits, self._top_k, mask, sent)
        self.last = loss.item()
        return self.weight * share * loss

    def _hook(self, index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._watched:
                logits = output[index] if isinstance(output, tuple) else output
                self._logits.append(logits.reshape(-1, logits.shape[-1]))

        return hook


def balance_loss(logits: list[Tensor], top_k: int, mask: Tensor | None = None, sent: Tensor | None = None) -> Tensor:
    """The loss of one pass, unweighted; see the module.

    Args:
        logits: of each layer's router, (tokens, experts).
        top_k: experts that a token is sent to.
        mask: which tokens count, of as many elements; all where not given.
        sent: f; that of this pass where not given.
    """
    counts, probability, tokens = _sums(logits, top_k, mask)
    f = counts / tokens if sent is None else sent.to(probability)
    return len(f) * (f * probability / tokens).sum()


def _sums(logits: list[Tensor], top_k: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Over tokens and layers: tokens sent to each expert (E,), their probabilities (E,), the number of tokens ()."""
    sent = probability = logits[0].new_zeros(logits[0].shape[-1], dtype=torch.float32)
    tokens = sent.new_tensor(float(len(logits[0]))) if mask is None else mask.sum().to(sent)
    for layer in logits:
        probs = layer.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, -1).indices, 1.0)
        if mask is not None:
            counts = mask.reshape(-1, 1).to(probs)
            probs, chosen = probs * counts, chosen * counts
        sent, probability = sent + chosen.sum(0), probability + probs.sum(0)
    return sent, probability, len(logits) * tokens


def _routers(model: Any) -> list[tuple[Any, int]]:
    """Each layer's router, and the place of its logits in what it gives, as transformers' models say themselves."""
    found: dict[int, tuple[Any, int]] = {}
    for owner in model.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits") or []
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            within = recorder.layer_name or ""
            for name, module in owner.named_modules():
                if isinstance(module, recorder.target_class) and within in name:
                    found[id(module)] = (module, int(recorder.index))
    return list(found.values())
