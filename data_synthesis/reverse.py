"""Stage `reverse`: demonstrations turned round, to train a backward model as in arXiv:2308.06259, 2.2.

The backward model p(x | y) gives the instruction x for an answer y. It is fine-tuned on the same seed demonstrations as
the forward one, with x and y in each other's place. What `back-translate` will ask it is asked here, in the same words.

Differs from the paper: the answer is put into a template and not given bare, so that a chat model knows what is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from align.core.asking import load_template
from align.core.errors import DataError
from align.core.records import Kind, Row, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from data_synthesis.sampling import last_user_text
from reward.judge import filled

TEMPLATES = Path(__file__).parent / "templates"


class ReverseConfig(StageConfig):
    """Settings of `reverse`."""

    template: str = Field(
        "backward", description="how an instruction is asked for: a shipped template's name, a file, or a text, with "
        "{answer}; the same as in back-translate",
    )  # fmt: skip


def run(config: ReverseConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives a demonstration of the instruction for each demonstration of an answer."""
    table = inputs["demonstrations"]
    assert isinstance(table, Table)
    template = load_template(config.template, TEMPLATES, ["answer"])
    summary: dict[str, Any] = {}
    return Result(_rows(template, table, tools, summary), summary)


def _rows(template: str, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    counts: Counter[str] = Counter()
    tools.progress.start(len(table), "demonstrations")
    for row in table.rows():
        tools.progress.advance()
        roles = [turn["role"] for turn in row["prompt"] if turn["role"] != "system"]
        if roles != ["user"]:
            # what was said before would have to be guessed from the answer too
            counts["several turns"] += 1
            continue
        counts["reversed"] += 1
        prompt = filled(template, {"answer": message_text(row["completion"])})
        yield {
            **row,
            "prompt_id": prompt_id_of(prompt),
            "parent_id": row["prompt_id"],
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": last_user_text(row)}],
        }
        summary.update(reversed=counts["reversed"])
    summary.update(reversed=counts["reversed"], left_out=counts["several turns"])
    if not counts["reversed"]:
        raise DataError(
            f"reverse: none of {len(table)} rows of {table.name} is an instruction and its answer "
            f"(several turns: {counts['several turns']}); give demonstrations of one turn"
        )


STAGE = Stage(
    name="reverse",
    summary="demonstrations turned round, answer to instruction, to train a backward model",
    config=ReverseConfig,
    needs={"demonstrations": Need(Kind.DEMONSTRATIONS, "instructions with good answers: the seed")},
    gives=Kind.DEMONSTRATIONS,
    run=run,
    reads=("template",),
    adds=("parent_id",),
)
