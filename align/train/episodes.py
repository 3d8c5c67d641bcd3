"""One episode of online DPO: prompts chosen, completions sampled, scored, and the best set against the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, SamplingParams
from align.core.errors import DataError
from align.core.records import Row, Verdict
from align.core.stage import Progress
from align.core.store import Table
from align.train.online_settings import Config
from reward.pairs import Scored, make_pairs
from reward.verifiers import VERIFIERS, Verifiers


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        row: of the prompts.
        prompt_ids: what the policy reads.
        completions: as sampled.
        scored: as pairing sees them, in the same order.
        scorer: verifier or reward_model.
    """

    row: Row
    prompt_ids: list[int]
    completions: list[Completion] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    scorer: str = ""

    @property
    def family(self) -> str:
        """What scores are reported by."""
        return str(self.row["family"] or self.row["task"] or "")


class Judge:
    """Scores completions by verifier or reward model, and makes the pair of each prompt.

    Args:
        config: `scorer`, `verify`, `min_margin`.
        verifiers: started by the caller.
        reward_model: of `reward.model`; needed unless the scorer is verifier.
        tokenizer: the policy's.
    """

    def __init__(self, config: Config, verifiers: Verifiers, reward_model: Any, tokenizer: Any) -> None:
        self.config, self.verifiers, self.reward_model = config, verifiers, reward_model
        # Sampled ids are scored as they are where the reward model reads the same ids; else its own template is used.
        self.same_ids = reward_model is not None and _reads_alike(reward_model.tokenizer, tokenizer)

    @staticmethod
    def decidable(row: Row) -> bool:
        """Whether a program can say which completions of a prompt are right."""
        return row["task"] in VERIFIERS and row["reference"] is not None

    def scorer(self, row: Row) -> str:
        """Who scores a prompt's completions: verifier, reward_model, or nobody (an empty text)."""
        decidable = self.decidable(row)
        if self.config.scorer == "reward_model":
            return "reward_model"
        if self.config.scorer == "verifier":
            return "verifier" if decidable else ""
        return "verifier" if decidable and row["task"] in self.config.verified_tasks else "reward_model"

    def score(self, groups: Sequence[Group]) -> None:
        """Fills in `scored` and `scorer`."""
        for group in groups:
            group.scorer = self.scorer(group.row)
        by_verifier = [group for group in groups if group.scorer == "verifier"]
        for group, verdicts in zip(by_verifier, self.verdicts(by_verifier), strict=True):
            group.scored = [
                Scored(c.text, verdict.reward, verdict.verdict, truncated=c.finish_reason == "length")
                for c, verdict in zip(group.completions, verdicts, strict=True)
            ]
        by_model = [group for group in groups if group.scorer == "reward_model"]
        for group, rewards in zip(by_model, self.rewards(by_model), strict=True):
            group.scored = [
                Scored(c.text, reward, truncated=c.finish_reason == "length")
                for c, reward in zip(group.completions, rewards, strict=True)
            ]

    def verdicts(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """A verdict for each completion; one that was cut off has failed."""
        asked = [
            (group.row["task"], c.text, group.row["reference"], group.row["prompt"][-1]["content"])
            for group in groups
            for c in group.completions
            if c.finish_reason == "stop"
        ]
        found = self.verifiers.verify_many(asked)
        apart = {"length": Verdict.of(False, "truncated"), "error": Verdict.error("not sampled")}
        return [
            [next(found) if c.finish_reason == "stop" else apart[c.finish_reason] for c in group.completions]
            for group in groups
        ]

    def rewards(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """The reward model's score of each completion; None where nothing was sampled."""
        items = [
            (group.prompt_ids, c.token_ids)
            if self.same_ids
            else (group.row["prompt"], [{"role": "assistant", "content": c.text}])
            for group in groups
            for c in group.completions
            if c.finish_reason != "error" and c.token_ids
        ]
        found = iter(self.reward_model.score_many(items) if items else [])
        return [
            [next(found) if c.finish_reason != "error" and c.token_ids else None for c in group.completions]
            for group in groups
        ]

    def accepted(self, group: Group) -> bool:
        """Whether some completion of the group is believed to be right."""
        if group.scorer == "verifier":
            return any(one.verdict == "passed" for one in group.scored)
        rewards = [one.reward for one in group.scored if one.reward is not None and not one.truncated]
        return bool(rewards and self.reward_model.accepts(group.family, max(rewards)))

    def pair(self, group: Group, seed: str) -> tuple[int, int, float, str]:
        """Places of the chosen and the rejected, their margin, and what became of the prompt (`paired`, or why not)."""
        if not group.scorer:
            return -1, -1, 0.0, "no_scorer"
        pairs, counts = make_pairs(group.scored, min_margin=self.config.min_margin, seed=seed)
        outcome: str = next(reason for reason in counts if not reason.startswith("dropped_"))
        if pairs and group.scorer == "reward_model":
            rewards = [group.scored[pairs[0].chosen].reward, group.scored[pairs[0].rejected].reward]
            if self.reward_model.judge_group(group.family, rewards) is None:
                return -1, -1, 0.0, "abstained"
        if not pairs:
            return -1, -1, 0.0, outcome
        return pairs[0].chosen, pairs[0].rejected, pairs[0].margin, "paired"


def _reads_alike(one: Any, other: Any) -> bool:
    return bool(one.chat_template == other.chat_template and one.get_vocab() == other.get_vocab())


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
    judge: Judge,
    config: Config,
    seed: int,
    episode: int,
    tokenizer: Any,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Samples, scores and pairs; one row a prompt, as the episode's file keeps it, whether it gave a pair or not."""
    params = sampling(config, seed + episode)
    groups = sample(engine, rows, config.samples_per_prompt, params, tokenizer, progress)
    judge.score(groups)
    if config.resample:
        again = [group for group in groups if group.scorer and not judge.accepted(group)]
        add_samples(engine, again, config.resample, params, progress)
        judge.score(again)
    found = []
    for group in groups:
        chosen, rejected, margin, outcome = judge.pair(group, f"{seed}/{episode}/{group.row['prompt_id']}")
        ids = [list(c.token_ids) for c in group.completions]
        if (
            outcome == "paired"
            and len(group.prompt_ids) + max(len(ids[chosen]), len(ids[rejected])) > config.max_length
        ):
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
