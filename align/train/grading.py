"""One reward of each completion from what each part of the scorer gave it, and what length and a missing end cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt

from align.core.engines.base import Completion
from align.train.online_settings import Config, Part
from align.train.scoring import Gather, Group
from reward.pairs import Scored


def grade(groups: Sequence[Group], config: Config, gather: Gather = list) -> None:
    """Fills in `scored`: one reward of each completion from what the parts gave it, the penalties, the verdict.

    One part's score is the reward. Of several (weighted) with scores s_p of mean m_p and standard deviation d_p over
    all of the episode's completions that p scored, and weights w_p, it is

        sum_p w_p (s_p - m_p) / d_p / sum_p w_p

    over the parts that score the prompt: where a prompt has no verifier, the others decide. A completion that one of
    them could not score is an error. Where all scores of a part are equal it adds nothing.

    Args:
        groups: of this process, scored.
        config: `weights`, `length_penalty`, `missing_end_penalty`.
        gather: see `Gather`; mean and deviation are of all processes' completions.
    """
    units = {part: _unit([group.scores.get(part, []) for group in groups], gather) for part in config.weights}
    for group in groups:
        penalties = penalties_of(group.completions, config)
        given = [{part: scores[place] for part, scores in group.scores.items()} for place in range(len(penalties))]
        rewards = [_reward(scores, config.weights, units) for scores in given]
        verdicts = group.verdicts.get("verifier")
        judged = group.verdicts.get("judge")
        group.scored = [
            Scored(
                c.text,
                reward if c.token_ids else None,  # what has no ids can't be trained on
                None if verdicts is None else verdicts[place].verdict,
                truncated=c.finish_reason == "length",
                choosable=judged is None or judged[place].verdict != "failed",
                penalty=penalties[place],
            )
            for place, (c, reward) in enumerate(zip(group.completions, rewards, strict=True))
        ]


def _reward(
    given: Mapping[Part, float | None], weights: Mapping[Part, float], units: Mapping[Part, tuple[float, float]]
) -> float | None:
    """One completion's reward; see `grade`."""
    known = {part: score for part, score in given.items() if score is not None}
    if not known or len(known) < len(given):
        return None
    if not weights:
        return next(iter(known.values()))
    terms = []
    for part, score in known.items():
        mean, deviation = units[part]
        terms.append(weights[part] * (score - mean) / deviation if deviation else 0.0)
    return fsum(terms) / fsum(weights[part] for part in known)


def _unit(scores: Sequence[Sequence[float | None]], gather: Gather) -> tuple[float, float]:
    """Mean and standard deviation (of the population) of a part's scores; the same however processes share them."""
    every = gather([score for group in scores for score in group if score is not None])
    if not every:
        return 0.0, 0.0
    mean = fsum(every) / len(every)
    return mean, sqrt(fsum((score - mean) ** 2 for score in every) / len(every))


def penalties_of(completions: Sequence[Completion], config: Config) -> list[float]:
    """What length and a missing end cost each completion of a prompt.

    RLHFlow takes the length times a constant off the reward (arXiv:2405.07863). Counted from the prompt's shortest
    completion, pairs are the same and rewards stay comparable with those of other prompts.
    """
    lengths = [len(c.token_ids) for c in completions if c.token_ids]
    shortest = min(lengths, default=0)
    return [
        config.length_penalty * max(0, len(c.token_ids) - shortest) / 100
        + config.missing_end_penalty * (c.finish_reason == "length")
        for c in completions
    ]
