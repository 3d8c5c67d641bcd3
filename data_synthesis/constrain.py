"""Stage `constrain`: every constraint of a library put to some queries (AutoIF, arXiv:2406.13542, 3).

A prompt is a query with the constraint after it, in the last user turn; its task is `follow`, and the constraint's
functions are its reference. The library is what `constraints` gives, or any prompts that hold one constraint each, with
that task and reference. What is made here can be sampled and checked by every stage that verifies: `follow`, `reject`,
`evaluate`, `online-dpo`.

A query is drawn at random for a constraint, at most once for it. Its split is inherited, and its gold answer is not:
that knows nothing of the constraint.

Differs from the paper: how query and constraint are joined is ours (the paper says only that they are); a prompt that
would be one of `heldout` is left out.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import root_text, stable_hash
from data_synthesis.autoif import PresetConfig

CARRIED = ("source", "source_row", "tags")
"""Columns of a query that travel on, where it has them."""


class ConstrainConfig(PresetConfig):
    """Settings of `constrain`."""

    per_constraint: int = Field(16, ge=1, description="queries drawn for each constraint; 16 is AutoIF's")
    min_characters: int = Field(1, ge=1, description="shorter queries are passed by (paper: none are, code: 20)")
    max_characters: int | None = Field(
        None, ge=1, description="longer queries are passed by (paper: none are, code: 300)"
    )
    pass_rate: float = Field(
        0.5, ge=0, lt=1, description="a completion passes if more than this share of the functions say yes (paper: "
        "0.5, code: 0)",
    )  # fmt: skip
    splits: list[Split] = Field(["train"], min_length=1, description="queries of these splits are taken")

    @model_validator(mode="after")
    def _some_length_fits(self) -> Self:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters={self.max_characters} is below min_characters={self.min_characters}; no query fits"
            )
        return self


def run(config: ConstrainConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives a prompt for each constraint and query drawn for it, in the queries' order."""
    queries, library = inputs["queries"], inputs["constraints"]
    assert isinstance(queries, Table) and isinstance(library, Table)
    heldout = inputs.get("heldout")
    held = {root_text(row["prompt"]) for row in heldout.rows(["prompt"])} if isinstance(heldout, Table) else set()
    summary: dict[str, Any] = {"preset": config.preset}
    return Result(_rows(config, queries, library, held, tools, summary), summary)


def _rows(
    config: ConstrainConfig,
    queries: Table,
    library: Table,
    held: set[str],
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    skipped: Counter[str] = Counter()
    fitting = sum(_reason(config, row, skipped) is None for row in queries.rows(["prompt", "split"]))
    constraints = [_constraint(row, config) for row in library.rows(["prompt_id", "prompt", "task", "reference"])]
    if not fitting or not constraints:
        reasons = ", ".join(f"{why}: {count}" for why, count in skipped.most_common())
        raise DataError(
            f"constrain: {len(constraints)} constraints of {library.name} and {fitting} queries of {queries.name} "
            f"({reasons or 'the table is empty'}); both are needed. Give other queries, or mend splits, min_characters "
            "or max_characters"
        )
    # Numbers are kept and no texts, so the queries need not fit in memory.
    drawn: dict[int, list[int]] = {}
    for number, (constraint_id, _, _) in enumerate(constraints):
        rng = random.Random(f"{tools.seed}/{constraint_id}")
        for place in rng.sample(range(fitting), min(config.per_constraint, fitting)):
            drawn.setdefault(place, []).append(number)
    total = sum(len(numbers) for numbers in drawn.values())
    lost: Counter[str] = Counter()
    tools.progress.start(total, "prompts")
    place = kept = 0
    for row in queries.rows():
        if _reason(config, row, Counter()) is not None:
            continue
        for number in drawn.get(place, ()):
            made = constrained(row, *constraints[number])
            if root_text(made["prompt"]) in held:
                lost["is a held-out prompt"] += 1
            else:
                kept += 1
                yield made
            tools.progress.advance(1, kept=kept)
        place += 1
    summary.update(
        {"yield": {"queries": len(queries), "of fitting length and split": fitting, "constraints": len(constraints),
                   "drawn": total, "kept": kept}},
        lost=dict(lost), skipped=dict(skipped),
    )  # fmt: skip
    if not kept:
        raise DataError(f"constrain: all {total} prompts are among those of heldout; give other queries")


def _reason(config: ConstrainConfig, row: Row, skipped: Counter[str]) -> str | None:
    """Why a query is passed by, counted; None where it is taken."""
    last = row["prompt"][-1]
    characters = len(last["content"])
    if row["split"] not in config.splits:
        reason = f"split {row['split']}"
    elif last["role"] != "user":
        reason = f"ends with the {last['role']}"
    elif characters < config.min_characters:
        reason = "too short"
    elif config.max_characters is not None and characters > config.max_characters:
        reason = "too long"
    else:
        return None
    skipped[reason] += 1
    return reason


def _constraint(row: Row, config: ConstrainConfig) -> tuple[str, str, str]:
    """Id, text and reference of a constraint.

    Raises:
        DataError: the row has no functions.
    """
    text = row["prompt"][-1]["content"]
    try:
        reference = json.loads(row["reference"] or "null")
    except ValueError:
        reference = None
    if row["task"] != "follow" or not isinstance(reference, dict) or not reference.get("functions"):
        raise DataError(
            f"constrain: constraint {row['prompt_id']} ({text!r:.60}) has the task {row['task']!r} and the reference "
            f"{row['reference']!r:.60}; the task follow and a reference with functions were expected, as the stage "
            "`constraints` gives them"
        )
    whole = {**reference, "constraint": text, "constraint_id": row["prompt_id"], "threshold": config.pass_rate}
    return row["prompt_id"], text, json.dumps(whole, ensure_ascii=False)


def constrained(row: Row, constraint_id: str, constraint: str, reference: str) -> Row:
    """The prompt that asks a query under a constraint; `query` keeps what was asked without it."""
    *before, last = row["prompt"]
    prompt = [*before, {**last, "content": joined(last["content"], constraint)}]
    return {
        "prompt_id": stable_hash(f"constrain\n{row['prompt_id']}\n{constraint_id}"),
        "prompt": prompt,
        "split": row["split"],
        **{column: row[column] for column in CARRIED if column in row},
        "task": "follow",
        "family": "follow",
        "reference": reference,
        "parent_id": row["prompt_id"],
        "query": last["content"],
        "constraint": constraint,
        "constraint_id": constraint_id,
    }


def joined(query: str, constraint: str) -> str:
    """A query and the constraint's sentence after it, as a person would write them.

    On the same line where the query ends as a sentence does, without a space after Chinese and Japanese punctuation;
    on a line of its own after an open end; with an empty line between after several lines.
    """
    text = query.rstrip()
    if not text or "\n" in text:
        return f"{text}\n\n{constraint}".lstrip()
    end = text[-1]
    if not unicodedata.category(end).startswith("P"):
        return f"{text}\n{constraint}"
    return f"{text}{constraint}" if unicodedata.east_asian_width(end) in "WF" else f"{text} {constraint}"


STAGE = Stage(
    name="constrain",
    summary="queries under constraints: prompts that functions can check (AutoIF)",
    config=ConstrainConfig,
    needs={
        "queries": Need(Kind.PROMPTS, "what users ask"),
        "constraints": Need(Kind.PROMPTS, "a library of constraints: prompts of the task `follow`, of `constraints`"),
        "heldout": Need(Kind.PROMPTS, "prompts that must not come about, such as a test set", optional=True),
    },
    gives=Kind.PROMPTS,
    run=run,
    adds=("parent_id", "query", "constraint", "constraint_id"),
)
