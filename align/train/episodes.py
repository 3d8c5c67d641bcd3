"""One episode of online DPO: prompts chosen, completions sampled, scored, and the best set against the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, SamplingParams
from align.core.errors import DataError
from align.core.records import Row
from align.core.stage import Progress
from align.core.store import Table
from align.train.online_settings import Config
from align.train.scoring import Group, Scorer


def sample(
    engine: Any, rows: Sequence[Row], n: int, params: SamplingParams, tokenizer: Any, progress: Progress | None = None
) -> list[Group]:
    """n completions of each prompt."""
    groups = [Group(row, prompt_ids(tokenizer, row["prompt"])) for row in rows]
    add_samples(engine, groups, n, params, progress)
    return groups


def add_samples(
    engine: Any, groups: Sequence[Group], n: int, params: SamplingParams, progress: Progress | None = None
) -> None:
    """n further completions of each group's prompt."""
    first = len(groups[0].completions) if groups else 0
    found: dict[tuple[int, int], Completion] = {}
    for number, index, completion in engine.sample([group.prompt_ids for group in groups], n, params, first):
        found[number, index] = completion
        if progress is not None:
            progress.advance()
    for number, group in enumerate(groups):
        group.completions += [found[number, index] for index in range(first, first + n)]


def episode_rows(
    engine: Any,
    rows: Sequence[Row],
    scorer: Scorer,
    config: Config,
    seed: int,
    episode: int,
    tokenizer: Any,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Samples, scores and pairs; one row a prompt, as the episode's file keeps it, whether it gave a pair or not."""
    params = sampling(config, seed + episode)
    groups = sample(engine, rows, config.samples_per_prompt, params, tokenizer, progress)
    scorer.score(groups)
    if config.resample:
        again = [group for group in groups if group.scorer and not scorer.accepted(group)]
        add_samples(engine, again, config.resample, params, progress)
        scorer.score(again)
    found = []
    for group in groups:
        chosen, rejected, margin, outcome = scorer.pair(group, f"{seed}/{episode}/{group.row['prompt_id']}")
        ids = [list(c.token_ids) for c in group.completions]
        length = len(group.prompt_ids) + max(len(ids[chosen]), len(ids[rejected]))
        if outcome == "paired" and length > config.max_length:
            if config.too_long == "error":
                raise DataError(
                    f"prompt {group.row['prompt_id']}: its pair has {length} tokens, max_length is "
                    f"{config.max_length}; raise it, lower max_tokens, or drop such pairs with too_long=drop"
                )
            outcome = "too_long"
        paired = outcome == "paired"
        found.append(
            {
                "episode": episode,
                "prompt_id": group.row["prompt_id"],
                "family": group.family,
                "prompt_ids": group.prompt_ids,
                "completion_ids": ids,
                "rewards": [one.reward for one in group.scored],
                "scorer": group.scorer,
                "outcome": outcome,
                "chosen_ids": ids[chosen] if paired else None,
                "rejected_ids": ids[rejected] if paired else None,
                "margin": margin if paired else None,
            }
        )
    return found


def sampling(config: Config, seed: int, temperature: float | None = None) -> SamplingParams:
    """The parameters of an episode's samples."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature if temperature is None else temperature,
        top_p=config.top_p,
        seed=seed % 2**31,
        logprobs=True,
    )


def yields(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many prompts gave a pair, and why the others gave none."""
    return Counter(row["outcome"] for row in rows)


class Prompts:
    """Which prompts an episode takes: the train split's in a shuffled order, from the start again when all were used.

    The probe, on which the guards look after each episode, are prompts of the dev split; where there are none, some of
    the train split that are then never trained on.
    """

    def __init__(self, table: Table, config: Config, seed: int) -> None:
        splits = np.array([row["split"] for row in table.rows(["split"])], dtype=object)
        rng = np.random.default_rng(seed)
        train = rng.permutation(np.flatnonzero(splits == "train"))
        dev = rng.permutation(np.flatnonzero(splits == "dev"))
        self.probe_split = "dev" if len(dev) else "train"
        if not len(dev):
            aside = min(config.probe_prompts, len(train) // 10)
            dev, train = train[:aside], train[aside:]
        if not len(train):
            raise DataError(f"{table.name}: no prompt of the train split to sample from")
        self.table, self.train, self.probes = table, train, dev[: config.probe_prompts]
        self.size = min(config.prompts_per_episode, len(train))

    def of_episode(self, episode: int) -> list[Row]:
        """The rows of one episode."""
        places = np.arange(episode * self.size, (episode + 1) * self.size) % len(self.train)
        return self._rows(self.train[places])

    def of_probe(self) -> list[Row]:
        """The rows that the guards look at."""
        return self._rows(self.probes)

    def _rows(self, numbers: Any) -> list[Row]:
        place = {int(number): place for place, number in enumerate(numbers)}
        found: dict[int, Row] = {}
        for number, row in enumerate(islice(self.table.rows(), max(place, default=-1) + 1)):
            if number in place:
                found[place[number]] = row
        return [found[i] for i in range(len(place))]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """An episode's file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema()), part)
    part.rename(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an episode's file."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def _schema() -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "episode": pa.int32(),
            "policy_step": pa.int64(),
            "prompt_id": pa.string(),
            "family": pa.string(),
            "prompt_ids": ids,
            "completion_ids": pa.list_(ids),
            "rewards": pa.list_(pa.float64()),
            "scorer": pa.string(),
            "outcome": pa.string(),
            "chosen_ids": ids,
            "rejected_ids": ids,
            "margin": pa.float64(),
            "ref_chosen_logps": pa.float32(),
            "ref_rejected_logps": pa.float32(),
        }
    )
