"""Stage `back-translate`: instruction back-translation (Li et al., arXiv:2308.06259), a text to its instruction.

Self-augmentation (2.2): a backward model p(x | y), fine-tuned on demonstrations turned round (`reverse`), gives an
instruction x for every text y. Most of these pairs are poor, and training on all of them gains nothing (3.3).
Self-curation (2.3): the model of the round rates each pair from 1 to 5, with its reasons first; those of at least 4.5
are `kept`. The next model is trained on the seed and on what was kept, and rates *the same* pairs again: so a second
round takes the first one's result as `candidates`, and no backward model. The paper has two rounds.

The paper tells seed and made pairs apart by a system prompt in front of each; `system` is the made pairs'.

Differs from the paper: no system prompt by default; the votes of several ratings may be averaged (`judge_votes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from align.core.asking import Question, ask_each, load_template
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.passages import Passage, PassageConfig, passages_of
from data_synthesis.repurposed import (
    INSTRUCTION_SCHEMA,
    Yield,
    decided,
    judged,
    read_instruction,
    repurposed_row,
    unsampled,
)
from data_synthesis.sampling import ErrorBudget
from reward.judge import JudgeConfig, filled

TEMPLATES = Path(__file__).parent / "templates"


class BackTranslateConfig(JudgeConfig, PassageConfig):
    """Settings of `back-translate`."""

    template: str = Field(
        "backward", description="how an instruction is asked for: a shipped template's name, a file, or a text, with "
        "{answer}; the same as in reverse",
    )  # fmt: skip
    system: str = Field("", description="a system prompt of the made pairs, which tells them from the seed's")
    max_instruction_words: int = Field(200, ge=1, description="longer instructions count as unreadable")
    temperature: float = Field(0.7, ge=0, le=5, description="sampling temperature of the backward model")
    max_tokens: int = Field(512, ge=1, description="most new tokens of an instruction")
    attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then the text is lost")
    json_answers: bool = Field(
        False, description="let the backward model write nothing but a JSON object with `instruction`; for an untuned "
        "model whose engine has structured output",
    )  # fmt: skip
    judge_template: str = Field(
        "curate", description="what the judge is asked: a shipped template's name, a file, or a text, with "
        "{instruction} and {completion}",
    )  # fmt: skip
    judge_highest: float = Field(5.0, description="highest score of the judge's scale; 5 is the paper's")
    judge_threshold: float = Field(4.5, description="a pair of at least this score is kept; 4.5 is the paper's")
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of answers can't be sampled or read"
    )


def run(config: BackTranslateConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives a row for each text that got an instruction, with its rating; `kept` are the good ones."""
    passages, candidates = inputs.get("passages"), inputs.get("candidates")
    first = isinstance(passages, Table) and candidates is None and "backward" in tools.engines
    again = isinstance(candidates, Table) and passages is None and "backward" not in tools.engines
    if not first and not again:
        raise DataError(
            "back-translate: give passages and the engine backward (the first round), or candidates alone, the result "
            "of the round before, which are rated again"
        )
    table = passages if first else candidates
    assert isinstance(table, Table)
    template = load_template(config.template, TEMPLATES, ["answer"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, template, table, first, tools, summary), summary)


def _rows(
    config: BackTranslateConfig, template: str, table: Table, first: bool, tools: Tools, summary: dict[str, Any]
) -> Iterator[Row]:
    counts = Yield("asked", "written", "kept")
    skipped: Counter[str] = Counter()
    scores: Counter[float] = Counter()
    tools.progress.start(None if first else len(table), "pairs")
    if first:
        rows = augmented(passages_of(table, config, skipped), config, template, tools, counts)
    else:
        rows = to_rate_again(table, counts)
    for row in judged(rows, tools.engines["judge"], config, tools.seed, "back-translate", config.max_error_share):
        row["scores"] = [*(row["scores"] or []), row["score"]]
        counts.judged(row)
        if row["score"] is not None:
            scores[row["score"]] += 1
        yield row
        tools.progress.advance(1, kept=counts.steps["kept"])
    summary.update(counts.summary(), pairs_by_score=dict(sorted(scores.items())), skipped=dict(skipped))
    counts.check("back-translate", table.name, skipped)


def augmented(
    passages: Iterable[Passage], config: BackTranslateConfig, template: str, tools: Tools, counts: Yield
) -> Iterator[Row]:
    """Yields a pair for each text that the backward model gave an instruction for: self-augmentation."""
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    budget = ErrorBudget("back-translate", config.max_error_share)
    schema = INSTRUCTION_SCHEMA if config.json_answers else None
    backward = tools.engines["backward"]

    def read(said: str) -> str:
        return read_instruction(said, config.max_instruction_words, bare=not config.json_answers)

    def questions() -> Iterator[tuple[Passage, list[Question[str]]]]:
        for passage in passages:
            counts.steps["asked"] += 1
            yield passage, [Question(filled(template, {"answer": passage.text}), read, schema)]

    for passage, ((answer,),) in ask_each(backward, questions(), params, config.attempts, whole=True):
        budget.count(answer.value is None, answer.problem)
        if answer.value is None:
            counts.lost[unsampled(answer.problem)] += 1
            continue
        row = repurposed_row(passage, answer.value, config.system, "back-translate")
        row |= {"written_by": backward.generator, "raw_instruction": answer.text, "scores": None}
        yield decided(row, None, counts)
    budget.check()


def to_rate_again(table: Table, counts: Yield) -> Iterator[Row]:
    """Yields the pairs of an earlier round as they were before they were rated.

    Raises:
        DataError: the rows are no pairs of this stage.
    """
    if "scores" not in table.columns:
        raise DataError(
            f"back-translate: {table.name} has no column `scores`, so it is no round of back-translate; it has "
            f"{', '.join(table.columns)}. To rate other pairs, use verify with the task judge"
        )
    for row in table.rows():
        counts.steps["asked"] += 1
        yield decided(dict(row), None, counts)


def asks(config: BackTranslateConfig) -> dict[str, Asks]:
    """An instruction for each passage, and the votes on it; how many passages a text has is known when it is read."""
    return {
        "backward": Asks(1, config.max_tokens),
        "judge": Asks(config.judge_votes, config.judge_max_tokens),
    }


STAGE = Stage(
    name="back-translate",
    summary="texts with the instructions that a backward model finds for them, rated; the best ones kept",
    config=BackTranslateConfig,
    needs={
        "passages": Need(
            None, "texts: a folder of .txt or .md files, or rows with a column of text or answers", optional=True
        ),
        "candidates": Need(Kind.COMPLETIONS, "an earlier round's result, to be rated by a newer judge", optional=True),
    },
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "backward": "the model that gives an instruction for a text; not in a later round",
        "judge": "the model that rates the pairs: in each round the newest one",
    },
    optional_engines=("backward",),
    reads=("template", "judge_template"),
    asks=asks,
    adds=(
        "source_row", "start", "end", "license", "passage_id", "parent_id", "written_by", "raw_instruction", "kept",
        "score", "scores", "judgement",
    ),
)  # fmt: skip
