"""Stage `constitute`: constitutional feedback in Qwen2's form (arXiv:2407.10671, 4.1.2).

For a prompt and a principle the model is told once to follow the principle and once to deviate from it. What it was
told is no verdict: a judge, or the verifier of the prompt's task, checks both, and only an answer that passes is `kept`
for demonstrations. The training prompt is the user's own: principle and hint are in the sampled prompt only. Answers
that were told to be bad are easy to tell, so the model's natural answers are mixed in, checked the same way: their
failures teach most as rejected ones. A principle is drawn for each prompt, as in Constitutional AI (arXiv:2212.08073).

Differs from the report: it gives no procedure; this is our reading of its sentence.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from align.core.asking import fill, load_template
from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import in_order
from align.core.errors import DataError
from align.core.records import Kind, Row, Verdict
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise
from data_synthesis.sampling import ErrorBudget, SamplingConfig, Tally, answered, completion_row, last_user_text, wanted
from reward.judge import Judge, JudgeConfig
from reward.verifiers import Verifiers

TEMPLATES = Path(__file__).parent / "templates"
Told = Literal["aligned", "deviating", "natural"]


class Principle(StageConfig):
    """One line of a constitution; see the shipped file for the meaning of its fields."""

    id: str = Field(min_length=1, description="names the principle in the rows")
    text: str = Field(min_length=1, description="the principle itself; a judge sees it")
    aligned: str = Field(min_length=1, description="what the model is told so that it follows the principle")
    deviating: str = Field(min_length=1, description="what the model is told so that it doesn't")
    families: tuple[str, ...] = Field((), description="only for prompts of these families; all, where it is left out")


class ConstituteConfig(SamplingConfig, JudgeConfig):
    """Settings of `constitute`."""

    constitution: str | list[Principle] = Field(
        "default", description="a list of principles with id, text, aligned, deviating and, if wanted, families; or a "
        "YAML file of that form; default is the shipped one",
    )  # fmt: skip
    template: str = Field(
        "follow", description="how the last user turn is put to the model: a shipped template's name, a file, or a "
        "text, with {instruction} and {hint} (the principle's aligned or deviating line), perhaps {principle}",
    )  # fmt: skip
    raw: bool = Field(
        False, description="put the filled template to the model as raw text, without its chat template: for a base "
        "model, which continues texts of principles, questions and answers (needs natural=false)",
    )  # fmt: skip
    principles: int = Field(1, ge=1, description="principles drawn for each prompt; 1 is Constitutional AI's")
    samples: int = Field(1, ge=1, description="completions of each kind for each prompt and principle")
    natural: bool = Field(True, description="also sample the prompt as it is, for failures that nobody asked for")
    judge_template: str = Field(
        "principle", description="what the judge is asked: a shipped template's name, a file, or a text, with "
        "{completion}, {principle} and {instruction}",
    )  # fmt: skip

    @model_validator(mode="after")
    def _natural_answers_are_chat(self) -> Self:
        if self.raw and self.natural:
            raise ValueError("raw=true is for a base model, which doesn't answer a bare prompt; set natural=false too")
        return self


@dataclass(frozen=True)
class Variant:
    """One way in which a prompt is put to the model."""

    told: Told
    principle: Principle
    prompt: Prompt


def run(config: ConstituteConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the completions of all variants with verdicts; `told` and `principle` say how each came about."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    if isinstance(config.constitution, str):
        shipped = config.constitution == "default"
        principles = read_constitution(TEMPLATES / "constitution.yaml" if shipped else Path(config.constitution))
    else:
        principles = config.constitution
    template = load_template(config.template, TEMPLATES, ["instruction", "hint"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, principles, template, table, tools, summary), summary)


def _rows(
    config: ConstituteConfig,
    principles: Sequence[Principle],
    template: str,
    table: Table,
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    engine = tools.engines["sampler"]
    judge = Judge(tools.engines["judge"], config, tools.seed) if "judge" in tools.engines else None
    budget = ErrorBudget("constitute", config.max_error_share)
    skipped: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {}
    tally = Tally()

    def variants_of_rows() -> Iterator[tuple[Row, list[Variant]]]:
        for row in wanted(table.rows(), config.splits, skipped, verified=judge is None):
            variants = variants_of(row, principles, template, config, tools.seed)
            if not variants:
                skipped[f"no principle for the family {row['family']}"] += 1
            else:
                yield row, variants

    tools.progress.start(len(table), "prompts")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        groups = _sampled(variants_of_rows(), engine, config.samples, config.params(tools.seed), budget)
        for group, verdicts in checked(groups, judge, verifiers):
            rows = [
                _finished(group.row, index, variant, completion, verdict, engine.generator)
                for index, ((variant, completion), verdict) in enumerate(zip(group.answers, verdicts, strict=True))
            ]
            for row in rows:
                if row["verdict"] == "error" and not row["detail"].startswith((NOT_SAMPLED, LEAK)):
                    budget.count(True, row["detail"], seen_before=True)
                outcomes.setdefault(row["told"], Counter())[row["verdict"]] += 1
            tally.count(rows)
            yield from rows
            tools.progress.advance(1, passed=tally.yielded())
            told = {told: dict(counts) for told, counts in outcomes.items()}
            summary.update(tally.summary(), told=told, skipped=dict(skipped))
    tally.check("constitute", table.name, skipped)
    budget.check()


def variants_of(
    row: Row, principles: Sequence[Principle], template: str, config: ConstituteConfig, seed: int
) -> list[Variant]:
    """The ways in which a prompt is put to the model: told to follow, told to deviate, and as it is."""
    fitting = [p for p in principles if not p.families or row["family"] in p.families]
    drawn = random.Random(f"{seed}/{row['prompt_id']}").sample(fitting, min(config.principles, len(fitting)))
    variants: list[Variant] = []
    for principle in drawn:
        for told, hint in (("aligned", principle.aligned), ("deviating", principle.deviating)):
            values = {"instruction": last_user_text(row), "hint": hint, "principle": principle.text}
            text = fill(template, values)
            prompt: Prompt = text if config.raw else [*row["prompt"][:-1], {"role": "user", "content": text}]
            variants.append(Variant("aligned" if told == "aligned" else "deviating", principle, prompt))
    if drawn and config.natural:
        variants.append(Variant("natural", drawn[0], row["prompt"]))
    return variants


@dataclass(frozen=True)
class Group:
    """A prompt with the completions of all its variants."""

    row: Row
    answers: list[tuple[Variant, Completion]]


def _sampled(
    rows: Iterable[tuple[Row, list[Variant]]], engine: Engine, samples: int, params: SamplingParams, budget: ErrorBudget
) -> Iterator[Group]:
    def sample(variants: Iterable[Variant]) -> Iterator[list[Completion]]:
        return (completions for _, completions in in_order(engine, (v.prompt for v in variants), samples, params))

    for (row, variants), replies in answered(rows, lambda pair: pair[1], sample):
        answers = [(v, one) for v, completions in zip(variants, replies, strict=True) for one in completions]
        for _, completion in answers:
            budget.count(completion.finish_reason == "error", completion.error)
        yield Group(row, answers)


NOT_SAMPLED, LEAK = "not sampled", "quotes the principle"


def problem_of(variant: Variant, completion: Completion) -> str | None:
    """Why a completion can't be used at all: it was not sampled, or it repeats what it was told in confidence."""
    if completion.finish_reason == "error":
        return f"{NOT_SAMPLED}: {completion.error}"
    said = normalise(completion.text)
    own = variant.principle
    lines = () if variant.told == "natural" else (own.text, own.aligned, own.deviating)
    return f"{LEAK} or its hint" if any(normalise(line) in said for line in lines if line) else None


def checked(
    groups: Iterable[Group], judge: Judge | None, verifiers: Verifiers
) -> Iterator[tuple[Group, list[Verdict]]]:
    """Yields each prompt's completions with their verdicts: the judge's where there is one, else the verifier's."""

    def usable(group: Group) -> list[tuple[Row, Variant, Completion]]:
        return [(group.row, v, one) for v, one in group.answers if problem_of(v, one) is None]

    def verdicts_of(items: Iterable[tuple[Row, Variant, Completion]]) -> Iterator[Verdict]:
        if judge is None:
            rows = ((row["task"], one.text, row["reference"], row["prompt"]) for row, _, one in items)
            return verifiers.verify_many(rows)
        values = (
            (None, {"instruction": row["prompt"], "principle": v.principle.text, "completion": one.text})
            for row, v, one in items
        )
        return (verdict for _, verdict in judge.judge_many(values))

    for group, found in answered(groups, usable, verdicts_of):  # usable ones are looked at, the others are errors
        given = iter(found)
        problems = [problem_of(variant, completion) for variant, completion in group.answers]
        yield group, [next(given) if problem is None else Verdict.error(problem) for problem in problems]


def _finished(row: Row, index: int, variant: Variant, completion: Completion, verdict: Verdict, generator: str) -> Row:
    done = completion_row(row, index, completion, verdict, generator)
    done["told"] = variant.told
    done["principle"] = variant.principle.id
    # an answer that was to deviate and passes all the same shows that nothing was learned from the telling
    done["kept"] = verdict.verdict == "passed" and completion.finish_reason == "stop" and variant.told != "deviating"
    return done


def read_constitution(path: Path) -> list[Principle]:
    """Reads a constitution.

    Raises:
        DataError: the file can't be read, or an entry lacks a field, has an unknown one, or repeats an id.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise DataError(f"constitution {path}: can't be read ({problem})") from problem
    if not isinstance(entries, list) or not entries:
        raise DataError(f"constitution {path}: a list of principles was expected, found {entries!r:.80}")
    principles: list[Principle] = []
    for number, entry in enumerate(entries, start=1):
        where = f"constitution {path}: principle {number}"
        try:
            principle = Principle.model_validate_json(json.dumps(entry))
        except ValidationError as invalid:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in invalid.errors())
            raise DataError(
                f"{where}: needs the texts id, text, aligned and deviating, and may have a list `families`; {wrong}"
            ) from invalid
        if any(known.id == principle.id for known in principles):
            raise DataError(f"{where}: the id {principle.id!r} is there twice")
        principles.append(principle)
    return principles


def asks(config: ConstituteConfig) -> dict[str, Asks]:
    """An answer of each kind to each principle drawn, and one without; and the votes on each."""
    samples = (2 * config.principles + config.natural) * config.samples
    return {
        "sampler": Asks(samples, config.max_tokens),
        "judge": Asks(samples * config.judge_votes, config.judge_max_tokens, reads="sampler"),
    }


STAGE = Stage(
    name="constitute",
    summary="completions that follow and that deviate from principles, checked",
    config=ConstituteConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts; with a task and a reference where no judge is given")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that is told to follow and to deviate",
        "judge": "a model that says whether the principle is followed; else the verifier of the prompt's task",
    },
    optional_engines=("judge",),
    reads=("constitution", "template", "judge_template"),
    asks=asks,
    adds=("finish_reason", "told", "principle", "kept"),
    version=2,
)
