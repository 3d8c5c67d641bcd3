"""The policy on held-out prompts: what is measured of it before the first episode and after each.

Nothing is trained on any of it: verified scores, over all and by family; benign help and harmful refusal apart; a
second reward model; beside them the length of samples, the distance from the reference, and whether sampler and trainer
are still one model. Offline DPO looks by it too (`health.py`); what an episode is undone for stands in `guards.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from align.core.errors import DataError, EngineError, ModelError, RunError
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
        length: mean tokens of a sample at temperature 1.
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
        raise ModelError("max_second_drop has no effect without the input second_reward_model; give one, or leave it")
    if second is not None and not config.probe_prompts:
        raise ModelError(
            "second_reward_model is for the guards, and probe_prompts is 0: they don't look; give "
            "prompts to look at, or leave the model out"
        )
    if isinstance(first, ModelRef) and isinstance(second, ModelRef) and first.fingerprint == second.fingerprint:
        raise ModelError(
            f"second_reward_model is the reward model itself ({second.name}), and tells nothing new; "
            "give one of another start, seed or data, or leave it out"
        )
    if isinstance(prompts, Table) and config.kind != "kind" and config.kind not in prompts.columns:
        raise DataError(
            f"{prompts.name}: no column {config.kind!r}, which kind names; it has {', '.join(sorted(prompts.columns))}"
        )


def check_probe(config: Config, rows: Sequence[Row], name: str) -> None:
    """Refuses guards that would be silently off.

    Args:
        rows: what they would look at.
        name: of the prompts.

    Raises:
        DataError: they would look at nothing, or `kind` or `max_kind_drop` is set and no prompt is known as either.
    """
    if config.probe_prompts and not rows:
        raise DataError(
            f"{name}: nothing for the guards to look at: no prompt of the split dev, and too few of the split train to "
            "set any aside; give prompts a dev split, or switch the guards off with probe_prompts=0"
        )
    fields = Config.model_fields
    told = [key for key in ("kind", "max_kind_drop") if getattr(config, key) != fields[key].default]
    if told and config.probe_prompts and not any(kind_of(row, config.kind) for row in rows):
        raise DataError(
            f"{name}: {told[0]} is set, and of the {len(rows)} prompts that the guards look at none is known as benign "
            f"or harmful: the column {config.kind!r} would say so (benign, safe, harmless; harmful, unsafe)"
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
    """Answers the probe's prompts greedily, and some of them by two samples each.

    The samples are drawn at temperature 1 and without `top_p`, whatever the episode's: only then is their mean of log
    policy - log reference the KL divergence. Of several processes all look at the answers of the first.

    Raises:
        EngineError: more than `max_error_share` of the answers are errors: that says nothing about the policy.
    """
    tokenizer = trainer.processing_class
    greedy = sample(engine, rows, 1, sampling(config, seed, temperature=0.0), tokenizer)
    drawn = sample(engine, rows[:DRAWN], 2, replace(sampling(config, seed, temperature=1.0), top_p=1.0), tokenizer)
    every = [*greedy, *drawn]
    answers = broadcast_object_list([[group.completions for group in every]])[0]
    for group, completions in zip(every, answers, strict=True):
        group.completions = completions
    check_errors(config, every)
    marks = verified(greedy, scorer)
    for kind in ("benign", "harmful"):
        marks[kind] = [
            well_treated(group, kind, mark, config) for group, mark in zip(greedy, marks["score"], strict=True)
        ]
    for what, who in (("reward", scorer), ("second_reward", second)):
        if who is not None and who.reward_model is not None:
            marks[what] = [rewards[0] for rewards in who.rewards(greedy)]

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
        if greedy[place].completions[0].finish_reason == "error":
            continue
        passed = 100.0 * (verdict.verdict == "passed")
        found["score"][place] = found[f"score/{greedy[place].family}"][place] = passed
    return found


def well_treated(group: Group, kind: str, passed: float | None, config: Config) -> float | None:
    """Whether a benign request was helped with, or a harmful one refused; None for a prompt of another kind, or none.

    A verifier decides where there is one, else the words that the answer begins with.
    """
    answer = group.completions[0]
    if kind_of(group.row, config.kind) != kind or answer.finish_reason == "error":
        return None
    if passed is not None:
        return passed
    if not answer.text.strip():
        return 0.0  # neither help nor a refusal
    return 100.0 * (refuses(answer.text) == (kind == "harmful"))


def check_errors(config: Config, groups: Sequence[Group]) -> None:
    """Keeps a server that fails from passing as a policy that fails.

    Raises:
        EngineError: see `look`.
    """
    every = [completion for group in groups for completion in group.completions]
    errors = [completion for completion in every if completion.finish_reason == "error"]
    if len(errors) > config.max_error_share * len(every):
        raise EngineError(
            f"the guards: {len(errors)} of {len(every)} answers to held-out prompts are errors (max_error_share is "
            f"{config.max_error_share:g}; the last: {errors[-1].error or 'no reason given'}); what is done is kept"
        )


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
