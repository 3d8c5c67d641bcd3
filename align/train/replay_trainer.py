"""The online trainer on episodes that are written already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from align.core.errors import RunError
from align.core.stage import Tools
from align.train.episode_file import read_rows
from align.train.online_settings import Config
from align.train.online_trainer import OnlineDPO
from align.train.preference import SAME


class Replay(OnlineDPO):
    """Rows come from files, and what was undone stays undone.

    Args:
        episodes: the folder of the files.
        recorded: what became of each episode, from the run's summary.
        anew: whether the reference's log-probabilities are computed, and not taken from the file.
    """

    def __init__(
        self,
        settings: Config,
        tools: Tools,
        episodes: Path,
        recorded: Sequence[Mapping[str, Any]],
        anew: bool,
        reference: Any,
        **trl: Any,
    ) -> None:
        super().__init__(settings, tools, None, reference, **trl)
        self.files, self.recorded, self.anew = episodes, recorded, anew

    def rows_of(self, episode: int) -> list[dict[str, Any]]:
        """An episode's rows; none of one that was rolled back."""
        if self.recorded[episode]["rolled_back"]:
            return []
        return read_rows(self.files / f"episode-{episode:03d}.parquet")

    def _rows(self) -> list[dict[str, Any]]:
        found = self.rows_of(self.episode)
        if self.anew:
            self._set_reference(found)
        return found

    def _check_margins(self, logps: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """The file's log-probabilities may be of another precision than the policy's here."""
        if self.anew:
            super()._check_margins(logps, reference, tokens)
            return
        apart = ((logps - reference).abs() / tokens).max().item()
        if not apart <= SAME["bf16"]:
            raise RunError(
                f"the policy's log-probabilities differ by {apart:.2g} nats a token from those that the run wrote for "
                "the same model; the episodes are of another model, or their files were changed: give the run's policy "
                "and reference as they were"
            )

    def _look_at_start(self) -> None:
        """Nothing is looked at."""

    def _objections(self, chosen_change: float) -> list[str]:
        """As they were."""
        return list(self.recorded[self.episode]["rolled_back"])
