"""Stage `decontaminate`: leaves out what repeats a test set (the Qwen2 report, arXiv:2407.10671, 5.2.6).

As the report filters its training data: symbols and punctuation are stripped from both sides and the rest is cut into
words; a training sequence s_t is dropped if for some test sequence s_e the longest common *subsequence* (LCS) has

    |LCS(s_t, s_e)| >= 13   and   |LCS(s_t, s_e)| >= 0.6 · min(|s_t|, |s_e|)

A test sequence of fewer than 13 words can't be flagged by that rule; the summary says how many there are. Words are
those of `align.core.text.words`: lower case, Chinese and kana one a character.

Differs from the paper, which names neither: the pairs that are compared at all share a run of `run` words; of a
training text longer than twice the test sequence only the stretch around that run is compared
(align/core/overlap.py says why).
Prompt and completion of a row are a sequence each, and so are the chosen and the rejected side of a preference.

Nothing is left out silently: `dropped.jsonl` in the step's folder holds a line for every row that was, with the test
item, the run of words and the lengths.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.core.errors import DataError, RecipeError
from align.core.overlap import Index, Overlap
from align.core.records import Kind, Row, Split
from align.core.source_spec import parse_sources
from align.core.sources import read_rows
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import words

BATCH_CHARACTERS = 4_000_000
"""Characters of training text looked at together."""

EXAMPLES = 5
"""Dropped rows told of in the summary, for each test set."""

_IDS = ("id", "task_id", "question_id", "key")
_ANSWERS = ("completion", "chosen", "rejected", "answer")


class DecontaminateConfig(StageConfig):
    """Settings of `decontaminate`."""

    against: list[str | dict[str, Any]] = Field(
        [], description="the test sets: files, folders, globs, Hub ids, or mappings with columns, split, name, …"
    )
    text: Literal["prompt", "completion", "both"] = Field(
        "both", description="what of a training row is compared: its prompt; its completion (of a preference both "
        "sides, of a prompt the column `answer`); or both, each by itself",
    )  # fmt: skip
    test_text: Literal["prompt", "answer", "both"] = Field(
        "prompt", description="what of a test item is compared: its prompt; its answer; or both, each by itself"
    )
    run: int = Field(
        8, ge=1, description="words in a row that two texts must share to be compared; fewer finds texts that were "
        "edited more, and takes longer; 8 is our choice (Tülu 3 looks for runs of 8)",
    )  # fmt: skip
    least: int = Field(13, ge=1, description="words of the longest common subsequence, at least; 13 is the report's")
    share: float = Field(
        0.6, gt=0, le=1, description="share of the shorter text that the subsequence must be; 0.6 is the report's"
    )
    splits: list[Split] = Field(
        ["train"], min_length=1, description="rows of these splits are looked at; others are not trained on, and pass"
    )

    @field_validator("against")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        try:
            parse_sources(value or ["none"])
        except RecipeError as problem:
            raise ValueError("; ".join(text.removeprefix("source: ") for text in problem.problems)) from problem
        return value

    @model_validator(mode="after")
    def _runs_are_no_longer_than_what_is_looked_for(self) -> Self:
        if self.run > self.least:
            raise ValueError(
                f"run={self.run} is longer than least={self.least}: texts with enough in common would not even be "
                "compared; lower run"
            )
        return self


@dataclass
class SetCounts:
    """What became of one test set.

    Attributes:
        items: how many it has.
        short: sequences of too few words to be flagged.
        hit: items that a training row repeats.
        rows: training rows that repeat an item of this set.
    """

    items: int = 0
    short: int = 0
    hit: set[int] = field(default_factory=set)
    rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def run(config: DecontaminateConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the rows that repeat no test item, in order, as they came."""
    table, tests = inputs["data"], inputs.get("tests")
    assert isinstance(table, Table)
    assert tests is None or isinstance(tests, Table)
    suite = Suite(config, _items(config, tests, tools))
    tools.progress.say(f"{len(suite.sequences)} test sequences of {len(suite.sets)} sets")
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, suite, tools, summary), summary)


class Suite:
    """The test sets: every sequence of their items, and an index of them.

    Attributes:
        sequences: the texts; an item has one, or two with its answer.
        owners: of each sequence: the set's name and the item's number and id.
        sets: by name.

    Raises:
        DataError: no test item was given.
    """

    def __init__(self, config: DecontaminateConfig, items: Iterable[tuple[str, Row]]) -> None:
        self.sequences: list[str] = []
        self.owners: list[tuple[str, int, str]] = []
        self.sets: dict[str, SetCounts] = {}
        for name, row in items:
            known = self.sets.setdefault(name, SetCounts())
            own = next((str(row[key]) for key in _IDS if row.get(key) is not None), None)
            number = row["source_row"] if row.get("source_row") is not None else known.items
            for text in _sides(row, config.test_text):
                self.sequences.append(text)
                self.owners.append((name, known.items, own or f"row {number}"))
            known.items += 1
        if not self.sequences:
            raise DataError(
                "decontaminate: there is nothing to compare with; name the test sets in `against` or `tests`"
            )
        self.index = Index(self.sequences, config.run)
        for (name, _, _), length in zip(self.owners, self.index.lengths.tolist(), strict=True):
            self.sets[name].short += length < config.least


def _items(config: DecontaminateConfig, tests: Table | None, tools: Tools) -> Iterator[tuple[str, Row]]:
    """Yields every test item with the name of its set: that of its file, the whole path where two have one name."""
    sources = parse_sources(config.against) if config.against else []
    names = Counter(Path(source.source).name for source in sources)
    for source in sources:
        name = Path(source.source).name
        for row in read_rows([source], Kind.PROMPTS, tools.seed):
            yield name if names[name] == 1 else source.source, row
    for row in tests.rows() if tests is not None else ():
        yield str(row["source"]), row


def _sides(row: Row, which: str) -> Iterator[str]:
    """Yields the texts of a row that are compared: what was said before the answer, and each answer."""
    if which in ("prompt", "both"):
        yield "\n".join(turn["content"] for turn in row["prompt"])
    if which in ("completion", "answer", "both"):
        for name in _ANSWERS:
            answer = row.get(name)
            if isinstance(answer, str):
                yield answer
            elif answer:
                yield "\n".join(turn["content"] for turn in answer)


def _rows(
    config: DecontaminateConfig, table: Table, suite: Suite, tools: Tools, summary: dict[str, Any]
) -> Iterator[Row]:
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    tools.progress.start(len(table), "rows")
    with (tools.out / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for batch in _batches(table.rows()):
            found = _repeats(config, batch, suite)
            for number, row in enumerate(batch):
                counts["read"] += 1
                counts["looked_at"] += row["split"] in config.splits
                if number not in found:
                    counts["kept"] += 1
                    yield row
                    continue
                told = _told(row, number, found[number], suite)
                lost[f"repeats {told['set']}"] += 1
                file.write(json.dumps({"row": counts["read"] - 1, **told}, ensure_ascii=False) + "\n")
            tools.progress.advance(len(batch), dropped=lost.total())
            summary.update(_summary(config, suite, counts, lost))
    if not counts["read"]:
        summary.update(_summary(config, suite, counts, lost))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, _sides(row, "both")))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _repeats(config: DecontaminateConfig, batch: Sequence[Row], suite: Suite) -> dict[int, list[tuple[str, Overlap]]]:
    """The rows of a batch that repeat test items, by number: the texts and how they overlap, the worst first."""
    texts: list[str] = []
    owners: list[int] = []
    for number, row in enumerate(batch):
        if row["split"] in config.splits:
            sides = list(_sides(row, config.text))
            texts += sides
            owners += [number] * len(sides)
    found: dict[int, list[tuple[str, Overlap]]] = {}
    for overlap in suite.index.overlaps(texts, config.least, config.share):
        found.setdefault(owners[overlap.text], []).append((texts[overlap.text], overlap))
    for overlaps in found.values():
        overlaps.sort(key=lambda one: (-one[1].share, -one[1].common))
    return found


def _told(row: Row, number: int, overlaps: Sequence[tuple[str, Overlap]], suite: Suite) -> dict[str, Any]:
    """Why a row is dropped, by the item that it repeats most; the sets and items that it repeats are counted."""
    text, worst = overlaps[0]
    name, _, item = suite.owners[worst.item]
    run = " ".join(words(text)[worst.place : worst.place + suite.index.n])
    told = {
        "prompt_id": row["prompt_id"], "set": name, "item": item, "run": run, "common": worst.common,
        "row_words": worst.text_words, "item_words": worst.item_words, "share": round(worst.share, 4),
        "text": text, "item_text": suite.sequences[worst.item],
        "others": sorted({" ".join(suite.owners[one.item][::2]) for _, one in overlaps} - {f"{name} {item}"}),
    }  # fmt: skip
    for other in {suite.owners[overlap.item][0] for _, overlap in overlaps}:
        suite.sets[other].rows += 1
    for _, overlap in overlaps:
        of, place, _ = suite.owners[overlap.item]
        suite.sets[of].hit.add(place)
    if len(suite.sets[name].examples) < EXAMPLES:
        suite.sets[name].examples.append({key: told[key] for key in ("prompt_id", "item", "run", "common", "share")})
    return told


def _summary(
    config: DecontaminateConfig, suite: Suite, counts: Mapping[str, int], lost: Mapping[str, int]
) -> dict[str, Any]:
    short = sum(known.short for known in suite.sets.values())
    return {
        "yield": {name: counts.get(name, 0) for name in ("read", "kept")},
        "lost": dict(sorted(lost.items())),
        "looked_at": counts.get("looked_at", 0),
        "rule": f"a common subsequence of at least {config.least} words and {config.share:g} of the shorter text, "
        f"looked for where {config.run} words in a row are shared",
        "cannot_be_flagged": f"{short} of {len(suite.sequences)} test sequences have fewer than {config.least} words",
        "sets": {
            name: {
                "items": known.items, "too_short_to_be_flagged": known.short, "items_repeated": len(known.hit),
                "rows_dropped": known.rows, "examples": known.examples,
            }
            for name, known in suite.sets.items()
        },
    }  # fmt: skip


STAGE = Stage(
    name="decontaminate",
    summary="leaves out rows that repeat test sets: runs of words, then the longest common subsequence",
    config=DecontaminateConfig,
    needs={
        "data": Need(
            (Kind.PROMPTS, Kind.DEMONSTRATIONS, Kind.PREFERENCES, Kind.COMPLETIONS),
            "prompts, demonstrations, preferences or completions",
        ),
        "tests": Need(Kind.PROMPTS, "test sets that steps of the recipe give, beside `against`", optional=True),
    },
    gives=Kind.PROMPTS,
    run=run,
    reads=("against",),
    gives_as="data",
)
