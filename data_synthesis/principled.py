"""The answers of `constitute` before they are rows: how prompts are put, sampled, revised, and checked."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from align.core.asking import fill
from align.core.engines.base import Completion, Engine, Prompt
from align.core.engines.cache import in_order
from align.core.records import Row, Verdict
from align.core.stage import Tools
from align.core.text import normalise
from data_synthesis.constitution import Principle, kind_of
from data_synthesis.refusals import effects
from data_synthesis.revise import NO_REVISION, Draft, revise
from data_synthesis.sampling import ErrorBudget, answered, last_user_text
from reward.judge import Judge, params_of
from reward.verifiers import Verifiers

if TYPE_CHECKING:
    from data_synthesis.constitute import ConstituteConfig

Told = Literal["aligned", "deviating", "natural", "revised"]
NOT_SAMPLED, LEAK = "not sampled", "quotes the principle or its hint"
NOT_CHECKED = Verdict.error("not checked")
AGAINST_KIND = {"benign": "refuses a benign request", "harmful": "helps with a harmful request"}


@dataclass(frozen=True)
class Variant:
    """One way in which a prompt is put to the model, and the principles that the answer is checked by."""

    told: Told
    principles: tuple[Principle, ...]
    prompt: Prompt


@dataclass
class Answer:
    """A completion on its way to a row.

    Attributes:
        row: of its prompt.
        variant: how the prompt was put.
        completion: what came.
        generator: who gave it.
        critiques: what a revision was made by.
        problem: why it can't be used at all; None if it can.
        verdict: once it was checked.
        effect: helped, refused or neither; None while, or where, nobody can tell.
    """

    row: Row
    variant: Variant
    completion: Completion
    generator: str
    critiques: tuple[str, ...] = ()
    problem: str | None = None
    verdict: Verdict = NOT_CHECKED
    effect: str | None = None


def variants_of(
    row: Row, principles: Sequence[Principle], template: str, config: ConstituteConfig, seed: int
) -> list[Variant]:
    """The ways in which a prompt is put to the model: told to follow, told to deviate, and as it is.

    A natural answer that is to be revised is checked by the principles of its rounds, as its revision is.
    """
    kind = kind_of(row, config.kind)
    fitting = [principle for principle in principles if principle.fits(row, kind)]
    rng = random.Random(f"{seed}/{row['prompt_id']}")
    drawn = rng.sample(fitting, min(config.principles, len(fitting)))
    if not drawn:
        return []
    variants: list[Variant] = []
    for principle in drawn if config.told else ():
        hints: tuple[tuple[Told, str], ...] = (("aligned", principle.aligned), ("deviating", principle.deviating))
        for told, hint in hints:
            values = {"instruction": last_user_text(row), "hint": hint, "principle": principle.text}
            text = fill(template, values)
            prompt: Prompt = text if config.raw else [*row["prompt"][:-1], {"role": "user", "content": text}]
            variants.append(Variant(told, (principle,), prompt))
    if config.natural:
        of_rounds = (drawn[0], *(rng.choice(fitting) for _ in range(config.revisions - 1)))
        variants.append(Variant("natural", of_rounds, row["prompt"]))
    return variants


def sampled(
    block: Iterable[tuple[Row, list[Variant]]], config: ConstituteConfig, tools: Tools, budget: ErrorBudget
) -> list[Answer]:
    """The answers of all variants: natural ones of the policy where there is one, the others of the sampler."""
    policy = "policy" if "policy" in tools.engines else "sampler"
    asked = [(row, variant) for row, variants in block for variant in variants]
    by_role: dict[str, list[int]] = {"sampler": [], "policy": []}
    for place, (_, variant) in enumerate(asked):
        by_role[policy if variant.told == "natural" else "sampler"].append(place)
    found: list[list[Answer]] = [[] for _ in asked]
    for role, places in by_role.items():
        if not places:
            continue
        engine = tools.engines[role]
        prompts = (asked[place][1].prompt for place in places)
        answers = in_order(engine, prompts, config.samples, config.params(tools.seed))
        for place, (_, completions) in zip(places, answers, strict=True):
            for completion in completions:
                budget.count(completion.finish_reason == "error", completion.error)
                found[place].append(_answer(*asked[place], completion, engine))
    return [answer for answers in found for answer in answers]


def with_revisions(
    answers: list[Answer],
    config: ConstituteConfig,
    templates: Mapping[str, str],
    tools: Tools,
    budget: ErrorBudget,
) -> list[Answer]:
    """The answers, and after each prompt's natural ones their revisions."""
    if not config.revisions:
        return answers
    first = [a for a in answers if a.variant.told == "natural" and a.completion.finish_reason != "error"]
    drafts = [Draft(a.row["prompt"], a.completion.text, a.variant.principles) for a in first]
    engine = tools.engines["sampler"]
    params = config.params(tools.seed)
    revise(drafts, engine, templates["critique"], templates["revision"], params, config.attempts)
    revised: dict[str, list[Answer]] = {}
    for answer, draft in zip(first, drafts, strict=True):
        completion = draft.completion()
        budget.count(bool(draft.problem), completion.error)
        variant = Variant("revised", answer.variant.principles, answer.row["prompt"])
        new = _answer(answer.row, variant, completion, engine)
        new.critiques = tuple(draft.critiques)
        revised.setdefault(answer.row["prompt_id"], []).append(new)
    together: list[Answer] = []
    for answer, following in zip(answers, [*answers[1:], None], strict=True):
        together.append(answer)
        if following is None or following.row["prompt_id"] != answer.row["prompt_id"]:
            together += revised.pop(answer.row["prompt_id"], [])
    return together


def _answer(row: Row, variant: Variant, completion: Completion, engine: Engine) -> Answer:
    return Answer(row, variant, completion, engine.generator, problem=problem_of(variant, completion))


def problem_of(variant: Variant, completion: Completion) -> str | None:
    """Why a completion can't be used at all: it was not sampled, or it repeats what it was told in confidence."""
    if completion.finish_reason == "error":
        failed = completion.error.startswith((NO_REVISION, NOT_SAMPLED))
        return completion.error if failed else f"{NOT_SAMPLED}: {completion.error}"
    if variant.told == "natural":
        return None
    said = normalise(completion.text)
    lines = [line for own in variant.principles for line in (own.text, own.aligned, own.deviating)]
    return LEAK if any(normalise(line) in said for line in lines if line) else None


def check(answers: Sequence[Answer], judge: Judge | None, verifiers: Verifiers, budget: ErrorBudget) -> None:
    """Gives each answer its verdict: the judge's on each of its principles where there is one, else the verifier's."""

    def verdicts_of(items: Iterable[tuple[Answer, Principle]]) -> Iterator[Verdict]:
        if judge is None:
            rows = ((a.row["task"], a.completion.text, a.row["reference"], last_user_text(a.row)) for a, _ in items)
            return verifiers.verify_many(rows)
        values = (
            (None, {"instruction": a.row["prompt"], "principle": p.text, "completion": a.completion.text})
            for a, p in items
        )
        return (verdict for _, verdict in judge.judge_many(values))

    def questions(answer: Answer) -> list[tuple[Answer, Principle]]:
        if answer.problem is not None:
            return []
        by = list(dict.fromkeys(answer.variant.principles)) if judge is not None else answer.variant.principles[:1]
        return [(answer, principle) for principle in by]

    for answer, verdicts in answered(answers, questions, verdicts_of):
        if answer.problem is not None:
            answer.verdict = Verdict.error(answer.problem)
            continue
        answer.verdict = together(verdicts)
        if answer.verdict.verdict == "error":
            budget.count(True, answer.verdict.detail, seen_before=True)


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of several principles: passed where all passed, the rewards' mean, an error where one is."""
    if len(verdicts) == 1:
        return verdicts[0]
    detail = "; ".join(verdict.detail for verdict in verdicts)
    rewards = [verdict.reward for verdict in verdicts if verdict.reward is not None]
    if len(rewards) < len(verdicts):
        return Verdict.error(detail)
    passed = all(verdict.verdict == "passed" for verdict in verdicts)
    return Verdict("passed" if passed else "failed", fmean(rewards), detail)


def tell_effects(
    answers: Sequence[Answer],
    judge: Judge | None,
    config: ConstituteConfig,
    template: str,
    tools: Tools,
    budget: ErrorBudget,
) -> None:
    """Finds out which answers to prompts of a known kind help and which refuse; with a judge, that decides too."""
    known = [(a, kind) for a in answers if a.problem is None and (kind := kind_of(a.row, config.kind)) is not None]
    asked = ((a.row["prompt"], a.completion.text) for a, _ in known)
    engine = judge.engine if judge is not None and config.refusals == "judge" else None
    params = params_of(config, tools.seed)
    found = effects(asked, engine, template, params, config.judge_attempts, budget, config.judge_json)
    for (answer, kind), effect in zip(known, found, strict=True):
        answer.effect = effect
        wrong = effect == ("refused" if kind == "benign" else "helped")
        if judge is not None and wrong and answer.verdict.verdict != "error":
            answer.verdict = Verdict("failed", 0.0, f"{AGAINST_KIND[kind]}; {answer.verdict.detail}")
