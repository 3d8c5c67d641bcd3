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
    return [_row_of(group, scorer, config, seed, episode) for group in groups]


def _row_of(group: Group, scorer: Scorer, config: Config, seed: int, episode: int) -> dict[str, Any]:
    """A prompt's row of the episode's file; its pairs still lack reference log-probabilities."""
    pairs, outcome = scorer.pair(group, f"{seed}/{episode}/{group.row['prompt_id']}")
    ids = [list(c.token_ids) for c in group.completions]
    lengths = [len(group.prompt_ids) + max(len(ids[pair.chosen]), len(ids[pair.rejected])) for pair in pairs]
    fitting = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= config.max_length]
    if len(fitting) < len(pairs) and config.too_long == "error":
        raise DataError(
            f"prompt {group.row['prompt_id']}: its pair has {max(lengths)} tokens, max_length is "
            f"{config.max_length}; raise it, lower max_tokens, or drop such pairs with too_long=drop"
        )
    return {
        "episode": episode,
        "prompt_id": group.row["prompt_id"],
        "family": group.family,
        "prompt_ids": group.prompt_ids,
        "completion_ids": ids,
        "finish_reasons": [c.finish_reason for c in group.completions],
        "sampler_logps": [None if c.logprobs is None else sum(c.logprobs) for c in group.completions],
        "verdicts": [one.verdict for one in group.scored],
        "rewards": [one.reward for one in group.scored],
        "scorer": group.scorer,
        "outcome": "too_long" if pairs and not fitting else outcome,
        "pairs": [{"chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin} for pair in fitting],
    }


_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of an episode's rows as the trainer takes them, in the rows' order and a row's own order.

    Each has `prompt_ids`, `chosen_ids`, `rejected_ids`, and the reference's log-probabilities where they are known.
    """
    found = []
    for row in rows:
        for pair in row["pairs"]:
            ids = {f"{side}_ids": row["completion_ids"][pair[side]] for side in ("chosen", "rejected")}
            known = {name: pair[name] for name in _REFERENCE if pair.get(name) is not None}
            found.append({"prompt_ids": row["prompt_ids"]} | ids | known)
    return found


def set_reference(rows: Sequence[Mapping[str, Any]], logps: Any) -> None:
    """Writes the reference's log-probabilities, (N, 2), nats, into the pairs of the rows, in the order of `pairs_of`."""
    every = [pair for row in rows for pair in row["pairs"]]
    for pair, both in zip(every, logps.tolist(), strict=True):
        pair.update(zip(_REFERENCE, both, strict=True))


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
    """The columns of an episode's file: a row is a prompt, its lists have a place for each completion.

    policy_step: the step whose weights sampled it.
    sampler_logps: summed log-probability of a completion under the sampler, nats; null where it gave none.
    verdicts: of a verifier, where one spoke.
    scores: what each part of the scorer gave; null where it was not asked, or could not say.
    penalties: what length and a missing end cost it.
    rewards: what pairing saw, penalties taken off; null for an error.
    became: what pairing made of each completion, see `reward.pairs.fates`.
    scorer: the parts that scored, joined by +; outcome: paired, or why there is no pair.
    pairs: places of the chosen and the rejected, and the reference's log-probabilities of both.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    parts = [(part, pa.float64()) for part in ("verifier", "reward_model", "judge")]
    pair = [("chosen", pa.int32()), ("rejected", pa.int32()), ("margin", pa.float64())]
    return pa.schema(
        {
            "episode": pa.int32(),
            "policy_step": pa.int64(),
            "prompt_id": pa.string(),
            "family": pa.string(),
            "prompt_ids": ids,
            "completion_ids": pa.list_(ids),
            "finish_reasons": pa.list_(pa.string()),
            "sampler_logps": pa.list_(pa.float64()),
            "verdicts": pa.list_(pa.string()),
            "scores": pa.list_(pa.struct(parts)),
            "penalties": pa.list_(pa.float64()),
            "rewards": pa.list_(pa.float64()),
            "became": pa.list_(pa.string()),
            "scorer": pa.string(),
            "outcome": pa.string(),
            "pairs": pa.list_(pa.struct([*pair, *((name, pa.float32()) for name in _REFERENCE)])),
        }
    )
