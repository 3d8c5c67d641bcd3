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
asked about; `both_outcomes` refuses cases of one outcome and functions that say the same to all, for these tell nothing
apart; what can't be read is asked for again; `max_functions` keeps the most accurate of the functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from align.core.asking import load_templates
from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.sandbox import Accept, Sandbox
from align.core.stage import Asks, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise, stable_hash
from data_synthesis.autoif import PresetConfig, Rule
from data_synthesis.constraint_steps import STEPS, Candidate, Losses, augmented, related, told_back, validated, written
from data_synthesis.sampling import ErrorBudget

SHIPPED = Path(__file__).parent / "templates" / "constraints"
TEMPLATES = {
    "augment": ["seeds", "count"], "verifier": ["constraint"], "back": ["function"], "relation": ["constraint", "back"],
}  # fmt: skip


class ConstraintsConfig(PresetConfig):
    """Settings of `constraints`."""

    seeds: str | list[str] = Field(
        "default", description="constraints to begin with: a list, a file with one on each line, or default for ours"
    )
    templates: str = Field(
        "default", description="what the models are asked: a shipped set's name (default, tiny), or a folder with any "
        "of augment.txt, verifier.txt, back.txt and relation.txt",
    )  # fmt: skip
    new: int = Field(
        100, ge=0, description="constraints asked for in one answer (paper: 100, code: 50); 0: seeds alone"
    )
    shown: int | None = Field(None, ge=1, description="seeds shown in one request; all of them by default")
    answers: int = Field(1, ge=1, description="answers to each request for constraints")
    max_words: int = Field(60, ge=1, description="a longer constraint is left out; of Chinese, characters are counted")
    verifiers: int = Field(8, ge=1, description="functions with cases asked for of each constraint; the sample has 8")
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
        True, description="a constraint whose kept cases are all true, or all false, is lost, and a function that says "
        "the same to all of them is dropped [our choice; false is AutoIF's]",
    )  # fmt: skip
    max_functions: int | None = Field(
        None, ge=1, description="most functions kept of a constraint, the most accurate (paper: all, code: 3)"
    )
    temperature: float = Field(
        0.8, ge=0, le=5, description="sampling temperature of new constraints and functions; all else is asked greedily"
    )
    max_tokens: int = Field(4096, ge=1, description="most new tokens of an answer; one cut off is not read")
    attempts: int = Field(3, ge=1, description="samples asked for until an answer can be read")
    json_answers: bool = Field(
        False, description="let the models write nothing but JSON where JSON is asked for; only for engines with "
        "structured output",
    )  # fmt: skip
    max_error_share: float = Field(
        0.25, ge=0, le=1, description="the stage fails when a larger share of the answers can't be read"
    )
    accept: Accept = Field(
        "isolated", description="what isolation is enough to run functions; unsafe runs them without"
    )
    cpu_s: float = Field(5.0, gt=0, description="CPU seconds for one function and an answer; 5 is the code's timeout")
    memory_mb: int = Field(512, ge=16, description="memory of one function beyond the interpreter's own, MiB")

    @field_validator("seeds")
    @classmethod
    def _there_are_seeds(cls, seeds: str | list[str]) -> str | list[str]:
        if isinstance(seeds, list) and not any(seed.strip() for seed in seeds):
            raise ValueError("the list holds no constraint; write some, or leave `seeds` out for ours")
        return seeds


def run(config: ConstraintsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the constraints that kept a function, as prompts of the task `follow`."""
    templates = load_templates(config.templates, SHIPPED, TEMPLATES)
    summary: dict[str, Any] = {"preset": config.preset}
    return Result(_rows(config, read_seeds(config.seeds), templates, tools, summary), summary)


def _rows(
    config: ConstraintsConfig,
    seeds: Sequence[str],
    templates: Mapping[str, str],
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    losses = Losses(tools.progress)
    budget = ErrorBudget("constraints", config.max_error_share)
    candidates = augmented(config, seeds, templates["augment"], tools, losses, budget)
    losses.steps.update(dict.fromkeys(STEPS, 0) | {"seeds": len(seeds), "constraints": len(candidates)})
    tools.progress.start(len(candidates), "constraints")
    with Sandbox(accept=config.accept, cpu_s=config.cpu_s, memory_mb=config.memory_mb) as sandbox:
        for line in sandbox.lines():
            tools.progress.say(line)
        left = written(config, candidates, templates["verifier"], tools, losses, budget)
        left = validated(config, left, sandbox, losses)
        left = told_back(config, left, templates["back"], tools, losses, budget)
        for candidate in related(config, left, templates["relation"], tools, losses, budget):
            losses.keep(candidate)
            yield library_row(candidate)
        summary.update(losses.summary(), sandbox=sandbox.report)
    budget.check()
    if not losses.steps["kept"]:
        raise DataError(
            f"constraints: none of {len(candidates)} constraints kept a function "
            f"({', '.join(f'{why}: {count}' for why, count in losses.lost.most_common())}); ask for more functions "
            "(verifiers), lower min_functions, min_cases, case_kept or function_kept, or take a better writer"
        )


def read_seeds(setting: str | list[str]) -> list[str]:
    """The seeds, without repetitions.

    Raises:
        DataError: the file can't be read, or holds none.
    """
    lines = setting
    if isinstance(setting, str):
        file = SHIPPED / "seeds.txt" if setting == "default" else Path(setting).expanduser()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(f"seeds {setting}: can't be read ({problem}); a text with one constraint a line") from None
    seeds = {normalise(line): line.strip() for line in reversed(lines) if line.strip()}
    if not seeds:
        raise DataError(f"seeds {setting}: holds no constraint; write one on each line")
    return list(reversed(seeds.values()))


def library_row(candidate: Candidate) -> Row:
    """A row of the library: a prompt that holds the constraint alone, with all that checks it."""
    number = stable_hash(f"constraint\n{normalise(candidate.text)}")
    reference = {"constraint_id": number, "constraint": candidate.text, "functions": candidate.functions}
    return {
        "prompt_id": number,
        "prompt": [{"role": "user", "content": candidate.text}],
        "split": "train",
        "source": "constraints",
        "task": "follow",
        "family": "follow",
        "reference": json.dumps(reference, ensure_ascii=False),
        "constraint": candidate.text,
        "origin": candidate.origin,
        "functions": candidate.functions,
        "accuracies": candidate.accuracies,
        "cases": json.dumps(candidate.cases, ensure_ascii=False),
        "told_back": candidate.backs,
        "relations": candidate.relations,
        "raw": json.dumps(candidate.raw, ensure_ascii=False),
    }


def asks(config: ConstraintsConfig) -> dict[str, Asks]:
    """Of each constraint: the functions, each told back and related."""
    back = config.max_functions or config.verifiers
    return {"writer": Asks(config.verifiers + back, config.max_tokens), "judge": Asks(back, config.max_tokens)}


STAGE = Stage(
    name="constraints",
    summary="constraints on the form of answers, with functions that check them, cross-validated (AutoIF)",
    config=ConstraintsConfig,
    needs={},
    gives=Kind.PROMPTS,
    run=run,
    engines={
        "writer": "the model that writes constraints and functions, and says what a function checks",
        "judge": "the model that says whether that contradicts the constraint",
    },
    reads=("seeds", "templates"),
    asks=asks,
    adds=("constraint", "origin", "functions", "accuracies", "cases", "told_back", "relations", "raw"),
)
