"""What changes logits before a token is drawn: the repetition penalty, and the form that was asked for."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from align.core.engines.base import SamplingParams
from align.core.engines.structured import Form


class Shaping:
    """Keeps, for each slot, what its sample has said so far, as far as that bears on its next token.

    Args:
        params: repetition_penalty, json_schema and choices are read.
        form: made from the last two; None where neither is set.
        slots: how many samples are in flight at most.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, form: Form | None, slots: int, device: Any) -> None:
        self.penalty, self.form, self.slots, self.device = params.repetition_penalty, form, slots, device
        self.seen: torch.Tensor | None = None  # (slots, V), made when V is known
        self.begun: list[tuple[int, list[int]]] = []
        self.states: list[Any] = [None] * slots
        self.problems = [""] * slots

    def begin(self, slot: int, prompt: list[int]) -> None:
        """A new sample in a slot."""
        if self.penalty != 1:
            self.begun.append((slot, prompt))
        if self.form is not None:
            self.states[slot] = self.form.begin()
            self.problems[slot] = ""

    def shaped(self, slots: NDArray[Any], logits: torch.Tensor) -> torch.Tensor:
        """The logits to draw from, (B, V); those given stay as they are."""
        if self.penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros(self.slots, logits.shape[-1], dtype=torch.bool, device=self.device)
            for slot, prompt in self.begun:
                self.seen[slot] = False
                self.seen[slot, prompt] = True
            self.begun.clear()
            punished = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen[torch.from_numpy(slots)], punished, logits)
        if self.form is not None:
            allowed = self.form.allowed([self.states[slot] for slot in slots])
            logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
        return logits

    def accept(self, slots: NDArray[Any], tokens: torch.Tensor) -> None:
        """Takes in what was drawn, (B,)."""
        if self.seen is not None:
            self.seen[torch.from_numpy(slots), tokens] = True
        if self.form is not None:
            for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
                self.problems[slot] = self.problems[slot] or self.form.accept(self.states[slot], token)
