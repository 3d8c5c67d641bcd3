"""Stage `select`: a representative set of instructions (the Qwen2 report, arXiv:2407.10671, 4.1.1).

The report scores tagged instructions on tag diversity, semantic richness, complexity and intent completeness, and gives
no formula. InsTag (arXiv:2308.07074, 4.1), from the same group, has one: complexity-first diverse sampling, here
`complexity_first`. In passes over the instructions, those with most tags first, it takes each one that has a tag which
no instruction taken in this pass has; so every pass covers all tags that are left, by the most complex instructions.
The paper took 6K of 306,044 that way: 16.56 tags each instead of 4.48, and all tags covered.

Differs from the paper: of instructions with as many tags the seed decides which comes first, not the input's order.

The criteria of a row, given with it [our reading of the report's words]:
    score_diversity     its tags that no instruction selected before it has
    score_richness      distinct words over the root of all words (Guiraud's R): many different words, at any length
    score_complexity    its number of tags
    score_completeness  0 to 1 by the model in the role `judge`, where there is one; instructions that it does not pass
                        are not selected, whatever the method
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import words
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.tag_levels import atomic_tags
from reward.judge import Judge, JudgeConfig

TOP = 30
"""Tags counted before and after in the summary, for the report's chart."""

Tags = Sequence[NDArray[np.int32]]


class SelectConfig(JudgeConfig):
    """Settings of `select`."""

    count: int = Field(description="instructions to select; all that qualify where there are fewer", ge=1)
    method: Literal["complexity_first", "complexity", "richness", "random"] = Field(
        "complexity_first", description="complexity_first: InsTag's complexity-first diverse sampling; complexity, "
        "richness: simply the highest by that criterion; random: the control",
    )  # fmt: skip
    splits: list[Split] = Field(["train"], min_length=1, description="instructions of these splits may be selected")
    judge_template: str = Field(
        "intent", description="what the judge is asked about completeness: a shipped template's name, a file, or a "
        "text, with {instruction}",
    )  # fmt: skip
    judge_threshold: float = Field(6.0, description="a completeness of at least this passes [our choice]")
    max_error_share: float = Field(
        0.05, ge=0, le=1, description="the stage fails when the judge gives no score for a larger share"
    )


def run(config: SelectConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the selected prompts in the order of the input, their tags those of the ontology where one is given."""
    table, ontology = inputs["prompts"], inputs.get("ontology")
    assert isinstance(table, Table)
    assert ontology is None or isinstance(ontology, Table)
    atomic = atomic_tags(ontology) if ontology else None
    if config.method != "random" and "tags" not in table.columns and config.method != "richness":
        raise DataError(f"select: method={config.method} needs a column `tags` in {table.name}; run `tag` first")

    pool = Pool(table, config.splits, atomic)
    if not len(pool):
        raise DataError(f"select: {table.name} has no instruction in the splits {', '.join(config.splits)}")
    completeness = judged(config, table, pool, tools) if "judge" in tools.engines else None
    allowed = np.arange(len(pool)) if completeness is None else np.flatnonzero(pool.complete(completeness, config))

    chosen = choose(config, pool, allowed, tools.seed)
    tools.progress.say(f"{len(chosen)} of {len(pool)} instructions")
    if not len(chosen):
        raise DataError(
            f"select: none of the {len(pool)} instructions qualifies: they have no tags"
            f"{' of the ontology' if ontology else ''}, or the judge finds none complete; look at the summary of "
            "`tag`, or take method=random"
        )
    summary = pool.summary(chosen, len(set(atomic.values())) if atomic else None)
    summary["candidates"] = len(allowed)
    return Result(_selected(table, pool, chosen, completeness), summary)


def complexity_first(tags: Tags, order: Iterable[int], count: int) -> list[int]:
    """InsTag's complexity-first diverse sampling; untagged instructions never qualify.

    Args:
        tags: distinct tag numbers of each instruction.
        order: the instructions that may be selected; those with as many tags stay in this order.
        count: how many to select.

    Returns:
        Places in `tags`, in the order of selection.
    """
    left = sorted(order, key=lambda place: -len(tags[place]))  # sorted() is stable
    selected: list[int] = []
    while len(selected) < count and left:
        covered: set[int] = set()  # reset at each pass
        coverable = len(np.unique(np.concatenate([tags[place] for place in left])))
        rest: list[int] = []
        for number, place in enumerate(left):
            if len(selected) == count or len(covered) == coverable:
                rest += left[number:]  # nothing can be added in this pass any more
                break
            new = set(tags[place].tolist()) - covered
            if new:
                selected.append(place)
                covered |= new
            else:
                rest.append(place)
        if len(rest) == len(left):
            break
        left = rest
    return selected


def choose(config: SelectConfig, pool: Pool, allowed: NDArray[np.int64], seed: int) -> list[int]:
    """The selected places of the pool, in the order of selection; ties are broken by the seed."""
    shuffled = np.random.default_rng(seed).permutation(allowed)
    if config.method == "complexity_first":
        return complexity_first(pool.tags, shuffled.tolist(), config.count)
    if config.method == "random":
        return [int(place) for place in shuffled[: config.count]]
    scores = pool.complexity if config.method == "complexity" else pool.richness
    best = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    return [int(place) for place in best[: config.count]]


def richness(text: str) -> float:
    """Guiraud's R: distinct words over the square root of all words; 0 for a text without words."""
    found = words(text)
    return len(set(found)) / len(found) ** 0.5 if found else 0.0


class Pool:
    """The instructions that may be selected: what selection needs of each, without its text.

    Attributes:
        tags: distinct tag numbers of each instruction, int32 (instructions' own numbers of tags).
        names: of the tags.
        complexity: number of tags, (instructions,).
        richness: see `richness`, (instructions,).
    """

    def __init__(self, table: Table, splits: Sequence[str], atomic: Mapping[str, str] | None) -> None:
        self.splits = splits
        self.atomic = atomic
        self.skipped: Counter[str] = Counter()
        numbers: dict[str, int] = {}
        flat, ends, rich = array("i"), array("q", [0]), array("d")
        for row in table.rows([name for name in ("split", "prompt", "tags") if name in table.columns]):
            if row["split"] not in splits:
                self.skipped[f"split {row['split']}"] += 1
                continue
            flat.extend(numbers.setdefault(tag, len(numbers)) for tag in self.tags_of(row))
            ends.append(len(flat))
            rich.append(richness(last_user_text(row)))
        self.names = list(numbers)
        self._flat, self._ends = np.asarray(flat, dtype=np.int32), np.asarray(ends)
        self.tags: Tags = np.split(self._flat, self._ends[1:-1]) if len(rich) else []
        self.complexity = np.diff(self._ends)
        self.richness = np.asarray(rich)

    def __len__(self) -> int:
        return len(self.richness)

    def tags_of(self, row: Row) -> list[str]:
        """A row's distinct tags, those of the ontology where there is one; raw tags that it dropped are left out."""
        tags = row.get("tags") or []
        known = tags if self.atomic is None else [self.atomic[tag] for tag in tags if tag in self.atomic]
        return list(dict.fromkeys(known))

    def complete(self, completeness: NDArray[np.float64], config: SelectConfig) -> NDArray[np.bool_]:
        """Which instructions the judge passes; one without a score is not passed."""
        least = (config.judge_threshold - config.judge_lowest) / (config.judge_highest - config.judge_lowest)
        return np.nan_to_num(completeness, nan=-1.0) >= least - 1e-9

    def summary(self, chosen: Sequence[int], ontology_size: int | None) -> dict[str, Any]:
        """Figures before and after. Coverage is of the ontology's tags, or of those in the pool."""
        before = np.bincount(self._flat, minlength=len(self.names))
        parts = [self.tags[place] for place in chosen]
        after = np.bincount(np.concatenate(parts), minlength=len(self.names)) if parts else np.zeros_like(before)
        all_tags = ontology_size or len(self.names)
        top = sorted(range(len(self.names)), key=lambda n: (-before[n], self.names[n]))[:TOP]
        return {
            "pool": len(self),
            "selected": len(chosen),
            "untagged": int((self.complexity == 0).sum()),
            "skipped": dict(self.skipped),
            "tags": all_tags,
            "coverage_before": round(int((before > 0).sum()) / all_tags, 4) if all_tags else None,
            "coverage_after": round(int((after > 0).sum()) / all_tags, 4) if all_tags else None,
            "complexity_before": round(float(self.complexity.mean()), 4),
            "complexity_after": round(float(self.complexity[list(chosen)].mean()), 4),
            "richness_before": round(float(self.richness.mean()), 4),
            "richness_after": round(float(self.richness[list(chosen)].mean()), 4),
            "tags_before": {self.names[n]: int(before[n]) for n in top},
            "tags_after": {self.names[n]: int(after[n]) for n in top},
        }


def judged(config: SelectConfig, table: Table, pool: Pool, tools: Tools) -> NDArray[np.float64]:
    """Completeness of each instruction of the pool, 0 to 1; NaN where the judge gave no score."""
    judge = Judge(tools.engines["judge"], config, tools.seed, needs=["instruction"])
    budget = ErrorBudget("select (judge)", config.max_error_share)
    scores = np.full(len(pool), np.nan)
    tools.progress.start(len(pool), "instructions judged")
    rows = (row for row in table.rows(["split", "prompt_id", "prompt"]) if row["split"] in config.splits)
    items = ((place, {"instruction": last_user_text(row)}) for place, row in enumerate(rows))
    for place, verdict in judge.judge_many(items):
        budget.count(verdict.reward is None, verdict.detail)
        scores[place] = np.nan if verdict.reward is None else verdict.reward
        tools.progress.advance(1)
    budget.check()
    return scores


def _selected(
    table: Table, pool: Pool, chosen: Sequence[int], completeness: NDArray[np.float64] | None
) -> Iterator[Row]:
    """Yields the chosen rows with their scores; `selection_rank` is the order in which they were chosen."""
    gains: dict[int, int] = {}
    seen: set[int] = set()
    for place in chosen:
        new = set(pool.tags[place].tolist()) - seen
        gains[place] = len(new)
        seen |= new
    ranks = {place: rank for rank, place in enumerate(chosen)}
    place = -1
    for row in table.rows():
        if row["split"] not in pool.splits:
            continue
        place += 1
        if place not in ranks:
            continue
        yield {
            **row,
            "tags": pool.tags_of(row),
            "selection_rank": ranks[place],
            "score_diversity": gains[place],
            "score_richness": float(pool.richness[place]),
            "score_complexity": int(pool.complexity[place]),
            "score_completeness": None if completeness is None else float(completeness[place]),
        }


def asks(config: SelectConfig) -> dict[str, Asks]:
    """The votes on each instruction."""
    return {"judge": Asks(config.judge_votes, config.judge_max_tokens)}


STAGE = Stage(
    name="select",
    summary="a diverse set of complex instructions",
    config=SelectConfig,
    needs={
        "prompts": Need(Kind.PROMPTS, "instructions, tagged unless the method is random"),
        "ontology": Need(Kind.ONTOLOGY, "the tags to select by; else the raw tags", optional=True),
    },
    gives=Kind.PROMPTS,
    run=run,
    engines={"judge": "a model that says whether an instruction's intent is complete"},
    optional_engines=("judge",),
    reads=("judge_template",),
    asks=asks,
    adds=("tags", "selection_rank", "score_diversity", "score_richness", "score_complexity", "score_completeness"),
    version=2,
)
