"""The decoder for every causal language model that transformers runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from align.core.engines.decoder import bare_model, memory_budget
from align.core.errors import EngineError


class GenericDecoder:
    """Any causal language model through its own forward and cache, prompts padded on the left.

    Rows are added only when there are none; finished rows leave the cache once they are a quarter of it.
    """

    refills = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        # Recurrent layers would read the padding.
        self.pads = not getattr(bare_model(model), "_is_stateful", False)
        self.takes = set(inspect.signature(bare_model(model).forward).parameters)
        self.cache: Any = None
        self.mask = self.index = torch.empty(0, dtype=torch.long, device=device)
        config = bare_model(model).config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
        self.token_bytes: int = 2 * kept * model.get_input_embeddings().weight.element_size()
        self.budget = memory_budget(device) // 2  # the cache grows by copying

    def fits(self, rows: int, length: int) -> bool:
        """See `Decoder`."""
        return rows * length * self.token_bytes <= self.budget

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """See `Decoder`."""
        longest = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        self.cache = None
        logits = self._forward(ids, (self.mask.cumsum(-1) - 1).clamp_min(0))
        source = torch.arange(len(prompts), device=self.device).repeat_interleave(
            torch.tensor(copies, device=self.device)
        )
        self._select(source)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        ids = torch.zeros(len(self.mask), dtype=torch.long, device=self.device)
        ids[self.index] = tokens
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), -1)
        return self._forward(ids[:, None], self.mask.sum(-1, keepdim=True) - 1)[self.index]

    def alone(self, ids: list[int]) -> Tensor:
        """See `Decoder`."""
        row = torch.tensor([ids], device=self.device)
        logits: Tensor = self._run(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1]
        return logits

    def drop(self, finished: list[int]) -> list[int]:
        """See `Decoder`."""
        gone = set(finished)
        order = [row for row in range(len(self.index)) if row not in gone]
        self.index = self.index[order]
        if 0 < len(order) < 0.75 * len(self.mask):
            self._select(self.index)
        return order

    def _select(self, rows: Tensor) -> None:
        """Keeps these rows of the cache (they may repeat); from then on row i lies at i."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.index = torch.arange(len(rows), device=self.device)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits at the last position; ids (B, T), the cache grows by T."""
        out = self._run(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": positions} if "position_ids" in self.takes else {}),
        )
        self.cache = getattr(out, "past_key_values", None)
        if not hasattr(self.cache, "reorder_cache"):
            kind = type(bare_model(self.model)).__name__
            raise EngineError(f"{kind}: it keeps its state in a form this engine can't share between samples; use vLLM")
        logits: Tensor = out.logits[:, -1]
        return logits

    def _run(self, **inputs: Any) -> Any:
        # The balancing loss of experts, which a trained config may ask for, cannot be had over a cache.
        more = {"logits_to_keep": 1, "output_router_logits": False}
        training = self.model.training
        self.model.eval()  # a live policy may be in training mode: no dropout while it samples
        try:
            return self.model(**inputs, **{name: value for name, value in more.items() if name in self.takes})
        finally:
            self.model.train(training)
