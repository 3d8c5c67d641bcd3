"""When an episode is rolled back, and when the run ends.

The score that is being optimised can rise while quality falls (Gao and others, arXiv:2210.10760). So what is measured
on held-out prompts (`probe.py`) is held against the best that it has been. A policy that refuses everything looks well
on the harmful requests, hence both rates. A drop is believed where it is larger than its setting *and* than chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from align.train.online_settings import Config
from align.train.probe import Probe


def objections(config: Config, kept: Sequence[Probe], now: Probe, chosen_change: float) -> list[str]:
    """Why an episode should be rolled back; none where it may stay.

    Args:
        kept: the probes of the start and of every episode that was kept.
        now: the probe after the episode.
        chosen_change: of the chosen's log-probability against the reference, nats.
    """
    start = kept[0]
    found = list(_fallen(config, kept, now))
    ratio = now.length / start.length if start.length else 1.0
    if not config.min_length_ratio <= ratio <= config.max_length_ratio:
        limit = f"max_length_ratio is {config.max_length_ratio:g}"
        if ratio < 1:
            limit = f"min_length_ratio is {config.min_length_ratio:g}"
        found.append(f"samples went from {start.length:.0f} to {now.length:.0f} tokens ({limit})")
    if not -chosen_change <= config.max_chosen_drop:
        found.append(f"the chosen lost {-chosen_change:.1f} nats (max_chosen_drop is {config.max_chosen_drop:g})")
    if not now.kl <= config.max_kl:
        found.append(f"the policy is {now.kl:.1f} nats a completion from the reference (max_kl is {config.max_kl:g})")
    before, after = start.mean("reward"), now.mean("reward")
    if found and before is not None and after is not None and after > before:
        found[-1] += f", while the reward that is trained on rose from {before:.3g} to {after:.3g}"
    return found


def _fallen(config: Config, kept: Sequence[Probe], now: Probe) -> Iterator[str]:
    """What fell by more than its setting below its best so far, and by more than chance."""
    kinds = [now.marks.get(kind) for kind in ("benign", "harmful")]
    for what, marks in now.marks.items():
        if what == "reward" or (what.startswith("score/") and marks in kinds):  # a family that is a kind: said once
            continue
        best = max(kept, key=lambda probe: -math.inf if (mean := probe.mean(what)) is None else mean)
        before, after = best.mean(what), now.mean(what)
        if before is None or after is None:
            continue
        said, setting, most, unit = _limit(config, what)
        scale = _spread(kept[0].marks[what]) if unit == "standard deviations" else 1.0
        sigmas = standard_errors(best.marks[what], marks)
        if before - after > most * scale and sigmas >= config.min_sigmas:
            asked = sum(mark is not None for mark in marks)
            chance = f"{asked} prompts, {sigmas:.1f} standard errors"
            limit = f"{setting} is {most:g} {unit}"
            yield f"{said} fell from {before:.3g} to {after:.3g} ({chance}; {limit})"


def _limit(config: Config, what: str) -> tuple[str, str, float, str]:
    """A measurement in words; its setting's name, value and unit."""
    if what.startswith("score/"):
        said = f"the held-out score of {what.removeprefix('score/')}"
        return said, "max_family_drop", config.max_family_drop, "points"
    return {
        "score": ("the held-out score", "max_score_drop", config.max_score_drop, "points"),
        "benign": ("help with benign requests", "max_kind_drop", config.max_kind_drop, "points"),
        "harmful": ("refusal of harmful requests", "max_kind_drop", config.max_kind_drop, "points"),
        "second_reward": ("the second reward", "max_second_drop", config.max_second_drop, "standard deviations"),
    }[what]


def standard_errors(before: Sequence[float | None], after: Sequence[float | None]) -> float:
    """By how many of its own standard errors a mean fell, the same prompts before and after.

    Let d be a prompt's fall. If nothing had changed, its sign would be a coin's, and the variance of sum d is sum d^2:

        z = sum d / sqrt(sum d^2)

    Of answers that are right or wrong this is McNemar's z. At most sqrt(n), so four prompts are the fewest to reach 2.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    falls = np.array([a - b for a, b in pairs])
    return float(falls.sum() / np.sqrt((falls**2).sum())) if falls.any() else 0.0


def _spread(marks: Sequence[float | None]) -> float:
    known = [mark for mark in marks if mark is not None]
    return float(np.std(known)) if known else 0.0


def end_of_run(config: Config, rolled_back: Sequence[Sequence[str]]) -> str:
    """Why the run ends before its last episode; empty where it goes on.

    Args:
        rolled_back: of every episode so far, why it was rolled back; empty where it stayed.
    """
    if not rolled_back or not rolled_back[-1] or len(rolled_back) == config.episodes:
        return ""
    if config.after_rollback == "stop":
        return "an episode was rolled back, and after_rollback is stop"
    last = list(rolled_back)[-config.max_rollbacks :]
    if len(last) == config.max_rollbacks and all(last):
        return (
            f"{config.max_rollbacks} episodes in a row were rolled back (max_rollbacks); the model is that of the last "
            "good one; look at what the scorer rewards, or lower learning_rate"
        )
    return ""
