"""One episode of online DPO: prompts chosen, completions sampled, scored, and paired.

    sample n completions of each prompt (of more prompts n/2, and the rest of those whose rewards vary most)
    score them, and sample again where none is believed to be right
    make one reward of what each part of the scorer gave, less penalties
    pair; drop pairs that are too long

Which prompts, which samples and which pairs depends on the seed, the episode and the weights alone: a run that was
killed makes the same episode again, and processes that share the prompts make the same one together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from statistics import pvariance
from typing import Any

import numpy as np

from align.core.chat import row_prompt_ids
from align.core.engines.base import Completion, SamplingParams
from align.core.errors import DataError
from align.core.records import Row
from align.core.stage import Progress
from align.core.store import Table
from align.core.text import stable_hash
from align.train.grading import grade
from align.train.online_settings import PARTS, Config
from align.train.scoring import Gather, Group, Scorer
from reward.pairs import fates


def sample(
    engine: Any, rows: Sequence[Row], n: int, params: SamplingParams, tokenizer: Any, progress: Progress | None = None
) -> list[Group]:
    """n completions of each prompt."""
    groups = [Group(row, row_prompt_ids(tokenizer, row)) for row in rows]
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
    gather: Gather = list,
) -> list[dict[str, Any]]:
    """Samples, scores and pairs; one row a prompt, as the episode's file keeps it, whether it gave a pair or not.

    Args:
        rows: the prompts, or this process's share of them.
        gather: see `align.train.scoring.Gather`.
    """
    params = sampling(config, seed + episode)
    n, most = config.samples_per_prompt, config.samples_per_prompt + config.resample
    first = n // 2 if config.choose_from > 1 else n
    groups = sample(engine, rows, first, params, tokenizer, progress)
    scorer.score(groups)
    taken = groups
    if config.choose_from > 1:
        grade(groups, config, gather)
        taken = most_varied(groups, config.choose_from, f"{seed}/{episode}", gather)
        add_samples(engine, taken, n - first, params, progress)
        scorer.score(taken)
    if config.resample:
        again = [group for group in taken if group.scores and not scorer.accepted(group)]
        add_samples(engine, again, most - n, params, progress)
        scorer.score(again)
    grade(groups, config, gather)  # all, so that one scale holds for the file
    among = {id(group) for group in taken}
    return [_row_of(group, scorer, config, seed, episode, id(group) in among) for group in groups]


def most_varied(groups: Sequence[Group], choose_from: int, seed: str, gather: Gather = list) -> list[Group]:
    """The groups whose rewards vary most, one of `choose_from`; their order stays.

    Rewards of a verifier and of a reward model have different scales. So prompts compete with those alone that the
    same parts scored, and each such kind keeps its share of the episode. Equal variances are decided by the seed.
    """
    mine = [(group.scorer, -_variance(group), stable_hash(f"{seed}/{group.row['prompt_id']}", 16)) for group in groups]
    every = gather(mine)
    kinds = Counter(scorer for scorer, _, _ in every if scorer)
    chosen = set()
    for kind, count in _shares(kinds, max(1, len(every) // choose_from)).items():
        chosen.update(sorted(one for one in every if one[0] == kind)[:count])
    return [group for group, one in zip(groups, mine, strict=True) if one in chosen]


def _variance(group: Group) -> float:
    """Of the rewards as pairing sees them, errors apart; 0 where there are fewer than two."""
    rewards = [one.net for one in group.scored if one.net is not None]
    return pvariance(rewards) if len(rewards) > 1 else 0.0


def _shares(counts: Counter[str], total: int) -> dict[str, int]:
    """A total shared out in proportion to the counts, by largest remainders; at most the counts themselves."""
    every = counts.total()
    total = min(total, every)
    shares = {kind: count * total // every for kind, count in counts.items()}
    by_remainder = sorted(counts, key=lambda kind: (-(counts[kind] * total % every), kind))
    for kind in by_remainder[: total - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _row_of(group: Group, scorer: Scorer, config: Config, seed: int, episode: int, taken: bool) -> dict[str, Any]:
    """A prompt's row of the episode's file; its pairs still lack reference log-probabilities."""
    pairs, outcome = scorer.pair(group, f"{seed}/{episode}/{group.row['prompt_id']}") if taken else ([], "not_taken")
    ids = [list(c.token_ids) for c in group.completions]
    lengths = [len(group.prompt_ids) + max(len(ids[pair.chosen]), len(ids[pair.rejected])) for pair in pairs]
    fitting = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= config.max_length]
    if len(fitting) < len(pairs) and config.too_long == "error":
        raise DataError(
            f"prompt {group.row['prompt_id']}: its pair has {max(lengths)} tokens, max_length is "
            f"{config.max_length}; raise it, lower max_tokens, or drop such pairs with too_long=drop"
        )
    said = group.verdicts.get("verifier")
    told = [[verdict.detail for verdict in verdicts] for verdicts in group.verdicts.values()]
    told.append([c.error for c in group.completions])
    return {
        "episode": episode,
        "prompt_id": group.row["prompt_id"],
        "family": group.family,
        "prompt_ids": group.prompt_ids,
        "completion_ids": ids,
        "finish_reasons": [c.finish_reason for c in group.completions],
        "sampler_logps": [None if c.logprobs is None else sum(c.logprobs) for c in group.completions],
        "verdicts": [None] * len(ids) if said is None else [verdict.verdict for verdict in said],
        "details": ["; ".join(filter(None, each)) for each in zip(*told, strict=True)],
        "scores": [
            {part: group.scores[part][place] for part in PARTS if part in group.scores} for place in range(len(ids))
        ],
        "penalties": [one.penalty for one in group.scored],
        "rewards": [one.net for one in group.scored],
        "became": fates(group.scored, fitting) if taken and group.scores else [outcome] * len(ids),
        "scorer": group.scorer,
        "outcome": "too_long" if pairs and not fitting else outcome,
        "pairs": [{"chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin} for pair in fitting],
    }


def sampling(config: Config, seed: int, temperature: float | None = None) -> SamplingParams:
    """The parameters of an episode's samples."""
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature if temperature is None else temperature,
        top_p=config.top_p,
        seed=seed % 2**31,
        logprobs=True,
    )


def samples_of(config: Config, prompts: int) -> int:
    """Completions that an episode draws of so many prompts, what is sampled again apart."""
    n = config.samples_per_prompt
    first = n // 2 if config.choose_from > 1 else n
    return prompts * first + prompts // config.choose_from * (n - first)


class Prompts:
    """Which prompts an episode looks at: the train split's, shuffled, and from the start again when all were used.

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
        # Of a small split fewer are taken, and not fewer looked at for each.
        self.size = min(config.prompts_per_episode, max(1, len(train) // config.choose_from))
        self.looked_at = min(self.size * config.choose_from, len(train))

    def of_episode(self, episode: int) -> list[Row]:
        """The rows of one episode; where some are chosen from them, all that are looked at."""
        places = np.arange(episode * self.looked_at, (episode + 1) * self.looked_at) % len(self.train)
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
