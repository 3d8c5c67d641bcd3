"""Stage `lookalikes`: harmless requests that look harmful, against over-refusal.

A model that was taught to refuse harmful requests soon refuses harmless ones that sound alike ("How do I kill a Python
process?"). For each harmful prompt a model writes such a request, which then goes the same way as all prompts, through
`constitute` above all: its refusals are rejected there, its helpful answers kept. A list of our own can be added
(`seeds`). `kind` records what each prompt is, benign or harmful.

Differs from the report, which has nothing of it: the idea is that of test sets for exaggerated safety [our choice].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from align.core.asking import Question, ask_each, load_templates
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise, prompt_id_of, words
from data_synthesis.answers import RULED, read_instruction, read_word, schema_of, why_lost
from data_synthesis.constitution import kind_of
from data_synthesis.eliminations import Limits, elimination
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.stemming import stem
from reward.judge import filled, verdict_schema

TEMPLATES = Path(__file__).parent / "templates" / "lookalikes"
NEEDS = {"lookalike": ("instruction",), "kind": ("instruction",)}
"""The templates of a set, and the placeholders that each must have."""
KINDS = ("benign", "harmful")
UNLIKE = "shares no word with the harmful one"
TWIN = "the same as another prompt"
GONE = ("answer", "tags", "raw_tags")
"""Columns that don't hold of a look-alike."""


class LookalikesConfig(StageConfig):
    """Settings of `lookalikes`."""

    per_prompt: int = Field(1, ge=1, description="look-alikes asked for of each harmful prompt")
    seeds: str = Field(
        "none", description="requests that are added beside: none, default (the shipped list), or a YAML file with a "
        "list of texts",
    )  # fmt: skip
    give: Literal["all", "new"] = Field("all", description="all: the prompts that came in too; new: look-alikes only")
    kind: str = Field(
        "kind", description="the column that says whether a prompt is benign (safe, harmless) or harmful (unsafe); a "
        "reference of the task `principle` says so itself",
    )  # fmt: skip
    templates: str = Field(
        "default", description="what writer and judge are asked: a shipped set (default, tiny), or a folder"
    )
    writer_json: bool = Field(
        False, description="let writer and judge write nothing but the JSON object that the templates ask for; only "
        "for engines with structured output",
    )  # fmt: skip
    temperature: float = Field(1.0, ge=0, le=5, description="sampling temperature of the writer")
    max_tokens: int = Field(256, ge=1, description="most new tokens of an answer; one cut off is not read")
    attempts: int = Field(3, ge=1, description="samples of a look-alike, or of a judgement, until one can be used")
    max_words: int = Field(100, ge=1, description="most words of a look-alike")
    splits: list[Split] = Field(["train"], min_length=1, description="prompts of these splits get look-alikes")
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of answers can't be had or read"
    )


def run(config: LookalikesConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives prompts with their `kind`, each harmful one followed by its look-alikes, and the seeds at the end."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    if config.kind != "kind" and config.kind not in table.columns:
        raise DataError(
            f"lookalikes: kind={config.kind}: {table.name} has no such column; it has {', '.join(table.columns)}"
        )
    templates = load_templates(config.templates, TEMPLATES, NEEDS)
    summary: dict[str, Any] = {}
    return Result(_rows(config, templates, read_seeds(config.seeds), table, tools, summary), summary)


def _rows(
    config: LookalikesConfig,
    templates: Mapping[str, str],
    seeds: list[str],
    table: Table,
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    budget = ErrorBudget("lookalikes", config.max_error_share)
    steps = dict.fromkeys(("prompts", "harmful", "asked", "passed the rules", "kept"), 0)
    lost: Counter[str] = Counter()
    seen = {normalise(last_user_text(row)) for row in table.rows(["prompt_id", "prompt"])}

    def tell() -> None:
        summary.update({"yield": dict(steps)}, lost=dict(lost), seeds=len(seeds))

    written = _written(config, templates["lookalike"], table, tools, budget)
    tools.progress.start(len(table), "prompts")
    for row, texts, problems in _judged(config, templates["kind"], written, tools, budget, seen, steps):
        steps["prompts"] += 1
        lost.update(problems)
        steps["kept"] += len(texts)
        if config.give == "all":
            yield {**_blank(row), "kind": kind_of(row, config.kind) or row.get("kind")}
        for text, raw in texts:
            yield _lookalike(row, text, raw, tools.engines["writer"].generator)
        tools.progress.advance(1, kept=steps["kept"])
        tell()
    for text in seeds:
        if normalise(text) not in seen:
            yield _seed(text, table.columns)
    tell()
    budget.check()
    if not steps["harmful"] and not seeds:
        raise DataError(
            f"lookalikes: {table.name} has no prompt that is known to be harmful; name the column that says so with "
            "kind=COLUMN (values harmful or unsafe), or add a list with seeds=default"
        )


def _written(
    config: LookalikesConfig, template: str, table: Table, tools: Tools, budget: ErrorBudget
) -> Iterator[tuple[Row, list[tuple[str | None, str, str]]]]:
    """Yields each prompt with what the writer made of it: text or None, raw answer, and the problem of a failed one."""
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    schema = schema_of(["instruction"]) if config.writer_json else None

    def question(row: Row) -> list[Question[str]]:
        if kind_of(row, config.kind) != "harmful" or row["split"] not in config.splits:
            return []
        instruction = last_user_text(row)
        rule = partial(unlike, instruction, template=template, limits=Limits(1, config.max_words))
        prompt = filled(template, {"instruction": instruction})
        return [Question(prompt, partial(read_instruction, rule=rule), schema)]

    asked = ((row, question(row)) for row in table.rows())
    for row, answers in ask_each(
        tools.engines["writer"], asked, params, config.attempts, votes=config.per_prompt, whole=True
    ):
        found: list[tuple[str | None, str, str]] = []
        for answer in (answer for votes in answers for answer in votes):
            budget.count(answer.value is None and not answer.problem.startswith(RULED), answer.problem)
            found.append((answer.value, answer.text, why_lost(answer.problem) if answer.value is None else ""))
        yield row, found


def _judged(
    config: LookalikesConfig,
    template: str,
    written: Iterator[tuple[Row, list[tuple[str | None, str, str]]]],
    tools: Tools,
    budget: ErrorBudget,
    seen: set[str],
    steps: dict[str, int],
) -> Iterator[tuple[Row, list[tuple[str, str]], list[str]]]:
    """Yields each prompt with its look-alikes (text, raw answer) and the reasons why others were lost."""
    judge = tools.engines.get("judge")
    schema = verdict_schema("verdict", {"enum": list(KINDS)}) if config.writer_json else None

    def distinct() -> Iterator[tuple[tuple[Row, list[tuple[str, str]], list[str]], list[Question[str]]]]:
        for row, found in written:
            texts, problems = [], [problem for value, _, problem in found if value is None]
            for value, raw, _ in found:
                if value is not None and (key := normalise(value)) in seen:
                    problems.append(TWIN)
                elif value is not None:
                    seen.add(key)
                    texts.append((value, raw))
            steps["harmful"] += bool(found)
            steps["asked"] += len(found)
            steps["passed the rules"] += len(texts)
            prompts = (filled(template, {"instruction": text}) for text, _ in texts)
            questions = [Question(prompt, lambda said: read_word(said, KINDS), schema) for prompt in prompts]
            yield (row, texts, problems), questions

    if judge is None:
        yield from (item for item, _ in distinct())
        return
    params = SamplingParams(max_tokens=config.max_tokens, temperature=0.0, seed=tools.seed)
    for (row, texts, problems), votes in ask_each(judge, distinct(), params, config.attempts, whole=True):
        kept = []
        for one, (answer,) in zip(texts, votes, strict=True):
            budget.count(answer.value is None, answer.problem)
            if answer.value == "benign":
                kept.append(one)
            else:
                problems.append("the judge can't be read" if answer.value is None else "harmful, says the judge")
        yield row, kept, problems


def unlike(harmful: str, text: str, template: str, limits: Limits) -> str | None:
    """Why a text is no look-alike of a harmful request; None where no rule speaks against it.

    The elimination rules of `evolve` for a new one, but for its length; and the two must share a word (its stem)
    of three letters or more, or a Chinese character: else nothing looks alike.
    """
    problem = elimination(harmful, text, limits, template, breadth=True)
    if problem is not None and not problem.startswith("grows"):
        return problem
    if len(words(text)) > limits.max_words:
        return "too long"
    telling = [{stem(w) for w in words(one) if len(w) >= 3 or not w.isascii()} for one in (harmful, text)]
    return None if telling[0] & telling[1] else UNLIKE


def _lookalike(row: Row, text: str, raw: str, generator: str) -> Row:
    """The row of a look-alike: of its parent the split, the system message and what travels on."""
    system = [turn for turn in row["prompt"][:1] if turn["role"] == "system"]
    prompt = [*system, {"role": "user", "content": text}]
    return {
        **_blank({name: value for name, value in row.items() if name not in GONE}),
        "prompt_id": prompt_id_of(prompt), "prompt": prompt, "task": None, "reference": None, "family": "lookalike",
        "kind": "benign", "parent_id": row["prompt_id"], "written_by": generator, "raw_lookalike": raw,
    }  # fmt: skip


def _seed(text: str, columns: tuple[str, ...] | list[str]) -> Row:
    prompt = [{"role": "user", "content": text}]
    return {
        **_blank(dict.fromkeys(columns)), "prompt_id": prompt_id_of(prompt), "prompt": prompt, "split": "train",
        "source": "look-alike seeds", "task": None, "reference": None, "family": "lookalike", "kind": "benign",
    }  # fmt: skip


def _blank(row: Row) -> Row:
    """A row with the columns that say how a look-alike came about."""
    return {"parent_id": None, "written_by": None, "raw_lookalike": None, **row}


def read_seeds(setting: str) -> list[str]:
    """The texts of a list of seeds.

    Raises:
        DataError: the file can't be read, or is no list of texts.
    """
    if setting == "none":
        return []
    path = TEMPLATES / "seeds.yaml" if setting == "default" else Path(setting).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise DataError(
            f"lookalikes: seeds {path}: can't be read ({problem}); give none, default or a file"
        ) from problem
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"lookalikes: seeds {path}: a list of texts was expected, found {found!r:.80}")
    return [text.strip() for text in found]


def asks(config: LookalikesConfig) -> dict[str, Asks]:
    """The look-alikes of each harmful prompt (of all, at most), and a judgement of each."""
    return {
        "writer": Asks(config.per_prompt, config.max_tokens),
        "judge": Asks(config.per_prompt, config.max_tokens, reads="writer"),
    }


STAGE = Stage(
    name="lookalikes",
    summary="harmless requests that look harmful, written after harmful ones",
    config=LookalikesConfig,
    needs={"prompts": Need(Kind.PROMPTS, "prompts, harmful ones among them that are known as such")},
    gives=Kind.PROMPTS,
    run=run,
    engines={
        "writer": "the model that writes harmless look-alikes",
        "judge": "a model that says whether a look-alike is harmless indeed; without one only rules do",
    },
    optional_engines=("judge",),
    reads=("templates", "seeds"),
    asks=asks,
    adds=("kind", "parent_id", "written_by", "raw_lookalike"),
)
