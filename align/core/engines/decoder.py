"""What the slot loop needs of a model: rows that are added, fed one token at a time, and taken out."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """Runs a model over a list of rows; one decoder serves one call of `sample`.

    Each distinct prompt is computed once, however many samples it gets.
    """

    refills: bool
    """Whether rows may be added while others run; otherwise only when there are none."""

    pads: bool
    """Whether prompts of different lengths may be prefilled together."""

    def fits(self, rows: int, length: int) -> bool:
        """Whether so many rows of so many tokens fit the memory that this engine may use."""
        ...

    def admit(self, prompts: list[list[int]], copies: list[int]) -> Tensor:
        """Adds `copies[i]` rows for `prompts[i]`, in order; gives the logits after each prompt, (P, V)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds one token to each row, (B,); gives the logits of the next, (B, V)."""
        ...

    def alone(self, ids: list[int]) -> Tensor:
        """The logits after a text, (V,), computed from the start with nothing beside it; the rows stay as they are."""
        ...

    def drop(self, finished: list[int]) -> list[int]:
        """Takes rows out. Returns what is left in its new order: row i was row `order[i]`."""
        ...


def memory_budget(device: torch.device) -> int:
    """Bytes that a cache of keys and values may take: half of a GPU's free memory, a quarter of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def bare_model(model: Any) -> Any:
    """The transformers model inside a peft or accelerate wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
