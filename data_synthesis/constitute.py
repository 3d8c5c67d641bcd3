"""Stage `constitute`: constitutional feedback in Qwen2's form (arXiv:2407.10671, 4.1.2) and in Constitutional AI's.

For a prompt and a principle the model is told once to follow the principle and once to deviate from it. Answers that
were told to be bad are easy to tell, so natural answers, of the policy itself, are mixed in: their failures teach most
as rejected ones. With `revisions` the model also criticises its natural answer by a principle drawn each round and
writes it again (Constitutional AI, arXiv:2212.08073, 3.1; data_synthesis/revise.py).

What an answer was told is no verdict: a judge, or the verifier of the prompt's task, checks all of them. A natural
answer and its revision are checked by the same principles, so that `pair` chooses the better of them, which is the
revision wherever it helped. Only an answer that passes is `kept` for demonstrations. The training prompt is the user's
own: principle, hint and critique are in sampled prompts only.

Refusing everything follows most principles, so a prompt's kind counts too, where it is known: with a judge, a benign
request that is refused and a harmful one that is helped with have failed, whatever their principle says; and how often
benign and harmful prompts are helped with and refused is reported apart.

Differs from the report: it gives no procedure; this is our reading of its sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.core.asking import load_template, load_templates
from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.constitution import Principle, PromptKind, check_ids, kind_of, read_constitution
from data_synthesis.principled import (
    LEAK,
    NOT_SAMPLED,
    Answer,
    Variant,
    check,
    sampled,
    tell_effects,
    variants_of,
    with_revisions,
)
from data_synthesis.refusals import Rates
from data_synthesis.revise import NO_REVISION
from data_synthesis.sampling import (
    ErrorBudget,
    SamplingConfig,
    Tally,
    completion_row,
    wanted,
)
from reward.judge import Judge, JudgeConfig
from reward.verifiers import Verifiers

TEMPLATES = Path(__file__).parent / "templates" / "constitute"
NEEDS = {
    "follow": ("instruction", "hint"),
    "critique": ("instruction", "completion", "principle"),
    "revision": ("instruction", "completion", "critique"),
    "refusal": ("instruction", "completion"),
}
"""The templates of a set, and the placeholders that each must have."""
BLOCK = 256
"""Prompts whose answers are sampled, revised and checked together."""


class ConstituteConfig(SamplingConfig, JudgeConfig):
    """Settings of `constitute`."""

    constitution: str | list[Principle] = Field(
        "default", description="a list of principles with id, text, aligned, deviating and, if wanted, families and "
        "kinds; or a YAML file of that form; default is the shipped one, tiny that of the embedded world",
    )  # fmt: skip
    templates: str = Field(
        "default", description="what the model is told, and what it and the judge are asked: a shipped set (default, "
        "tiny), or a folder with some of its files",
    )  # fmt: skip
    template: str | None = Field(
        None, description="how the last user turn is put to the model, in the place of the set's `follow`: a file or a "
        "text, with {instruction} and {hint} (the principle's aligned or deviating line), perhaps {principle}",
    )  # fmt: skip
    raw: bool = Field(
        False, description="put the filled template to the model as raw text, without its chat template: for a base "
        "model, which continues texts of principles, questions and answers (needs natural=false)",
    )  # fmt: skip
    told: bool = Field(True, description="sample answers that are told to follow, and to deviate from, a principle")
    principles: int = Field(1, ge=1, description="principles drawn for each prompt; 1 is Constitutional AI's")
    samples: int = Field(1, ge=1, description="completions of each kind for each prompt and principle")
    natural: bool = Field(True, description="also sample the prompt as it is, for failures that nobody asked for")
    revisions: int = Field(
        0, ge=0, description="rounds of critique and revision of each natural answer, a principle drawn for each; the "
        "public recipe of Constitutional AI has 1",
    )  # fmt: skip
    attempts: int = Field(3, ge=1, description="samples of a critique or revision until one can be used")
    kind: str = Field(
        "kind", description="the column that says whether a prompt is benign (safe, harmless) or harmful (unsafe); a "
        "reference of the task `principle` says so itself",
    )  # fmt: skip
    refusals: Literal["judge", "words"] = Field(
        "judge", description="who tells a refusal, for the rates by kind: the judge, where there is one; or the words "
        "that an answer begins with",
    )  # fmt: skip
    judge_template: str = Field(
        "principle", description="what the judge is asked: a shipped template's name, a file, or a text, with "
        "{completion}, {principle} and {instruction}",
    )  # fmt: skip

    @model_validator(mode="after")
    def _there_is_something_to_sample(self) -> Self:
        if self.raw and self.natural:
            raise ValueError("raw=true is for a base model, which doesn't answer a bare prompt; set natural=false too")
        if self.revisions and not self.natural:
            raise ValueError("revisions are of natural answers; set natural=true too, or revisions=0")
        if not self.told and not self.natural:
            raise ValueError("told=false and natural=false leave nothing to sample; set one of them to true")
        return self


def run(config: ConstituteConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the completions of all variants with verdicts; `told` and `principle` say how each came about."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    if config.kind != "kind" and config.kind not in table.columns:
        raise DataError(
            f"constitute: kind={config.kind}: {table.name} has no such column; it has {', '.join(table.columns)}"
        )
    templates = load_templates(config.templates, TEMPLATES, NEEDS)
    if config.template is not None:
        templates["follow"] = load_template(config.template, TEMPLATES, NEEDS["follow"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, _principles(config), templates, table, tools, summary), summary)


def _principles(config: ConstituteConfig) -> Sequence[Principle]:
    if not isinstance(config.constitution, str):
        check_ids(config.constitution, "constitute: constitution")
        return config.constitution
    folder = {"default": TEMPLATES, "tiny": TEMPLATES / "tiny"}.get(config.constitution)
    return read_constitution(folder / "constitution.yaml" if folder else Path(config.constitution))


def _rows(
    config: ConstituteConfig,
    principles: Sequence[Principle],
    templates: Mapping[str, str],
    table: Table,
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    judge = Judge(tools.engines["judge"], config, tools.seed) if "judge" in tools.engines else None
    budget = ErrorBudget("constitute", config.max_error_share)
    skipped: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {}
    losses: Counter[str] = Counter()
    tally, rates = Tally(), Rates()

    def prompts() -> Iterator[tuple[Row, list[Variant]]]:
        for row in wanted(table.rows(), config.splits, skipped, verified=judge is None):
            variants = variants_of(row, principles, templates["follow"], config, tools.seed)
            if variants:
                yield row, variants
            else:
                skipped[f"no principle for the family {row['family']}"] += 1

    tools.progress.start(len(table), "prompts")
    remaining = prompts()
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        while block := list(islice(remaining, BLOCK)):
            answers = sampled(block, config, tools, budget)
            answers = with_revisions(answers, config, templates, tools, budget)
            check(answers, judge, verifiers, budget)
            tell_effects(answers, judge, config, templates["refusal"], tools, budget)
            for rows in _finished(answers, block, config.kind, rates):
                for row in rows:
                    outcomes.setdefault(row["told"], Counter())[row["verdict"]] += 1
                    losses[why_not_kept(row)] += 1
                tally.count(rows)
                yield from rows
                tools.progress.advance(1, passed=tally.yielded())
            told = {told: dict(counts) for told, counts in outcomes.items()}
            summary.update(tally.summary(), told=told, kinds=rates.summary(), skipped=dict(skipped))
            summary.update(_yield(len(table), tally, losses))
    tally.check("constitute", table.name, skipped)
    budget.check()


def _finished(
    answers: Iterable[Answer], block: Iterable[tuple[Row, list[Variant]]], column: str, rates: Rates
) -> Iterator[list[Row]]:
    """Yields the rows of each prompt."""
    of_prompt: dict[str, list[Row]] = {row["prompt_id"]: [] for row, _ in block}
    for answer in answers:
        rows = of_prompt[answer.row["prompt_id"]]
        verdict, told = answer.verdict, answer.variant.told
        done = completion_row(answer.row, len(rows), answer.completion, verdict, answer.generator)
        kind: PromptKind | None = kind_of(answer.row, column)
        done["told"] = told
        done["principle"] = ", ".join(dict.fromkeys(principle.id for principle in answer.variant.principles))
        # an answer that was to deviate and passes all the same shows that nothing was learned from the telling
        done["kept"] = verdict.verdict == "passed" and answer.completion.finish_reason == "stop" and told != "deviating"
        done.update(kind=kind, effect=answer.effect, critique="\n\n".join(answer.critiques) or None)
        if answer.problem is None:
            rates.count(kind, told, answer.effect, verdict.verdict == "passed")
        rows.append(done)
    yield from of_prompt.values()


def why_not_kept(row: Row) -> str:
    """Why a completion is no demonstration; empty where it is one."""
    if row["verdict"] == "error":
        known = (NOT_SAMPLED, NO_REVISION, LEAK)
        return next((reason for reason in known if row["detail"].startswith(reason)), "could not be checked")
    if row["kept"]:
        return ""
    if row["told"] == "deviating":
        return "told to deviate, and did" if row["verdict"] == "failed" else "told to deviate, and did not"
    return "failed its check" if row["verdict"] == "failed" else "cut off"


def _yield(prompts: int, tally: Tally, losses: Counter[str]) -> dict[str, Any]:
    """The steps from prompts to kept completions, and what was lost on the way."""
    lost = {reason: count for reason, count in losses.items() if reason}
    usable = tally.samples.total() - sum(lost.get(reason, 0) for reason in (NOT_SAMPLED, NO_REVISION, LEAK))
    steps = {
        "prompts": prompts, "sampled prompts": tally.prompts, "completions": tally.samples.total(), "usable": usable,
        "checked": tally.samples.total() - tally.errors, "passed": tally.passed.total(), "kept": tally.kept,
    }  # fmt: skip
    return {"yield": steps, "lost": lost}


def asks(config: ConstituteConfig) -> dict[str, Asks]:
    """An answer of each kind to each principle drawn, one without, critiques and revisions; and the votes on each."""
    told = 2 * config.principles * config.told * config.samples
    natural = config.natural * config.samples
    revised = natural * (config.revisions > 0)
    checked = told + (natural + revised) * max(1, config.revisions)
    on_refusals = (told + natural + revised) * (config.refusals == "judge")
    return {
        "sampler": Asks(told + natural + 2 * natural * config.revisions, config.max_tokens),
        "policy": Asks(natural, config.max_tokens),
        "judge": Asks(checked * config.judge_votes + on_refusals, config.judge_max_tokens, reads="sampler"),
    }


STAGE = Stage(
    name="constitute",
    summary="completions that follow and that deviate from principles, and revised ones, checked",
    config=ConstituteConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts; with a task and a reference where no judge is given")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that is told to follow and to deviate, and that criticises and revises",
        "policy": "the model whose natural answers are mixed in and revised; else the sampler",
        "judge": "a model that says whether the principle is followed; else the verifier of the prompt's task",
    },
    optional_engines=("policy", "judge"),
    reads=("constitution", "templates", "template", "judge_template"),
    asks=asks,
    adds=("finish_reason", "told", "principle", "kept", "kind", "effect", "critique"),
    version=3,
)
