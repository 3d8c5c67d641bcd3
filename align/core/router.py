"""The load-balancing loss of mixture-of-experts models (arXiv:2101.03961, equations 4 to 6), beside any stage's loss.

    E · Σ_e f_e · P_e        f_e: tokens sent to expert e over all tokens;  P_e: mean probability that the router gave it

both over all layers, tokens and the k experts of a token, so that it is k where every expert gets the same.

It is read off the routers themselves by hooks: no head and no output of the model need to know of it.

Differs from the paper: nothing, but a global batch is split, and the loss is a product of two means. It is computed on
each micro batch and averaged with the share that this has of the step, as everywhere in the field. So it is the one
term that depends on how a global batch is split: small micro batches are asked to be balanced each for itself, which
is stricter than balance over the global batch (arXiv:2501.11873 measures what that costs). Set the weight to 0 where a
gradient must not depend on the split.
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

    def term(self, share: float = 1.0, mask: Tensor | None = None) -> Tensor | float:
        """Weight times loss times share of the pass that was watched; 0.0 where the loss is off.

        Args:
            share: how much of the step this micro batch is; over a step of one process the shares sum to 1.
            mask: which tokens count, (B, T) bool; all of them where not given (rows without padding).
        """
        if not self.weight or not self._logits:
            return 0.0
        logits, self._logits = self._logits, []
        loss = balance_loss(logits, self._top_k, mask)
        self.last = loss.item()
        return self.weight * share * loss

    def _hook(self, index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._watched:
                logits = output[index] if isinstance(output, tuple) else output
                self._logits.append(logits.reshape(-1, logits.shape[-1]))

        return hook


def balance_loss(logits: list[Tensor], top_k: int, mask: Tensor | None = None) -> Tensor:
    """The loss of one pass, unweighted; see the module.

    Args:
        logits: of each layer's router, (tokens, experts).
        top_k: experts that a token is sent to.
        mask: which tokens count, of as many elements; all where not given.
    """
    experts = logits[0].shape[-1]
    sent, probability = logits[0].new_zeros(experts, dtype=torch.float32), torch.zeros(())
    tokens = float(len(logits) * len(logits[0])) if mask is None else len(logits) * mask.sum().float()
    for layer in logits:
        probs = layer.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, -1).indices, 1.0)
        if mask is not None:
            counts = mask.reshape(-1, 1).to(probs)
            probs, chosen = probs * counts, chosen * counts
        sent = sent + chosen.sum(0)
        probability = probability.to(probs) + probs.sum(0)
    return experts * (sent / tokens * probability / tokens).sum()


def _routers(model: Any) -> list[tuple[Any, int]]:
    """The router of each layer, and the place of its logits in what it gives, as transformers' models say themselves."""
    found: dict[int, tuple[Any, int]] = {}
    for owner in model.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            target = getattr(recorder, "target_class", None)
            within = getattr(recorder, "layer_name", None) or ""
            for name, module in owner.named_modules() if target else ():
                if isinstance(module, target) and within in name:
                    found[id(module)] = (module, int(getattr(recorder, "index", 0)))
    return list(found.values())
