"""One process's share of an episode: its prompts sampled, scored and paired, each completion kept as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.engines.base import Engine
from align.core.engines.cache import CachedEngine
from align.core.errors import EngineError, RunError
from align.core.stage import Progress
from align.train.episodes import Prompts, episode_rows, samples_of
from align.train.online_settings import Config
from align.train.scoring import Gather, Scorer


@dataclass(frozen=True)
class Share:
    """What a process samples with, the engine apart.

    Attributes:
        seed: the step's.
        tokenizer: the policy's.
        work: a folder that survives a kill.
        rank: which of the processes this is, of `world`.
        gather: see `align.train.scoring.Gather`.
    """

    config: Config
    prompts: Prompts
    scorer: Scorer
    seed: int
    tokenizer: Any
    progress: Progress
    work: Path
    rank: int = 0
    world: int = 1
    gather: Gather = list

    def rows(self, engine: Engine, episode: int, policy_step: int) -> list[dict[str, Any]]:
        """The rows of an episode that are this process's, without reference log-probabilities.

        A kill costs what is scored and no completion: those that are there lie in a file, under keys that know nothing
        of the weights. So an episode has a file of its own; and its weights are on disk, so they are the same.

        Args:
            engine: of the policy.
            episode: its number, from 0.
            policy_step: the step whose weights the engine has.
        """
        config = self.config
        mine = self.prompts.of_episode(episode)[self.rank :: self.world]
        what = f"samples, episode {episode + 1}/{config.episodes}"
        self.progress.start(samples_of(config, len(mine)), what)
        kept = CachedEngine(engine, self._file(episode))
        try:
            found = episode_rows(
                kept, mine, self.scorer, config, self.seed, episode, self.tokenizer, self.progress, self.gather
            )
        finally:
            kept.file.close()
        self._check_errors(found)
        return [row | {"policy_step": policy_step} for row in found]

    def _check_errors(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """An engine that fails must not look like prompts without pairs. Errors are in no file, so are asked again.

        Raises:
            EngineError: more completions than `max_error_share` are errors.
        """
        every = [one for row in rows for one in zip(row["finish_reasons"], row["details"], strict=True)]
        errors = [detail for reason, detail in every if reason == "error"]
        if len(errors) > self.config.max_error_share * len(every):
            raise EngineError(
                f"{len(errors)} of {len(every)} completions of the episode could not be sampled, more than "
                f"max_error_share = {self.config.max_error_share:g}; the last: {errors[-1]}; mend the engine and run "
                "the same command again: what was sampled is kept"
            )

    def in_order(self, rows: Sequence[Mapping[str, Any]], episode: int) -> list[dict[str, Any]]:
        """The rows of all processes in the prompts' order, so that it is the same for any number of them.

        Raises:
            RunError: a prompt is missing, or there twice.
        """
        place = {row["prompt_id"]: number for number, row in enumerate(self.prompts.of_episode(episode))}
        if sorted(row["prompt_id"] for row in rows) != sorted(place):
            raise RunError(
                f"episode {episode + 1} has {len(rows)} rows for {len(place)} prompts; its processes shared them "
                f"otherwise than now; remove {self.work} and run it again"
            )
        return sorted((dict(row) for row in rows), key=lambda row: place[row["prompt_id"]])

    def forget(self, episode: int) -> None:
        """Removes the completions of an episode whose rows are written."""
        self._file(episode).unlink(missing_ok=True)

    def _file(self, episode: int) -> Path:
        return self.work / f"samples-{episode:03d}-{self.rank}-of-{self.world}"
