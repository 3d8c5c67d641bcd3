"""Stage `prompts`: what the user has, as prompts of the pipeline: read, converted, deduplicated, divided into splits.

The report's collaborative annotation begins with instructions (arXiv:2407.10671, 4.1); this stage is where they come
in. The split of a prompt is decided here, once, and inherited by everything that is made from it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from align.core.errors import DataError, RecipeError
from align.core.records import Kind, Row
from align.core.source_spec import Source, parse_sources
from align.core.sources import SHARES, licenses_of, read_rows, tell_split
from align.core.stage import Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise, root_text, split_of, stable_hash
from data_synthesis.near_duplicates import later_duplicates, signatures

_KEPT = ("prompt_id", "prompt", "split", "source", "source_row", "task", "family", "reference")

_LOST = {
    "too_long": "longer than max_prompt_chars",
    "in_against": "in the data of `against`",
    "held_out_elsewhere": "a copy of a held-out prompt",
    "duplicates": "the same as one before",
    "near_duplicates": "nearly the same as one before, held out, or in `against`",
}
"""Why prompts are dropped, by the counts of the summary."""


class PromptsConfig(StageConfig):
    """Settings of `prompts`."""

    source: str | dict[str, Any] | list[str | dict[str, Any]] = Field(
        description="a file, folder, glob or Hub id; a mapping {source, name, split, columns, fraction, count, weight, "
        "task, family, reference_from, …}; {tiny: {families: {math: 100}, split: train, seed: 0}}, the embedded world; "
        "or a list of those"
    )
    task: str | None = Field(None, description="the task of prompts whose source names none: it decides the verifier")
    family: str | None = Field(None, description="the family of prompts whose source names none; else the task")
    reference_from: str | dict[str, str] | None = Field(
        None, description="how references are made where a source doesn't say: gsm8k, ifeval, a column with the "
        "answer, or {key of the reference: column}",
    )  # fmt: skip
    deduplicate: Literal["exact", "near", "none"] = Field(
        "exact", description="drop prompts whose normalised text came before; or that are nearly the same as one before"
    )
    near_threshold: float = Field(
        0.8, gt=0, le=1, description="near: from which estimated Jaccard similarity of word 5-grams on"
    )
    against: list[str | dict[str, Any]] = Field(
        [], description="data whose prompts must not occur, such as test sets (sources as above)"
    )
    dev: float | None = Field(
        None, ge=0, lt=1, description="share of the development split; by default 0.05 of what comes without a split"
    )
    test: float | None = Field(
        None, ge=0, lt=1, description="share of the test split; by default 0.05 of what comes without a split. A share "
        "that is given also divides what comes as train",
    )  # fmt: skip
    split_seed: int = Field(
        0, description="another seed, another division; not the run's seed, so that all runs hold out the same prompts"
    )
    max_prompt_chars: int | None = Field(None, ge=1, description="longer prompts are dropped and counted")
    keep: list[str] | None = Field(None, description="columns that travel on beside the kind's; all by default")

    @field_validator("source", "against")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        try:
            parse_sources([item for item in _items(value) if not _is_tiny(item)] or ["none"])
        except RecipeError as problem:
            raise ValueError("; ".join(text.removeprefix("source: ") for text in problem.problems)) from problem
        return value


def run(config: PromptsConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives one row for each prompt that is kept, in the sources' order."""
    summary: dict[str, Any] = {"licenses": licenses_of(_sources(config))}
    return Result(_rows(config, tools, summary), summary)


def _rows(config: PromptsConfig, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    counts: Counter[str] = Counter()
    per: dict[str, Counter[str]] = {name: Counter() for name in ("split", "task", "family")}
    unreadable: list[str] = []
    forbidden = {stable_hash(root_text(row["prompt"])) for row in _against(config, tools)}
    reserved = _reserved(config, tools)
    near = _near_duplicates(config, tools) if config.deduplicate == "near" else None
    seen: set[int] = set()
    tools.progress.start(None if near is None else len(near), "prompts")
    for number, row in enumerate(_read(config, tools, unreadable)):
        counts["read"] += 1
        reason = _refusal(config, row, forbidden, reserved, seen)
        if reason is None and near is not None and near[number]:
            reason = "near_duplicates"
        if reason is None:
            counts["kept"] += 1
            row["split"] = _split(config, row)
            for name, counter in per.items():
                counter[str(row[name])] += 1
            yield row if config.keep is None else {k: v for k, v in row.items() if k in _KEPT or k in config.keep}
        else:
            counts[reason] += 1
        tools.progress.advance(1, kept=counts["kept"])
    summary["yield"] = {"read": counts["read"], "kept": counts["kept"]}
    summary["lost"] = {_LOST[name]: count for name, count in counts.items() if name in _LOST}
    summary.update(counts, unreadable=len(unreadable), **{f"by_{name}": dict(c) for name, c in per.items()})
    if not counts["kept"]:
        why = ", ".join(f"{reason}: {count}" for reason, count in counts.items()) or "the sources are empty"
        raise DataError(f"prompts: no prompt is left ({why}); give another source, or mend the settings that drop them")


def _refusal(config: PromptsConfig, row: Row, forbidden: set[str], reserved: set[str], seen: set[int]) -> str | None:
    """Why a prompt is dropped; None where it is kept, and then it counts as seen."""
    if config.max_prompt_chars is not None and sum(len(t["content"]) for t in row["prompt"]) > config.max_prompt_chars:
        return "too_long"
    root = stable_hash(root_text(row["prompt"]))
    if root in forbidden:
        return "in_against"
    if root in reserved and not _is_held_out(row):
        return "held_out_elsewhere"
    if config.deduplicate != "none":
        key = int(stable_hash(_text(row)), 16)
        if key in seen:
            return "duplicates"
        seen.add(key)
    return None


def _split(config: PromptsConfig, row: Row) -> str:
    """The split of a prompt: its own where it is held out; else by the settings' shares and the root prompt's hash."""
    shares = (config.dev, config.test)
    if _is_held_out(row) or (row["split"] is not None and shares == (None, None)):
        return str(row["split"])
    usual = SHARES if row["split"] is None else (0.0, 0.0)
    dev, test = (share if share is not None else default for share, default in zip(shares, usual, strict=True))
    return split_of(root_text(row["prompt"]), dev, test, config.split_seed)


def _is_held_out(row: Row) -> bool:
    return row["split"] in ("dev", "test")


def _text(row: Row) -> str:
    """What makes two prompts the same: who says what, normalised."""
    return "\n".join(f"{turn['role']}: {normalise(turn['content'])}" for turn in row["prompt"])


def _reserved(config: PromptsConfig, tools: Tools) -> set[str]:
    """The prompts that a source holds out itself, so that no copy of one is trained on, wherever it comes."""
    tiny = [item for item in _items(config.source) if _is_tiny(item)]
    if not tiny and not tell_split(_sources(config)):
        return set()
    return {stable_hash(root_text(row["prompt"])) for row in _read(config, tools, []) if _is_held_out(row)}


def _near_duplicates(config: PromptsConfig, tools: Tools) -> Any:
    """For each prompt read, whether nearly the same one is forbidden, held out, or came before; (N,) bool."""
    ranks = bytearray()  # of equals the first stays: of `against`, then held out, then any

    def texts() -> Iterator[str]:
        for row in _against(config, tools):
            ranks.append(0)
            yield _text(row)
        for row in _read(config, tools, []):
            ranks.append(1 if _is_held_out(row) else 2)
            yield _text(row)

    file = tools.work / "signatures"
    signatures(texts(), file)
    found = later_duplicates(file, np.frombuffer(ranks, dtype=np.uint8), config.near_threshold)
    file.unlink()
    return found[ranks.count(0) :]


def _against(config: PromptsConfig, tools: Tools) -> Iterator[Row]:
    return read_rows(parse_sources(config.against), Kind.PROMPTS, tools.seed) if config.against else iter(())


def _read(config: PromptsConfig, tools: Tools, unreadable: list[str]) -> Iterator[Row]:
    """All rows of all sources, the same at every call; `split` is None where the source tells none."""
    sources = _sources(config)
    if sources:
        yield from read_rows(sources, Kind.PROMPTS, tools.seed, unreadable)
    for item in _items(config.source):
        if _is_tiny(item):
            yield from _tiny(item["tiny"])


def _tiny(options: Mapping[str, Any]) -> Iterator[Row]:
    """Prompts of the embedded world."""
    from align.tiny import world

    try:
        inspect.signature(world.rows).bind(**options)
    except TypeError as problem:
        known = ", ".join(inspect.signature(world.rows).parameters)
        raise RecipeError(f"source.tiny: {problem}; its settings are {known}") from problem
    try:
        yield from world.rows(**options)
    except ValueError as problem:
        raise RecipeError(f"source.tiny: {problem}") from problem


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _is_tiny(item: Any) -> bool:
    return isinstance(item, Mapping) and set(item) == {"tiny"}


def _sources(config: PromptsConfig) -> list[Source]:
    """The sources other than the embedded world, with the stage's defaults where they say nothing."""
    named = [item for item in _items(config.source) if not _is_tiny(item)]
    default = {"task": config.task, "family": config.family, "reference_from": config.reference_from}
    return [
        source.model_copy(update={name: value for name, value in default.items() if getattr(source, name) is None})
        for source in (parse_sources(named) if named else [])
    ]


STAGE = Stage(
    name="prompts",
    summary="instructions from files, folders or the Hub: read, converted, deduplicated, divided into splits",
    config=PromptsConfig,
    needs={},
    gives=Kind.PROMPTS,
    run=run,
    reads=("source", "against"),
    adds=("source_row", "answer"),
    version=2,
)
