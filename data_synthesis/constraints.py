"""Stage `constraints`: demands on the form of an answer, with functions that check them (AutoIF, arXiv:2406.13542, 3).

From a few seeds that people wrote:

    1. augment           a model writes more of the kind (self-instruct)
    2. write             K times for each constraint, a function `evaluate(response)` and cases for it, as JSON
    3. cross-validate    a case is kept where enough functions agree with it; a function where it is right on enough of
                         the kept cases (reward/constraint_library.py; the functions run in the sandbox)
    4. translate back    a model says what each function checks; a judge says how that relates to the constraint (NLI),
                         and a function that contradicts it is dropped

A constraint that keeps a function is a row of the library. Its reference is one of the task `follow`, so whatever
verifies completions can use it: `constrain` puts it to prompts, and `follow`, `reject`, `verify`, `evaluate` and
`online-dpo` take those.

Differs from the paper: the NLI is asked of a model, not of a classifier, and it is each function of the library that is
asked about; `both_outcomes` refuses what only cases of one outcome bear out, for a function that always says the same
meets those; what can't be read is asked for again; `max_functions` keeps the most accurate of the functions.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from align.core.asking import Answer, MalformedError, Question, ask_each, fill, load_templates
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.sandbox import Accept, Sandbox, Slot
from align.core.stage import Asks, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise, stable_hash, words
from data_synthesis.autoif import PresetConfig, Rule
from data_synthesis.sampling import ErrorBudget
from reward.constraint_library import Agreement, Outcome, agreement, outcomes, problem_of, truth

SHIPPED = Path(__file__).parent / "templates" / "constraints"
TEMPLATES = {
    "augment": ["seeds", "count"], "verifier": ["constraint"], "back": ["function"], "relation": ["constraint", "back"],
}  # fmt: skip
RELATIONS = ("entailment", "neutral", "contradiction")
MOST_TIMEOUTS = 3
"""Cases on which a function may run out of time; then it is taken to do so on all [our choice]."""


class ConstraintsConfig(PresetConfig):
    """Settings of `constraints`."""

    seeds: str | list[str] = Field(
        "default", description="constraints to begin with: a list, a file with one on each line, or default for ours"
    )
    templates: str = Field(
        "default", description="what the models are asked: a shipped set's name (default, tiny), or a folder with any "
        "of augment.txt, verifier.txt, back.txt and relation.txt",
    )  # fmt: skip
    new: int = Field(100, ge=0, description="constraints asked for in one answer (paper: 100, code: 50); 0: seeds alone")
    shown: int | None = Field(None, ge=1, description="seeds shown in one request; all of them by default")
    answers: int = Field(1, ge=1, description="answers to each request for constraints")
    max_words: int = Field(60, ge=1, description="a longer constraint is left out; of Chinese, characters are counted")
    verifiers: int = Field(8, ge=1, description="functions with cases asked for of each constraint, the paper's K")
    min_functions: int = Field(
        1, ge=1, description="least different functions that compile, else the constraint is lost (paper: 1, code: 3)"
    )
    min_cases: int = Field(
        1, ge=1, description="least different cases, else the constraint is lost (paper: 1, code: 10)"
    )
    case_kept: Rule = Field(
        "above 0.5", description="share of the functions that must agree with a case (paper: above 0.5, code: above 0)"
    )
    function_kept: Rule = Field(
        "above 0.5",
        description="share of the kept cases on which a function must be right (paper: above 0.5, code: at least 0.8)",
    )
    both_outcomes: bool = Field(
        True, description="a constraint whose kept cases are all true, or all false, is lost: a function that always "
        "says the same would meet them [our choice; false is AutoIF's]",
    )  # fmt: skip
    max_functions: int | None = Field(
        None, ge=1, description="most functions kept of a constraint, the most accurate (paper: all, code: 3)"
    )
    temperature: float = Field(
        0.8, ge=0, le=5, description="sampling temperature of new constraints and functions; all else is asked greedily"
    )
    max_tokens: int = Field(1024, ge=1, description="most new tokens of an answer; one cut off is not read")
    attempts: int = Field(3, ge=1, description="samples asked for until an answer can be read")
    json: bool = Field(  # type: ignore[assignment]
        False, description="let the models write nothing but JSON where JSON is asked for; only for engines with "
        "structured output",
    )  # fmt: skip
    max_error_share: float = Field(
        0.25, ge=0, le=1, description="the stage fails when a larger share of the answers can't be read"
    )
    accept: Accept = Field("isolated", description="what isolation is enough to run functions; unsafe runs them without")
    cpu_s: float = Field(5.0, gt=0, description="CPU seconds for one function and an answer; 5 is the code's timeout")
    memory_mb: int = Field(512, ge=16, description="memory of one function beyond the interpreter's own, MiB")

    @field_validator("seeds")
    @classmethod
    def _there_are_seeds(cls, seeds: str | list[str]) -> str | list[str]:
        if isinstance(seeds, list) and not any(seed.strip() for seed in seeds):
            raise ValueError("the list holds no constraint; write some, or leave `seeds` out for ours")
        return seeds


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


class Losses:
    """What becomes of constraints, functions and cases on their way, for the summary."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.functions: Counter[str] = Counter()
        self.cases: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()

    def lose(self, candidate: Candidate, reason: str) -> None:
        """Counts a constraint as lost."""
        self.lost[reason] += 1
        if len(shown := self.examples.setdefault(reason, [])) < 3:
            shown.append(candidate.text)

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest; `yield` and `lost` count constraints."""
        return {
            "yield": dict(self.steps), "lost": dict(self.lost), "lost_examples": dict(self.examples),
            "lines": dict(self.lines), "functions": dict(self.functions), "cases": dict(self.cases),
        }  # fmt: skip


def run(config: ConstraintsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the constraints that kept a function, as prompts of the task `follow`."""
    templates = load_templates(config.templates, SHIPPED, TEMPLATES)
    summary: dict[str, Any] = {}
    return Result(_rows(config, read_seeds(config.seeds), templates, tools, summary), summary)


def _rows(
    config: ConstraintsConfig,
    seeds: Sequence[str],
    templates: Mapping[str, str],
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    losses = Losses()
    budget = ErrorBudget("constraints", config.max_error_share)
    candidates = augmented(config, seeds, templates["augment"], tools, losses, budget)
    losses.steps.update(seeds=len(seeds), constraints=len(candidates), written=0, agreed=0, told_back=0, kept=0)
    tools.progress.start(len(candidates), "constraints")
    with Sandbox(accept=config.accept, cpu_s=config.cpu_s, memory_mb=config.memory_mb) as sandbox:
        for line in sandbox.lines():
            tools.progress.say(line)
        written = _written(config, candidates, templates["verifier"], tools, losses, budget)
        validated = _validated(config, written, sandbox, losses)
        told_back = _told_back(config, validated, templates["back"], tools, losses, budget)
        for candidate in _related(config, told_back, templates["relation"], tools, losses, budget):
            losses.steps["kept"] += 1
            losses.functions["kept"] += len(candidate.functions)
            yield library_row(candidate)
            tools.progress.advance(losses.steps["kept"] + losses.lost.total() - _done(tools), kept=losses.steps["kept"])
        summary.update(losses.summary(), sandbox=sandbox.report)
    budget.check()
    if not losses.steps["kept"]:
        raise DataError(
            f"constraints: none of {len(candidates)} constraints kept a function "
            f"({', '.join(f'{why}: {count}' for why, count in losses.lost.most_common())}); ask for more functions "
            "(verifiers), lower min_functions, min_cases, case_kept or function_kept, or take a better writer"
        )
