"""Stage `tag`: open-set tagging of instructions by a model, as InsTag does it (arXiv:2308.07074, 3.1).

The model names the intentions of an instruction as a JSON list of `{"tag", "explanation"}`. The answer is read
strictly: one that is no such list is asked for again, and after the last attempt the turn has no tags and is counted.
A plain JSON list of texts is a list of tags too, for small taggers. A user turn is tagged by itself, as in the paper.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.core.asking import Answer, MalformedError, ask, fill, load_template
from align.core.engines.base import Prompt, SamplingParams
from align.core.records import Kind, Messages, Row
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from data_synthesis.sampling import ErrorBudget, answered

TEMPLATES = Path(__file__).parent / "templates"
TOP = 30
"""Tags listed in the summary, for the report's chart."""
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


class TagConfig(StageConfig):
    """Settings of `tag`."""

    template: str = Field(
        "tag",
        description="what the tagger is asked: a shipped template's name, a file, or a text, with {instruction}",
    )
    turns: Literal["last", "all"] = Field(
        "last", description="tag the last user turn, or each user turn by itself (InsTag)"
    )
    temperature: float = Field(0.0, ge=0, le=5, description="of the first attempt; retries are sampled at 0.7 at least")
    max_tokens: int = Field(512, ge=1, description="most new tokens of an answer")
    attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then the turn has no tags")
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of turns could not be tagged"
    )


def run(config: TagConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every prompt with `tags` and `raw_tags`; a column `tags` that came in is replaced."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    template = load_template(config.template, TEMPLATES, ["instruction"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, template, table, tools, summary), summary)


def _rows(config: TagConfig, template: str, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    budget = ErrorBudget("tag", config.max_error_share)
    counts: Counter[str] = Counter()
    retried = untagged = 0

    def questions(row: Row) -> Iterator[tuple[None, Prompt]]:
        for text in user_turns(row, config.turns):
            prompt: Messages = [{"role": "user", "content": fill(template, {"instruction": text})}]
            yield None, prompt

    def answers(asked: Iterable[tuple[None, Prompt]]) -> Iterator[Answer[list[str]]]:
        for _, answer in ask(tools.engines["tagger"], asked, read_tags, params, config.attempts):
            budget.count(answer.value is None, answer.problem)
            yield answer

    tools.progress.start(len(table), "prompts")
    for prompts, (row, turns) in enumerate(answered(table.rows(), questions, answers), start=1):
        tags = list(dict.fromkeys(tag for turn in turns for tag in turn.value or []))
        texts = [turn.text for turn in turns]
        yield {**row, "tags": tags, "raw_tags": json.dumps(texts) if config.turns == "all" else "".join(texts)}
        retried += sum(turn.attempts > 1 for turn in turns)
        untagged += not tags
        counts.update(tags)
        tools.progress.advance(1, tags=len(counts), untagged=untagged)
        if prompts % 1000 == 0 or prompts == len(table):
            summary.update(
                prompts=prompts, turns=budget.seen, retried=retried, failed_turns=budget.errors, untagged=untagged,
                unique_tags=len(counts), tags_per_prompt=round(counts.total() / prompts, 4),
                top_tags=dict(counts.most_common(TOP)),
            )  # fmt: skip
    budget.check()


def user_turns(row: Row, turns: Literal["last", "all"]) -> list[str]:
    """The texts of a prompt's user turns, or only the last one."""
    texts = [str(message["content"]) for message in row["prompt"] if message["role"] == "user"]
    return texts if turns == "all" else texts[-1:]


def read_tags(text: str) -> list[str]:
    """The tags in a model's answer, without repetitions; see `read_explained`."""
    return list(read_explained(text))


def read_explained(text: str) -> dict[str, str]:
    """The tags in a model's answer with their explanations: a JSON list of objects with `tag`, or of texts.

    An explanation that isn't there is empty.

    Raises:
        MalformedError: anything else, an empty list and an empty tag among it.
    """
    found = _FENCE.fullmatch(text.strip())
    body = found.group(1) if found else text.strip()
    try:
        items = json.loads(body)
    except ValueError as problem:
        raise MalformedError(f"not JSON: {body[:80]!r}") from problem
    if not isinstance(items, list) or not items:
        raise MalformedError(f"no JSON list of tags: {body[:80]!r}")
    tags: dict[str, str] = {}
    for item in items:
        tag, explanation = (item.get("tag"), item.get("explanation")) if isinstance(item, dict) else (item, "")
        if not isinstance(tag, str) or not tag.strip():
            raise MalformedError(f"an item without a tag: {body[:80]!r}")
        tags.setdefault(tag.strip(), explanation.strip() if isinstance(explanation, str) else "")
    return tags


def asks(config: TagConfig) -> dict[str, Asks]:
    """One answer a prompt; more where all turns are tagged and there are several."""
    return {"tagger": Asks(1, config.max_tokens)}


STAGE = Stage(
    name="tag",
    summary="the intentions of every instruction, named by a model",
    config=TagConfig,
    needs={"prompts": Need(Kind.PROMPTS, "instructions")},
    gives=Kind.PROMPTS,
    run=run,
    engines={"tagger": "the model that names the tags"},
    reads=("template",),
    asks=asks,
    adds=("tags", "raw_tags"),
)
