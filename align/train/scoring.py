"""How good are the policy's completions, and which of them make a pair: verifiers, the reward model, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.core.engines.base import Completion
from align.core.records import Row, Verdict
from align.train.online_settings import Config
from reward.pairs import Pair, Scored, make_pairs
from reward.scoring import item_of
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


class Scorer:
    """Scores completions by verifier or reward model, and makes the pair of each prompt.

    Args:
        config: `scorer`, `verify`, `min_margin`.
        verifiers: started by the caller.
        reward_model: a `reward.members.Judge`; needed unless the scorer is verifier.
        tokenizer: the policy's.
    """

    def __init__(self, config: Config, verifiers: Verifiers, reward_model: Any, tokenizer: Any) -> None:
        self.config, self.verifiers, self.reward_model = config, verifiers, reward_model
        # Sampled ids are scored as they are where the reward model reads the same ids; else its own template is used.
        self.same_ids = reward_model is not None and reward_model.reads_ids_of(tokenizer)

    @staticmethod
    def decidable(row: Row) -> bool:
        """Whether a program can say which completions of a prompt are right."""
        return row["task"] in VERIFIERS and row["reference"] is not None

    def who(self, row: Row) -> str:
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
            group.scorer = self.who(group.row)
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
            else item_of(group.row["prompt"], [{"role": "assistant", "content": c.text}], group.row.get("tools"))
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

    def pair(self, group: Group, seed: str) -> tuple[list[Pair], str]:
        """The prompt's pairs, and what became of it: `paired`, or why it has none."""
        if not group.scorer:
            return [], "no_scorer"
        pairs, counts = make_pairs(group.scored, min_margin=self.config.min_margin, seed=seed)
        outcome: str = next(reason for reason in counts if not reason.startswith("dropped_"))
        if pairs and group.scorer == "reward_model":
            rewards = [group.scored[pairs[0].chosen].reward, group.scored[pairs[0].rejected].reward]
            if self.reward_model.judge_group(group.family, rewards) is None:
                return [], "abstained"
        return pairs, outcome
