"""Stage `probe-tags`: how good are the tags? Precision and consistency by a judge (InsTag, arXiv:2308.07074, 3.3).

    precision     an instruction and one of its tags: is the tag right for it?         InsTag's: 96.1% by GPT-4
    consistency   a tag and several instructions that have it: is it used in one way?  86.6%

A judge that says yes to everything would find every tag good. So each probe has a counterfactual one, where no is the
right answer: the same instruction with a tag that it hasn't, drawn by the tags' frequency; the same group with one of
its instructions changed for one without the tag. How often the judge says no to those stands beside each figure.

A row is one probe: what the judge was asked and said, `passed` where it said what was expected (yes to a real probe).
Intervals are Wilson's, 95%.

Differs from the paper [our choices]: an (instruction, tag) is drawn evenly of all there are, a group's tag evenly of
the tags with enough instructions; with an ontology no counterfactual tag lies above or below one that the instruction
has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from align.core.asking import Answer, Question, ask_each, load_templates
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Messages, Row, Split, Verdict
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.tag_probes import Probe, Sort, Tagged, consistency_probes, precision_probes
from reward.agreement import wilson
from reward.judge import filled
from reward.judge_words import read_yes_no

TEMPLATES = Path(__file__).parent / "templates" / "probe-tags"
NEEDS = {"precision": ("instruction", "tag"), "consistency": ("instructions", "tag")}
TRUSTED = 80.0
"""Percent of counterfactual probes that a judge should see through; below, the summary says what its yes is worth."""

_SCHEMA = (
    '{"type": "object", "properties": {"reason": {"type": "string"}, "verdict": {"enum": ["yes", "no"]}}, '
    '"required": ["reason", "verdict"], "additionalProperties": false}'
)


class ProbeTagsConfig(StageConfig):
    """Settings of `probe-tags`."""

    precision: int = Field(200, ge=0, description="instructions with one of their tags that the judge is asked about")
    consistency: int = Field(200, ge=0, description="tags that it is asked about, each with a group of instructions")
    group: int = Field(4, ge=2, description="instructions of a group")
    templates: str = Field(
        "default", description="what the judge is asked: a shipped set's name (default, tiny), or a folder with "
        "precision.txt ({instruction}, {tag}) and consistency.txt ({instructions}, {tag})",
    )  # fmt: skip
    temperature: float = Field(0.0, ge=0, le=5, description="of the first attempt; retries are sampled at 0.7 at least")
    max_tokens: int = Field(256, ge=1, description="most new tokens of an answer")
    attempts: int = Field(3, ge=1, description="samples asked for until one can be read, then the probe is an error")
    json_answers: bool = Field(
        False, description="hold the judge to a JSON object; only for engines with structured output"
    )
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of probes gets no readable answer"
    )
    splits: list[Split] = Field(["train"], min_length=1, description="instructions of these splits are probed")


def run(config: ProbeTagsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives one row for each probe, real ones and counterfactual ones."""
    table, ontology = inputs["prompts"], inputs.get("ontology")
    assert isinstance(table, Table)
    assert ontology is None or isinstance(ontology, Table)
    templates = load_templates(config.templates, TEMPLATES, NEEDS)
    tagged = Tagged(table, config.splits, ontology)
    rng = np.random.default_rng(tools.seed)
    probes = [*precision_probes(tagged, config.precision, rng)]
    probes += consistency_probes(tagged, config.consistency, config.group, rng)
    if not probes:
        raise DataError(
            f"probe-tags: {table.name} has no tagged instruction in the splits {', '.join(config.splits)} to probe; "
            "run `tag` first, or raise precision or consistency above 0"
        )
    shown = _shown(table, config.splits, {place for probe in probes for place in probe.places})
    summary: dict[str, Any] = {}
    return Result(_rows(config, templates, probes, shown, tools, summary), summary)


def _shown(table: Table, splits: Sequence[str], places: set[int]) -> dict[int, Row]:
    """The rows of some instructions, by their number."""
    rows = (row for row in table.rows(["prompt_id", "prompt", "split", "source"]) if row["split"] in splits)
    return {place: row for place, row in enumerate(rows) if place in places}


def _rows(
    config: ProbeTagsConfig, templates: Mapping[str, str], probes: Sequence[Probe], shown: Mapping[int, Row],
    tools: Tools, summary: dict[str, Any],
) -> Iterator[Row]:  # fmt: skip
    engine = tools.engines["judge"]
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
    budget = ErrorBudget("probe-tags", config.max_error_share)
    schema = _SCHEMA if config.json_answers else None
    counts: Counter[tuple[Sort, bool, bool | None]] = Counter()
    wrong: Counter[str] = Counter()
    asked = ((probe, [Question(_question(templates, probe, shown), read_yes_no, schema)]) for probe in probes)
    tools.progress.start(len(probes), "probes")
    for probe, ((answer,),) in ask_each(engine, asked, params, config.attempts, whole=True):
        budget.count(answer.value is None, answer.problem)
        counts[probe.sort, probe.counterfactual, answer.value] += 1
        wrong[probe.tag] += answer.value is False and not probe.counterfactual
        yield _row(probe, answer, _question(templates, probe, shown), shown, engine.generator)
        tools.progress.advance(1, unreadable=budget.errors)
    summary.update(_summary(counts, +wrong))
    for sort in ("precision", "consistency"):
        if "note" in summary.get(sort, {}):
            tools.progress.say(f"{sort}: {summary[sort]['note']}")
    budget.check()


def _question(templates: Mapping[str, str], probe: Probe, shown: Mapping[int, Row]) -> Messages:
    texts = [last_user_text(shown[place]) for place in probe.places]
    if probe.sort == "precision":
        return filled(templates["precision"], {"instruction": texts[0]}, {"tag": probe.tag})
    if "{mark}" not in templates["consistency"]:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
        return filled(templates["consistency"], {"instructions": listed}, {"tag": probe.tag})
    parts: Messages = [{"role": f"instruction {number}", "content": text} for number, text in enumerate(texts, start=1)]
    return filled(templates["consistency"], {"instructions": parts}, {"tag": probe.tag})


def _row(probe: Probe, answer: Answer[bool], prompt: Messages, shown: Mapping[int, Row], generator: str) -> Row:
    first, expected = shown[probe.places[0]], not probe.counterfactual
    said = None if answer.value is None else "yes" if answer.value else "no"
    if answer.value is None:
        verdict = Verdict.error(f"no answer in {answer.attempts} attempts: {answer.problem}")
    else:
        verdict = Verdict.of(answer.value == expected, f"said {said}, {'yes' if expected else 'no'} was expected")
    return {
        "prompt_id": prompt_id_of(prompt), "prompt": prompt, "split": first["split"], "source": first["source"],
        "task": None, "family": probe.sort, "reference": None, "sample_index": 0,
        "completion": [{"role": "assistant", "content": answer.text}], "reward": verdict.reward,
        "verdict": verdict.verdict, "detail": verdict.detail, "generator": generator, "tag": probe.tag,
        "counterfactual": probe.counterfactual, "said": said, "parent_id": first["prompt_id"],
        "instruction_ids": [shown[place]["prompt_id"] for place in probe.places],
    }  # fmt: skip


def _summary(counts: Mapping[tuple[Sort, bool, bool | None], int], wrong: Counter[str]) -> dict[str, Any]:
    unread = sum(count for (_, _, said), count in counts.items() if said is None)
    total = sum(counts.values())
    found: dict[str, Any] = {
        "yield": {"probes": total, "read": total - unread},
        "lost": {"no readable answer": unread} if unread else {},
    }
    sorts: tuple[Sort, ...] = ("precision", "consistency")
    for sort in sorts:
        real = _share(counts.get((sort, False, True), 0), counts.get((sort, False, False), 0))
        seen = _share(counts.get((sort, True, False), 0), counts.get((sort, True, True), 0))
        if not real["probes"]:
            continue
        found[sort] = {**real, "judge_on_counterfactuals": seen}
        if seen["share"] is None:
            found[sort]["note"] = "no counterfactual probe could be made or read: nothing tells whether the judge looks"
        elif seen["share"] < TRUSTED:
            found[sort]["note"] = (
                f"the judge says no to only {seen['share']:g}% of the counterfactual probes, so its yes says little; "
                "ask a better judge"
            )
    return {**found, "tags_found_wrong": dict(wrong.most_common(30))}


def _share(hits: int, misses: int) -> dict[str, Any]:
    """A share in percent with its 95% interval, of the probes that were read."""
    total = hits + misses
    low, high = wilson(hits, total)
    share = round(100 * hits / total, 1) if total else None
    return {"probes": total, "share": share, "interval": [round(low, 1), round(high, 1)]}


def asks(config: ProbeTagsConfig) -> dict[str, Asks]:
    """Two questions for each probe, at most; how many there are depends on the settings, not on the prompts."""
    return {"judge": Asks(2, config.max_tokens, prompts=config.precision + config.consistency)}


STAGE = Stage(
    name="probe-tags",
    summary="precision and consistency of tags by a judge, with counterfactual probes",
    config=ProbeTagsConfig,
    needs={
        "prompts": Need(Kind.PROMPTS, "tagged instructions", columns=("tags",)),
        "ontology": Need(Kind.ONTOLOGY, "the tags that are probed; else the raw tags", optional=True),
    },
    gives=Kind.COMPLETIONS,
    run=run,
    engines={"judge": "the model that says whether a tag is right"},
    reads=("templates",),
    asks=asks,
    adds=("tag", "counterfactual", "said", "parent_id", "instruction_ids"),
)
