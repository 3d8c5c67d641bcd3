"""Stage `repurpose`: texts that people wrote become answers (data repurposing, the Qwen2 report, 2407.10671, 4.1.2).

Good prose is rarely written to order. So passages of literature are kept as they stand, and a model writes the
instructions that they would answer, at several levels of detail: the same passage answers a bare wish and an exact
order. An instruction that gives the passage away teaches copying and is refused (see `leaks`), as is one that speaks
of a text that its reader won't see, or is not in the passage's script. With a judge the passage must also be a good
answer to the instruction.

Differs from the report: it names neither the levels (ours: sparse, medium, detailed), nor a check, nor a judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.core.asking import MalformedError, Question, ask_each, load_templates
from align.core.engines.base import SamplingParams
from align.core.records import Kind, Row
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import words
from data_synthesis.leaks import LeakConfig, leak
from data_synthesis.passages import Passage, PassageConfig, passages_of
from data_synthesis.repurposed import (
    INSTRUCTION_SCHEMA,
    Yield,
    decided,
    judged,
    other_script,
    points_at_text,
    read_instruction,
    readable,
    repurposed_row,
    unsampled,
)
from data_synthesis.sampling import ErrorBudget
from reward.judge import JudgeConfig, filled

TEMPLATES = Path(__file__).parent / "templates" / "repurpose"
Level = Literal["sparse", "medium", "detailed"]


class RepurposeConfig(JudgeConfig, LeakConfig, PassageConfig):
    """Settings of `repurpose`."""

    templates: str = Field(
        "default", description="how the instructions are asked for: a shipped set's name, or a folder with sparse.txt, "
        "medium.txt and detailed.txt, with {passage}, perhaps {mark} and {words} (of the passage)",
    )  # fmt: skip
    levels: list[Level] = Field(
        ["sparse", "medium", "detailed"], min_length=1, description="instructions written for each passage"
    )
    system: str = Field("", description="a system prompt that all made prompts get; none by default")
    check_script: bool = Field(
        True, description="refuse an instruction in another script than the passage's (English for Chinese)"
    )
    max_instruction_words: int = Field(200, ge=1, description="longer instructions are refused")
    temperature: float = Field(0.7, ge=0, le=5, description="sampling temperature of the writer")
    max_tokens: int = Field(512, ge=1, description="most new tokens of an instruction")
    attempts: int = Field(3, ge=1, description="samples asked for until an instruction can be read and isn't refused")
    json_answers: bool = Field(
        False, description="let the writer write nothing but the JSON object; for engines with structured output"
    )
    judge_template: str = Field(
        "fit", description="what the judge is asked: a shipped template's name, a file, or a text, with {instruction} "
        "and {completion}",
    )  # fmt: skip
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of answers can't be sampled or read"
    )


def run(config: RepurposeConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives a row for each instruction: the passage is its completion; refused ones have failed."""
    table = inputs["passages"]
    assert isinstance(table, Table)
    templates = load_templates(config.templates, TEMPLATES, {level: ["passage"] for level in config.levels})
    summary: dict[str, Any] = {}
    return Result(_rows(config, templates, table, tools, summary), summary)


def _rows(
    config: RepurposeConfig, templates: Mapping[str, str], table: Table, tools: Tools, summary: dict[str, Any]
) -> Iterator[Row]:
    counts = Yield("passages", "asked", "written", "not_refused", "kept")
    skipped: Counter[str] = Counter()
    levels = dict.fromkeys(config.levels, 0)
    tools.progress.start(None, "instructions")
    rows: Iterable[Row] = written(passages_of(table, config, skipped), config, templates, tools, counts)
    if "judge" in tools.engines:
        rows = judged(rows, tools.engines["judge"], config, tools.seed, "repurpose", config.max_error_share)
    for row in rows:
        counts.judged(row)
        levels[row["level"]] += row["kept"]
        yield row
        tools.progress.advance(1, kept=counts.steps["kept"])
    summary.update(counts.summary(), kept_by_level=levels, skipped=dict(skipped))
    counts.check("repurpose", table.name, skipped)


def written(
    passages: Iterable[Passage],
    config: RepurposeConfig,
    templates: Mapping[str, str],
    tools: Tools,
    counts: Yield,
) -> Iterator[Row]:
    """Yields a row for each instruction that the writer gave for a passage, one for each level.

    A refused instruction is asked for again; one that is refused to the last is a row that has failed.
    """
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    budget = ErrorBudget("repurpose", config.max_error_share)

    def accepted(said: str, passage: str) -> str:
        instruction = read_instruction(said, config.max_instruction_words)
        if refused := refusal(instruction, passage, config):
            raise MalformedError(": ".join(refused))
        return instruction

    def questions() -> Iterator[tuple[Passage, list[Question[str]]]]:
        schema = INSTRUCTION_SCHEMA if config.json_answers else None
        for passage in passages:
            more = {"words": str(len(words(passage.text)))}
            counts.steps["passages"] += 1
            counts.steps["asked"] += len(config.levels)
            yield (
                passage,
                [
                    Question(
                        filled(templates[level], {"passage": passage.text}, more),
                        partial(accepted, passage=passage.text),
                        schema,
                    )
                    for level in config.levels
                ],
            )

    for passage, answers in ask_each(tools.engines["writer"], questions(), params, config.attempts, whole=True):
        for level, (answer,) in zip(config.levels, answers, strict=True):
            instruction = answer.value or readable(answer, config.max_instruction_words)
            budget.count(instruction is None, answer.problem)
            if instruction is None:
                counts.lost[unsampled(answer.problem)] += 1
                continue
            counts.steps["written"] += 1
            row = repurposed_row(passage, instruction, config.system, "repurpose")
            row |= {"level": level, "written_by": tools.engines["writer"].generator, "raw_instruction": answer.text}
            refused = None if answer.value else refusal(instruction, passage.text, config)
            yield decided(row, refused, counts)
    budget.check()


def refusal(instruction: str, passage: str, config: RepurposeConfig) -> tuple[str, str] | None:
    """Why an instruction can't stand for a passage, in short and in full; None where it can."""
    if found := leak(instruction, passage, config):
        return "gives the passage away", found
    if points_at_text(instruction):
        return "speaks of a text that isn't there", instruction[:80]
    if config.check_script and (script := other_script(instruction, passage)):
        return "in another script than the passage", script
    return None


def asks(config: RepurposeConfig) -> dict[str, Asks]:
    """An instruction for each level, and the votes on each; the passages of a text can't be told before it is read."""
    levels = len(config.levels)
    return {
        "writer": Asks(levels, config.max_tokens),
        "judge": Asks(levels * config.judge_votes, config.judge_max_tokens),
    }


STAGE = Stage(
    name="repurpose",
    summary="passages that people wrote, with model-written instructions at three levels of detail",
    config=RepurposeConfig,
    needs={"passages": Need(None, "texts: a folder of .txt or .md files, or rows with a column of text or answers")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "writer": "the model that writes the instructions",
        "judge": "a model that says whether the passage is a good answer; else the checks alone decide",
    },
    optional_engines=("judge",),
    reads=("templates", "judge_template"),
    asks=asks,
    adds=(
        "source_row", "start", "end", "license", "passage_id", "parent_id", "level", "written_by", "raw_instruction",
        "refused", "kept", "score", "judgement",
    ),
)  # fmt: skip
