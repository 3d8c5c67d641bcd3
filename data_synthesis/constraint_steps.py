"""The steps of AutoIF's constraints (arXiv:2406.13542): augmented, written, validated, told back, related.

Each takes constraints and yields those that are left, with what the step found; the others are counted as lost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.core.asking import Answer, Question, ask_each, fill
from align.core.engines.base import SamplingParams
from align.core.records import Messages
from align.core.sandbox import Sandbox, Slot
from align.core.stage import Progress, Tools
from align.core.text import normalise, words
from data_synthesis.constraint_answers import (
    FUNCTION_SCHEMA,
    RELATION_SCHEMA,
    read_function,
    read_lines,
    read_relation,
    read_sentence,
)
from data_synthesis.sampling import ErrorBudget
from reward.constraint_library import Agreement, Outcome, agreement, outcomes, problem_of

if TYPE_CHECKING:
    from data_synthesis.constraints import ConstraintsConfig

MOST_TIMEOUTS = 3
"""Cases on which a function may run out of time; then it is taken to do so on all [our choice]."""


@dataclass
class Candidate:
    """A constraint on its way into the library.

    Attributes:
        text: the constraint.
        origin: seed or new.
        functions: sources that compile, without repetitions.
        cases: answers, and whether each meets the constraint.
        accuracies: of the functions, on the cases.
        backs: what each function checks, in a model's words.
        relations: of each of those to the constraint.
        raw: the answers in which the functions came.
    """

    text: str
    origin: str
    functions: list[str] = field(default_factory=list)
    cases: list[tuple[str, bool]] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    backs: list[str] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)


STEPS = ("seeds", "constraints", "written", "agreed", "told back", "kept")
"""What `yield` counts, all of them constraints: those with enough functions and cases, those that cross-validation left
something of, those whose functions could be told back, those that kept a function."""


class Losses:
    """What becomes of constraints, functions and cases on their way, for the summary."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.steps: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.lines: Counter[str] = Counter()
        self.functions: Counter[str] = Counter()
        self.cases: Counter[str] = Counter()

    def lose(self, candidate: Candidate, reason: str) -> None:
        """Counts a constraint as lost."""
        self.lost[reason] += 1
        if len(shown := self.examples.setdefault(reason, [])) < 3:
            shown.append(candidate.text)
        self.progress.advance(1, kept=self.steps["kept"])

    def keep(self, candidate: Candidate) -> None:
        """Counts a constraint as a row of the library."""
        self.steps["kept"] += 1
        self.functions["kept"] += len(candidate.functions)
        self.progress.advance(1, kept=self.steps["kept"])

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest; `yield` and `lost` count constraints."""
        return {
            "yield": dict(self.steps), "lost": dict(self.lost), "lost_examples": self.examples,
            "lines": dict(self.lines), "functions": dict(self.functions), "cases": dict(self.cases),
        }  # fmt: skip


def augmented(
    config: ConstraintsConfig,
    seeds: Sequence[str],
    template: str,
    tools: Tools,
    losses: Losses,
    budget: ErrorBudget,
) -> list[Candidate]:
    """The seeds, and what a model wrote after them, without repetitions."""
    found = {normalise(seed): Candidate(seed, "seed") for seed in seeds}
    if config.new == 0:
        return list(found.values())
    order = random.Random(f"{tools.seed}/seeds").sample(list(seeds), len(seeds))
    size = config.shown or len(order)
    shown = ["\n".join(order[start : start + size]) for start in range(0, len(order), size)]
    values = ({"seeds": some, "count": str(config.new)} for some in shown)
    asked = ((None, [Question(_chat(template, each), read_lines)]) for each in values)
    warm = _params(config, tools, config.temperature)
    for _, (answers,) in ask_each(tools.engines["writer"], asked, warm, config.attempts, config.answers, whole=True):
        for answer in answers:
            budget.count(answer.value is None, answer.problem)
            for line in answer.value or ():
                key = normalise(line)
                reason = "repeated" if key in found else "too long" if len(words(line)) > config.max_words else "new"
                losses.lines[reason] += 1
                if reason == "new":
                    found[key] = Candidate(line, "new")
    return list(found.values())


def written(
    config: ConstraintsConfig,
    candidates: Sequence[Candidate],
    template: str,
    tools: Tools,
    losses: Losses,
    budget: ErrorBudget,
) -> Iterator[Candidate]:
    """Yields the constraints with the functions and cases that a model wrote for them, where there are enough."""
    schema = FUNCTION_SCHEMA if config.json_answers else None
    asked = ((c, [Question(_chat(template, {"constraint": c.text}), read_function, schema)]) for c in candidates)
    warm = _params(config, tools, config.temperature)
    for candidate, (answers,) in ask_each(
        tools.engines["writer"], asked, warm, config.attempts, config.verifiers, whole=True
    ):
        candidate.raw = [answer.text for answer in answers]
        functions: dict[str, None] = {}
        cases: dict[tuple[str, bool], None] = {}
        for answer in answers:
            budget.count(answer.value is None, answer.problem)
            losses.functions["asked for"] += 1
            if answer.value is None:
                losses.functions["could not be read"] += 1
                continue
            function, its_cases = answer.value
            cases |= dict.fromkeys(its_cases)
            losses.cases["read"] += len(its_cases)
            problem = problem_of(function)
            losses.functions[problem or ("the same as another" if function in functions else "written")] += 1
            if not problem:
                functions[function] = None
        candidate.functions, candidate.cases = list(functions), list(cases)
        losses.cases["different"] += len(cases)
        if len(functions) < config.min_functions:
            losses.lose(candidate, "too few functions that compile")
        elif len(cases) < config.min_cases:
            losses.lose(candidate, "too few cases")
        else:
            losses.steps["written"] += 1
            yield candidate


def validated(
    config: ConstraintsConfig, candidates: Iterator[Candidate], sandbox: Sandbox, losses: Losses
) -> Iterator[Candidate]:
    """Yields the constraints with the functions and cases that bear each other out."""

    def validate(slot: Slot, candidate: Candidate) -> tuple[Candidate, Agreement]:
        texts = [text for text, _ in candidate.cases]
        said: list[list[Outcome]] = [outcomes(slot, f, texts, MOST_TIMEOUTS) for f in candidate.functions]
        expected = [outcome for _, outcome in candidate.cases]
        return candidate, agreement(said, expected, config.case_kept, config.function_kept, config.both_outcomes)

    for candidate, found in sandbox.map(validate, candidates):
        candidate.cases = [candidate.cases[place] for place in found.cases]
        kept = found.functions[: config.max_functions]
        candidate.functions = [candidate.functions[place] for place in kept]
        candidate.accuracies = [round(found.accuracies[place], 4) for place in kept]
        losses.cases["kept"] += len(candidate.cases)
        losses.functions["agreed"] += len(candidate.functions)
        if not candidate.cases:
            losses.lose(candidate, "no case that enough functions agree with")
        elif config.both_outcomes and len({outcome for _, outcome in candidate.cases}) < 2:
            losses.lose(candidate, "its cases are all true, or all false")
        elif not candidate.functions:
            losses.lose(candidate, "no function that is right on enough cases")
        else:
            losses.steps["agreed"] += 1
            yield candidate


def told_back(
    config: ConstraintsConfig,
    candidates: Iterator[Candidate],
    template: str,
    tools: Tools,
    losses: Losses,
    budget: ErrorBudget,
) -> Iterator[Candidate]:
    """Yields the constraints with what a model says that each of their functions checks."""
    asked = ((c, [Question(_chat(template, {"function": f}), read_sentence) for f in c.functions]) for c in candidates)
    greedy = _params(config, tools, 0.0)
    for candidate, answers in ask_each(tools.engines["writer"], asked, greedy, config.attempts, whole=True):
        backs = [_counted(one, budget) for (one,) in answers]
        _keep(candidate, [back is not None for back in backs])
        losses.functions["not told back"] += backs.count(None)
        candidate.backs = [back for back in backs if back is not None]
        if not candidate.functions:
            losses.lose(candidate, "no function could be told back")
        else:
            losses.steps["told back"] += 1
            yield candidate


def related(
    config: ConstraintsConfig,
    candidates: Iterator[Candidate],
    template: str,
    tools: Tools,
    losses: Losses,
    budget: ErrorBudget,
) -> Iterator[Candidate]:
    """Yields the constraints with the functions that, told back, don't contradict them."""
    schema = RELATION_SCHEMA if config.json_answers else None

    def questions(candidate: Candidate) -> list[Question[str]]:
        values = ({"constraint": candidate.text, "back": back} for back in candidate.backs)
        return [Question(_chat(template, each), read_relation, schema) for each in values]

    asked = ((candidate, questions(candidate)) for candidate in candidates)
    greedy = _params(config, tools, 0.0)
    for candidate, answers in ask_each(tools.engines["judge"], asked, greedy, config.attempts, whole=True):
        relations = [_counted(one, budget) for (one,) in answers]
        losses.functions["contradict"] += relations.count("contradiction")
        losses.functions["relation could not be read"] += relations.count(None)
        kept = [relation not in (None, "contradiction") for relation in relations]
        _keep(candidate, kept)
        candidate.backs = [back for back, keep in zip(candidate.backs, kept, strict=True) if keep]
        candidate.relations = [r for r, keep in zip(relations, kept, strict=True) if keep and r is not None]
        if candidate.functions:
            yield candidate
        elif "contradiction" in relations:
            losses.lose(candidate, "told back, every function contradicts it")
        else:
            losses.lose(candidate, "no relation could be read")


def _keep(candidate: Candidate, kept: Sequence[bool]) -> None:
    candidate.functions = [f for f, keep in zip(candidate.functions, kept, strict=True) if keep]
    candidate.accuracies = [a for a, keep in zip(candidate.accuracies, kept, strict=True) if keep]


def _counted(answer: Answer[str], budget: ErrorBudget) -> str | None:
    budget.count(answer.value is None, answer.problem)
    return answer.value


def _chat(template: str, values: Mapping[str, str]) -> Messages:
    return [{"role": "user", "content": fill(template, values)}]


def _params(config: ConstraintsConfig, tools: Tools, temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=config.max_tokens, temperature=temperature, seed=tools.seed)
