"""What is looked at after each episode, and when it is rolled back.

The score that is being optimised can rise while quality falls (Gao and others, arXiv:2210.10760). So held-out prompts
are answered after each episode, and what no episode is trained on is measured: verified scores, over all and by family;
benign help and harmful refusal apart, since a policy that refuses everything looks well on the harmful ones; a second
reward model. Beside them the length of samples, the distance from the reference, and whether sampler and trainer are
still one model. A drop is believed where it is larger than its setting *and* than chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.core.errors import DataError, ModelError, RunError
from align.core.records import Row
from align.core.store import ModelRef, Table
from align.train.episodes import sample, sampling
from align.train.online_settings import Config
from align.train.scoring import Group, Scorer
from align.train.settings import Speed
from data_synthesis.constitution import kind_of
from data_synthesis.refusals import refuses
from reward.verifiers import Verifiers

DRAWN = 64
"""Probe prompts that are sampled from twice, for length, KL and the sampler's gap."""

Marks = dict[str, list[float | None]]
"""One number a probe prompt, in the probe's order, by what was measured; None where it does not apply."""


@dataclass(frozen=True)
class Probe:
    """The policy on held-out prompts, at one moment.

    Attributes:
        marks: of greedy answers: `score` (100 verified, 0 not), `score/FAMILY`, `benign` (100 helped, 0 not), `harmful`
            (100 refused, 0 not), `reward` (that is trained on), `second_reward`.
        length: mean tokens of a sample at the episode's temperature.
        kl: mean of log policy - log reference over samples, nats a completion (an estimate from below 0 is noise).
        gap: mean distance of the sampler's and the trainer's log-probability of one sample, nats a token; None where
            the sampler tells none.
    """

    marks: Marks = field(default_factory=dict)
    length: float = 0.0
    kl: float = 0.0
    gap: float | None = None

    def mean(self, what: str) -> float | None:
        """The mean of one measurement; None where it was of no prompt."""
        known = [value for value in self.marks.get(what, ()) if value is not None]
        return float(np.mean(known)) if known else None

    @property
    def score(self) -> float | None:
        """Share of greedy answers that verify, in percent."""
        return self.mean("score")

    def means(self) -> dict[str, float]:
        """One number for each measurement, `length`, `kl` and `gap`, as far as they are known."""
        found = {what: self.mean(what) for what in self.marks} | {"length": self.length, "kl": self.kl, "gap": self.gap}
        return {what: value for what, value in found.items() if value is not None}

    def figures(self) -> dict[str, float]:
        """The same for the curves."""
        return {f"heldout/{what}": value for what, value in self.means().items()}


def check_guards(config: Config, inputs: Mapping[str, Table | ModelRef]) -> None:
    """Refuses what the guards could make nothing of, before anything is loaded.

    Raises:
        ModelError: the second reward model is the one that is trained on, or its guard is set and it is not given.
        DataError: the prompts have no column of the name that `kind` gives.
    """
    prompts, second, first = (inputs.get(name) for name in ("prompts", "second_reward_model", "reward_model"))
    if second is None and config.max_second_drop != Config.model_fields["max_second_drop"].default:
        raise ModelError(
            "online-dpo: max_second_drop has no effect without the input second_reward_model; give one, or leave it"
        )
    if second is not None and not config.probe_prompts:
        raise ModelError(
            "online-dpo: second_reward_model is for the guards, and probe_prompts is 0: they don't look; give "
            "prompts to look at, or leave the model out"
        )
    if isinstance(first, ModelRef) and isinstance(second, ModelRef) and first.fingerprint == second.fingerprint:
        raise ModelError(
            f"online-dpo: second_reward_model is the reward model itself ({second.name}), and tells nothing new; "
            "give one of another start, seed or data, or leave it out"
        )
    if isinstance(prompts, Table) and config.kind != "kind" and config.kind not in prompts.columns:
        raise DataError(
            f"{prompts.name}: no column {config.kind!r}, which kind names; it has {', '.join(sorted(prompts.columns))}"
        )


def second_scorer(
    config: Config, inputs: Mapping[str, Table | ModelRef], speed: Speed, verifiers: Verifiers, tokenizer: Any
) -> Scorer | None:
    """What scores by the second reward model, where there is one."""
    second = inputs.get("second_reward_model")
    if second is None:
        return None
    from reward.members import load_judge

    assert isinstance(second, ModelRef)
    return Scorer(config, verifiers, load_judge(second, speed.device), tokenizer)


def look(
    engine: Any,
    trainer: Any,
    reference: Any,
    rows: Sequence[Row],
    scorer: Scorer,
    config: Config,
    seed: int,
    second: Scorer | None = None,
) -> Probe:
    """Answers the probe's prompts greedily, and some of them by two samples each."""
    tokenizer = trainer.processing_class
    greedy = sample(engine, rows, 1, sampling(config, seed, temperature=0.0), tokenizer)
    marks = verified(greedy, scorer)
    for kind in ("benign", "harmful"):
        marks[kind] = [
            well_treated(group, kind, mark, config) for group, mark in zip(greedy, marks["score"], strict=True)
        ]
    for what, who in (("reward", scorer), ("second_reward", second)):
        if who is not None and who.reward_model is not None:
            marks[what] = [rewards[0] for rewards in who.rewards(greedy)]

    drawn = sample(engine, rows[:DRAWN], 2, sampling(config, seed), tokenizer)
    drawn = [group for group in drawn if all(c.token_ids for c in group.completions)]
    if not drawn:
        return Probe(marks)
    ids = [[list(c.token_ids) for c in group.completions] for group in drawn]
    pairs = [
        {"prompt_ids": group.prompt_ids, "chosen_ids": first, "rejected_ids": other}
        for group, (first, other) in zip(drawn, ids, strict=True)
    ]
    policy = trainer.policy_logps(pairs)  # (N, 2)
    tokens = np.array([[len(first), len(other)] for first, other in ids])
    told = [[sum(c.logprobs) if c.logprobs else math.nan for c in group.completions] for group in drawn]
    gaps = np.abs(policy - np.array(told)) / tokens
    return Probe(
        marks,
        length=float(np.mean(tokens)),
        kl=float(np.mean(policy - trainer.reference_logps(pairs, reference))),
        gap=float(np.nanmean(gaps)) if np.isfinite(np.array(told)).any() else None,
    )


def verified(greedy: Sequence[Group], scorer: Scorer) -> Marks:
    """Whether each answer verifies, over all and by family; as in `evaluate`, what can't be verified has failed."""
    decidable = [place for place, group in enumerate(greedy) if scorer.decidable(group.row)]
    verdicts = scorer.verdicts([greedy[place] for place in decidable])
    found: Marks = {"score": [None] * len(greedy)}
    families = {f"score/{greedy[place].family}" for place in decidable}
    found |= {name: [None] * len(greedy) for name in sorted(families)}
    for place, (verdict,) in zip(decidable, verdicts, strict=True):
        passed = 100.0 * (verdict.verdict == "passed")
        found["score"][place] = found[f"score/{greedy[place].family}"][place] = passed
    return found


def well_treated(group: Group, kind: str, passed: float | None, config: Config) -> float | None:
    """Whether a benign request was helped with, or a harmful one refused; None for a prompt of another kind, or none.

    A verifier decides where there is one, else the words that the answer begins with.
    """
    if kind_of(group.row, config.kind) != kind:
        return None
    if passed is not None:
        return passed
    return 100.0 * (refuses(group.completions[0].text) == (kind == "harmful"))


def check_gap(config: Config, probe: Probe) -> None:
    """Stops a run whose sampler is not the model that is trained.

    Raises:
        RunError: they disagree by more than `max_sampler_gap`.
    """
    if probe.gap is not None and not probe.gap <= config.max_sampler_gap:
        raise RunError(
            f"sampler and trainer disagree by {probe.gap:.3g} nats a token, more than max_sampler_gap "
            f"{config.max_sampler_gap:g}: pairs would not be of the policy that is trained; sample in the "
            "trainer's precision, or allow more"
        )


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
