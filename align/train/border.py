"""Where an online run stands, on disk, so that a killed one goes on and an episode can be undone.

    border.json       written between two episodes: what is behind, and after which step the weights are
    step-000012.pt    weights and optimizer after a step: the border's, and the newest one since

The JSON is written last, in one rename, and only then is removed what it doesn't name: so at every moment there is a
border whose weights are there too. A state of a later step belongs to the episode that is under way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from align.core.writer import replace_file


class Borders:
    """The files of one run.

    Args:
        folder: they lie there; it survives a kill.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._border = folder / "border.json"

    def read(self) -> dict[str, Any] | None:
        """The last border, as it was given to `write`; None before the first one."""
        if not self._border.exists():
            return None
        found: dict[str, Any] = json.loads(self._border.read_text(encoding="utf-8"))
        return found

    def write(self, border: Mapping[str, Any]) -> None:
        """A new border.

        Args:
            border: anything that JSON holds; `weights` is a step whose state was kept, and is all that stays.
        """
        replace_file(self._border, json.dumps(border) + "\n")
        self._remove_all_but(border["weights"])

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the state after a step, whole or not at all; of those since the border it replaces the others."""
        file = self.file(step)
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(dict(state), part)
        part.replace(file)
        border = self.read()
        self._remove_all_but(step, step if border is None else border["weights"])

    def state(self, step: int) -> dict[str, Any]:
        """The state that `keep` was given."""
        found: dict[str, Any] = torch.load(self.file(step), weights_only=True, map_location="cpu")
        return found

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """The weights of a state alone, read as they are used."""
        found: dict[str, torch.Tensor] = torch.load(self.file(step), weights_only=True, map_location="cpu", mmap=True)[
            "weights"
        ]
        return found

    def newest(self) -> int:
        """The last step whose state is there: the border's, or one of the episode that was under way."""
        return max(int(path.stem.split("-")[1]) for path in self.folder.glob("step-*.pt"))

    def file(self, step: int) -> Path:
        """Where a step's state is."""
        return self.folder / f"step-{step:06d}.pt"

    def _remove_all_but(self, *steps: int) -> None:
        stay = {self.file(step) for step in steps}
        for path in self.folder.glob("step-*"):
            if path not in stay:
                path.unlink()


def load_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into a model's parameters, in place; those that aren't named stay as they are."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
