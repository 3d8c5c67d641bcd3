"""What is looked at after each episode, and when it is rolled back.

The score that is being optimised can rise while quality falls: so held-out prompts are answered, and verified by
program where they have a task, by family (a policy that refuses everything looks well on the harmful ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from align.core.records import Row
from align.train.episodes import sample, sampling
from align.train.online_settings import Config
from align.train.scoring import Scorer

DRAWN = 64
"""Probe prompts that are sampled from twice, for length, KL and the sampler's gap."""


@dataclass(frozen=True)
class Probe:
    """The policy on held-out prompts, at one moment.

    Attributes:
        score: share of greedy answers that verify, in percent; None where no probe prompt has a task.
        families: the same by family.
        reward: the reward model's mean score of them; None without one.
        length: mean tokens of a sample at the episode's temperature.
        kl: mean of log policy - log reference over samples, nats a completion (an estimate from below 0 is noise).
        gap: mean distance of the sampler's and the trainer's log-probability of one sample, nats a token.
    """

    score: float | None
    families: dict[str, float]
    reward: float | None
    length: float
    kl: float
    gap: float

    def figures(self) -> dict[str, float]:
        """Flat, for the curves."""
        found = {f"heldout/{name}": value for name, value in asdict(self).items() if isinstance(value, float)}
        return found | {f"heldout/score/{family}": score for family, score in self.families.items()}


def look(
    engine: Any, trainer: Any, reference: Any, rows: Sequence[Row], scorer: Scorer, config: Config, seed: int
) -> Probe:
    """Answers the probe's prompts greedily, and some of them by two samples each."""
    tokenizer = trainer.processing_class
    greedy = sample(engine, rows, 1, sampling(config, seed, temperature=0.0), tokenizer)
    verifiable = [group for group in greedy if scorer.decidable(group.row)]
    by_family: dict[str, list[float]] = {}
    for group, verdicts in zip(verifiable, scorer.verdicts(verifiable), strict=True):
        by_family.setdefault(group.family, []).append(100.0 * (verdicts[0].verdict == "passed"))
    every = [passed for family in by_family.values() for passed in family]
    rewards = [r[0] for r in scorer.rewards(greedy) if r[0] is not None] if scorer.reward_model is not None else []

    drawn = sample(engine, rows[:DRAWN], 2, sampling(config, seed), tokenizer)
    pairs, sampled, tokens = [], [], []
    for group in drawn:
        if all(c.token_ids for c in group.completions):
            first, second = group.completions
            ids = {"chosen_ids": list(first.token_ids), "rejected_ids": list(second.token_ids)}
            pairs.append(ids | {"prompt_ids": group.prompt_ids})
            sampled.append([sum(c.logprobs or ()) for c in group.completions])
            tokens.append([len(c.token_ids) for c in group.completions])
    if not pairs:
        return Probe(None, {}, None, 0.0, 0.0, 0.0)
    policy = trainer.policy_logps(pairs)  # (N, 2)
    return Probe(
        score=float(np.mean(every)) if every else None,
        families={family: float(np.mean(passed)) for family, passed in sorted(by_family.items())},
        reward=float(np.mean(rewards)) if rewards else None,
        length=float(np.mean(tokens)),
        kl=float(np.mean(policy - trainer.reference_logps(pairs, reference))),
        gap=float(np.mean(np.abs(policy - np.array(sampled)) / np.array(tokens))),
    )


def objections(config: Config, kept: Sequence[Probe], now: Probe, chosen_change: float) -> list[str]:
    """Why an episode should be rolled back; none where it may stay.

    Args:
        kept: the probes of the start and of every episode that was kept.
        now: the probe after the episode.
        chosen_change: of the chosen's log-probability against the reference, nats.
    """
    found: list[str] = []

    def compare(what: str, before: Sequence[Mapping[str, Any]], key: str, limit: float) -> None:
        known = [probe[key] for probe in before if probe.get(key) is not None]
        if known and (value := after.get(key)) is not None and max(known) - value > limit:
            found.append(f"{what} fell from {max(known):.1f} to {value:.1f}, more than {limit:g} points")

    after = {"": now.score, **now.families}
    before = [{"": probe.score, **probe.families} for probe in kept]
    compare("the held-out score", before, "", config.max_score_drop)
    for family in now.families:
        compare(f"the held-out score of {family}", before, family, config.max_family_drop)
    if kept[0].length and now.length / kept[0].length > config.max_length_ratio:
        found.append(
            f"samples grew from {kept[0].length:.0f} to {now.length:.0f} tokens, "
            f"more than {config.max_length_ratio:g}-fold"
        )
    if chosen_change < -config.max_chosen_drop:
        found.append(f"the chosen lost {-chosen_change:.1f} nats, more than {config.max_chosen_drop:g}")
    if now.kl > config.max_kl:
        found.append(f"the policy is {now.kl:.1f} nats a completion from the reference, more than {config.max_kl:g}")
    return found
