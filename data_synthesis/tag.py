"""Stage `tag`: open-set tagging of instructions by a model, as InsTag does it (arXiv:2308.07074, 3.1).

The model names the intentions of an instruction as a JSON list of `{"tag", "explanation"}`. The answer is read
strictly: one that is no such list is asked for again, and after the last attempt the turn has no tags and is counted.
Every user turn is tagged by itself, as in the paper: a prompt's `tags` are those of all its turns, and `turn_tags` says
which turn has which tags, and why.

Differs from the paper: a plain JSON list of texts is a list of tags too, for small taggers; a template with `{earlier}`
also shows what was said before the turn (`tag_in_context`), for turns that can't be understood alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.core.asking import Answer, MalformedError, Question, ask_each, load_template
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Message, Row
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from data_synthesis.sampling import ErrorBudget, answered
from reward.judge import filled

TEMPLATES = Path(__file__).parent / "templates"
TOP = 30
"""Tags listed in the summary, for the report's chart."""
NOTHING_EARLIER = "(nothing)"
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)
_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "tags": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"tag": {"type": "string"}, "explanation": {"type": "string"}},
                    "required": ["tag", "explanation"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["tags"],
        "additionalProperties": False,
    }
)
"""An object around the list, for servers that take no list at the top."""

Explained = dict[str, str]
"""Tags with their explanations, empty where the tagger gave none."""


class TagConfig(StageConfig):
    """Settings of `tag`."""

    template: str = Field(
        "tag", description="what the tagger is asked: a shipped template's name (tag, tag_in_context), a file, or a "
        "text, with {instruction}; {earlier} is what was said before the turn, {mark} a line that no text holds",
    )  # fmt: skip
    turns: Literal["all", "last"] = Field(
        "all", description="tag each user turn by itself (InsTag), or only the last one"
    )
    tags_json: bool = Field(
        False, description="let the tagger write nothing but JSON of the form asked for; only for engines with "
        "structured output",
    )  # fmt: skip
    temperature: float = Field(0.0, ge=0, le=5, description="of the first attempt; retries are sampled at 0.7 at least")
    max_tokens: int = Field(512, ge=1, description="most new tokens of an answer")
    attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then the turn has no tags")
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of turns could not be tagged"
    )


def run(config: TagConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every prompt with `tags`, `turn_tags` and `raw_tags`; a column `tags` that came in is replaced."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    template = load_template(config.template, TEMPLATES, ["instruction"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, template, table, tools, summary), summary)


def _rows(config: TagConfig, template: str, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    schema = _SCHEMA if config.tags_json else None
    budget = ErrorBudget("tag", config.max_error_share)
    counts: Counter[str] = Counter()
    retried = untagged = partly = 0

    def questions(row: Row) -> Iterator[Question[Explained]]:
        for earlier, text in turns_with_context(row, config.turns):
            values = {"instruction": text, "earlier": earlier or NOTHING_EARLIER}
            yield Question(filled(template, values), read_explained, schema)

    def answers(asked: Iterable[Question[Explained]]) -> Iterator[Answer[Explained]]:
        items = ((None, [question]) for question in asked)
        for _, ((answer,),) in ask_each(tools.engines["tagger"], items, params, config.attempts):
            budget.count(answer.value is None, answer.problem)
            yield answer

    tools.progress.start(len(table), "prompts")
    for prompts, (row, turns) in enumerate(answered(table.rows(), questions, answers), start=1):
        tags = list(dict.fromkeys(tag for turn in turns for tag in turn.value or ()))
        texts = [turn.text for turn in turns]
        yield {
            **row,
            "tags": tags,
            "turn_tags": [
                [{"tag": tag, "explanation": why} for tag, why in (turn.value or {}).items()] for turn in turns
            ],
            "raw_tags": json.dumps(texts, ensure_ascii=False) if config.turns == "all" else "".join(texts),
        }
        retried += sum(turn.attempts > 1 for turn in turns)
        untagged += not tags
        partly += bool(tags) and any(turn.value is None for turn in turns)
        counts.update(tags)
        tools.progress.advance(1, tags=len(counts), untagged=untagged)
        if prompts % 1000 == 0 or prompts == len(table):
            summary.update({
                "yield": {"prompts": prompts, "tagged": prompts - untagged},
                "lost": {f"no answer could be read in {config.attempts} attempts": untagged} if untagged else {},
                "turns": budget.seen, "retried": retried, "failed_turns": budget.errors, "partly_tagged": partly,
                "unique_tags": len(counts), "tags_not_in_latin": sum(1 for tag in counts if not _is_latin(tag)),
                "tags_per_prompt": round(counts.total() / prompts, 4), "top_tags": dict(counts.most_common(TOP)),
            })  # fmt: skip
    budget.check()


def user_turns(row: Row, turns: Literal["all", "last"]) -> list[str]:
    """The texts of a prompt's user turns, or only the last one."""
    return [text for _, text in turns_with_context(row, turns)]


def turns_with_context(row: Row, turns: Literal["all", "last"]) -> list[tuple[list[Message], str]]:
    """A prompt's user turns, or only the last one, each with the messages before it, the system's among them."""
    messages: list[Message] = row["prompt"]
    found = [
        (messages[:place], message["content"]) for place, message in enumerate(messages) if message["role"] == "user"
    ]
    if not found:
        raise DataError(f"tag: prompt {row['prompt_id']}: it has no user turn; a prompt ends with the user's message")
    return found if turns == "all" else found[-1:]


def read_tags(text: str) -> list[str]:
    """The tags in a model's answer, without repetitions; see `read_explained`."""
    return list(read_explained(text))


def read_explained(text: str) -> Explained:
    """The tags in a model's answer with their explanations.

    It is a JSON list of objects with `tag`, or of texts; or an object with nothing but such a list as `tags`.

    Raises:
        MalformedError: anything else, an empty list and an empty tag among it.
    """
    found = _FENCE.fullmatch(text.strip())
    body = found.group(1) if found else text.strip()
    try:
        items = json.loads(body)
    except ValueError as problem:
        raise MalformedError(f"not JSON: {body[:80]!r}") from problem
    if isinstance(items, dict) and list(items) == ["tags"]:
        items = items["tags"]
    if not isinstance(items, list) or not items:
        raise MalformedError(f"no JSON list of tags: {body[:80]!r}")
    tags: Explained = {}
    for item in items:
        tag, explanation = (item.get("tag"), item.get("explanation")) if isinstance(item, dict) else (item, "")
        if not isinstance(tag, str) or not tag.strip():
            raise MalformedError(f"an item without a tag: {body[:80]!r}")
        tags.setdefault(tag.strip(), explanation.strip() if isinstance(explanation, str) else "")
    return tags


def _is_latin(tag: str) -> bool:
    """Whether no letter of the tag lies beyond the Latin blocks; tags are wanted in English."""
    return all(sign < "\u0250" for sign in tag if sign.isalpha())


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
    adds=("tags", "turn_tags", "raw_tags"),
    version=2,
)
