"""Stage `distil-tags`: tagged instructions to demonstrations for a small tagger (InsTagger; arXiv:2308.07074, 3.4).

InsTag distils its tagger, a large model behind a template, into a 7B model on 773,511 tagged instructions. Here each
user turn that was tagged becomes a demonstration: the prompt is the tagger's template with the instruction in it, the
completion the strict JSON list that `tag` reads. Where the tags of each turn are known (`turn_tags`) each is one; else
the last user turn has the row's tags. `compare-tags` tells how close the tagger that `sft` makes of them comes.

With an ontology the tags are the atomic ones, and tags that it dropped are left out, so the small tagger learns the
cleaned tags at once. An explanation is the tagger's own of the first raw tag that became the atomic one; where it gave
none (a plain list of texts), or `explanations` is false, the completion is a list of texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from align.core.asking import MalformedError, load_template
from align.core.errors import DataError
from align.core.records import Kind, Messages, Row, Split
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from data_synthesis.tag import TEMPLATES, read_explained
from data_synthesis.tag_levels import atomic_tags
from reward.judge import filled

NOTHING_EARLIER = "(nothing)"
"""What a template with `{earlier}` shows where nothing was said before the turn, as in `tag`."""


class DistilTagsConfig(StageConfig):
    """Settings of `distil-tags`."""

    template: str = Field(
        "tag", description="what the small tagger will be asked, best what the large one was: a shipped template's "
        "name, a file, or a text, with {instruction}",
    )  # fmt: skip
    explanations: bool = Field(
        True, description="let the small tagger explain each tag, as InsTag's does; false: it writes a list of texts"
    )
    splits: list[Split] = Field(
        ["train"], min_length=1, description="instructions of these splits are learned from; hold some out for F1"
    )


def run(config: DistilTagsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives a demonstration for each tagged user turn, in order."""
    table, ontology = inputs["prompts"], inputs.get("ontology")
    assert isinstance(table, Table)
    assert ontology is None or isinstance(ontology, Table)
    template = load_template(config.template, TEMPLATES, ["instruction"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, template, table, atomic_tags(ontology) if ontology else None, tools, summary), summary)


def _rows(
    config: DistilTagsConfig, template: str, table: Table, atomic: Mapping[str, str] | None, tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:  # fmt: skip
    lost: Counter[str] = Counter()
    turns = kept = explained = 0
    seen: set[str] = set()
    tools.progress.start(len(table), "prompts")
    for row in table.rows():
        answers = _answers(row)
        turns += len(answers)
        for (earlier, text), answer in zip(_user_turns(row)[-len(answers) :], answers, strict=True):
            tags = _cleaned(answer, atomic)
            prompt = filled(template, {"instruction": text, "earlier": earlier or NOTHING_EARLIER})
            key = prompt_id_of(prompt)
            reason = _refusal(config, row, answer, tags, key in seen)
            if reason is not None:
                lost[reason] += 1
                continue
            seen.add(key)
            kept += 1
            with_reasons = config.explanations and all(tags.values())
            explained += with_reasons
            yield {
                "prompt_id": key, "prompt": prompt, "split": row["split"],
                "completion": [{"role": "assistant", "content": _written(tags, with_reasons)}],
                "source": row["source"], "task": "tags", "family": "tag", "tags": list(tags),
                "parent_id": row["prompt_id"],
            }  # fmt: skip
        tools.progress.advance(1, demonstrations=kept)
        summary.update({"yield": {"turns": turns, "kept": kept}, "lost": dict(lost), "with_explanations": explained})
    if not kept:
        why = ", ".join(f"{reason}: {count}" for reason, count in lost.items()) or "the table is empty"
        raise DataError(f"distil-tags: no turn of {table.name} became a demonstration ({why}); tag more instructions")


def _answers(row: Row) -> list[dict[str, str]]:
    """The tags of each tagged user turn, the last ones of the prompt, with their explanations."""
    if row.get("turn_tags"):
        return [{item["tag"]: item.get("explanation") or "" for item in turn or ()} for turn in row["turn_tags"]]
    try:
        explained = read_explained(row.get("raw_tags") or "")
    except MalformedError:
        explained = {}
    return [{tag: explained.get(tag, "") for tag in row["tags"] or ()}]


def _user_turns(row: Row) -> list[tuple[Messages, str]]:
    """Each user turn with the messages before it."""
    messages: Messages = row["prompt"]
    return [(messages[:at], turn["content"]) for at, turn in enumerate(messages) if turn["role"] == "user"]


def _cleaned(answer: Mapping[str, str], atomic: Mapping[str, str] | None) -> dict[str, str]:
    """A turn's tags as they are to be learned, each with its explanation."""
    tags: dict[str, str] = {}
    for tag, explanation in answer.items():
        name = tag if atomic is None else atomic.get(tag)
        if name is not None and not tags.get(name):
            tags[name] = explanation
    return tags


def _refusal(
    config: DistilTagsConfig, row: Row, answer: Mapping[str, str], tags: Mapping[str, str], seen: bool
) -> str | None:
    """Why a turn is no demonstration; None where it is one."""
    if row["split"] not in config.splits:
        return f"split {row['split']}"
    if not answer:
        return "no tags"
    if not tags:
        return "no tag of the ontology"
    return "the same instruction again" if seen else None


def _written(tags: Mapping[str, str], with_reasons: bool) -> str:
    """The completion: strict JSON, as the template asks."""
    if not with_reasons:
        return json.dumps(list(tags), ensure_ascii=False)
    items = [{"tag": tag, "explanation": explanation} for tag, explanation in tags.items()]
    return json.dumps(items, ensure_ascii=False)


STAGE = Stage(
    name="distil-tags",
    summary="demonstrations for a small tagger from tagged instructions (InsTagger)",
    config=DistilTagsConfig,
    needs={
        "prompts": Need(Kind.PROMPTS, "tagged instructions", columns=("tags",)),
        "ontology": Need(Kind.ONTOLOGY, "the tags to learn; else the raw tags", optional=True),
    },
    gives=Kind.DEMONSTRATIONS,
    run=run,
    reads=("template",),
    adds=("source", "task", "family", "tags", "parent_id"),
)
