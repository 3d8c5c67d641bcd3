"""Stage `select`: a representative set of instructions (the Qwen2 report, arXiv:2407.10671, 4.1.1).

The report scores tagged instructions on tag diversity, semantic richness, complexity and intent completeness, and gives
no formula. InsTag (arXiv:2308.07074, 4.1), from the same group, has one: complexity-first diverse sampling, here
`complexity_first` (data_synthesis/selection.py). In passes over the instructions, those with most tags first, it takes
each one that has a tag which no instruction taken in this pass has; so every pass covers all tags that are left, by the
most complex instructions.
The paper took 6K of 306,044 that way: 16.56 tags each instead of 4.48, and all tags covered.

With `mixture` the selection has the shares of top-level tags that it names (the top of a tag's chain of parents in the
ontology), each part selected by itself. An instruction with several top-level tags counts for the one that most of its
tags lie under, of several such the one on fewest instructions. A share that can't be met, for want of instructions, is
told in the summary; `fill` says whether its places go to the other parts.

Differs from the paper: of instructions with as many tags the seed decides which comes first, not the input's order;
the mixture is ours.

The criteria of a row, given with it [our reading of the report's words]:
    score_diversity     its tags that no instruction selected before it has
    score_richness      distinct words over the root of all words (Guiraud's R): many different words, at any length
    score_complexity    its number of tags
    score_completeness  0 to 1 by the model in the role `judge`, where there is one; instructions that it does not pass
                        are not selected, whatever the method
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from align.core.errors import DataError
from align.core.records import Kind, Row, Split
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import words
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.selection import I64, Part, Pool, complexity_first, mixed, parts_of, top_counts
from data_synthesis.selection_figures import TOP, figures, mixture_figures
from data_synthesis.tag_levels import atomic_tags, parents_in, root_of
from reward.judge import Judge, JudgeConfig


class SelectConfig(JudgeConfig):
    """Settings of `select`."""

    count: int = Field(description="instructions to select; all that qualify where there are fewer", ge=1)
    method: Literal["complexity_first", "complexity", "richness", "random"] = Field(
        "complexity_first", description="complexity_first: InsTag's complexity-first diverse sampling; complexity, "
        "richness: simply the highest by that criterion; random: the control",
    )  # fmt: skip
    mixture: dict[str, float] = Field(
        {}, description="target shares of top-level tags, such as {math: 0.4, code: 0.3}; what is left to 1 is for all "
        "other instructions; none: no target",
    )  # fmt: skip
    fill: bool = Field(
        True, description="with a mixture: places that a part has too few instructions for go to the others; false: "
        "they stay empty, so that no part has more than its share of `count`",
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

    @field_validator("mixture", mode="before")
    @classmethod
    def _whole_numbers_are_shares_too(cls, value: Any) -> Any:
        is_whole = {type(share) for share in value.values()} <= {int, float} if isinstance(value, dict) else False
        return {tag: float(share) for tag, share in value.items()} if is_whole else value

    @field_validator("mixture")
    @classmethod
    def _are_shares(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share <= 1 for share in value.values()) or sum(value.values()) > 1 + 1e-9:
            shares = ", ".join(f"{tag} {share:g}" for tag, share in value.items())
            raise ValueError(f"shares above 0 that add up to 1 at most were expected, found {shares}")
        return value


def run(config: SelectConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the selected prompts in the order of the input, their tags those of the ontology where one is given."""
    table, ontology = inputs["prompts"], inputs.get("ontology")
    assert isinstance(table, Table)
    assert ontology is None or isinstance(ontology, Table)
    if "tags" not in table.columns and (config.method in ("complexity_first", "complexity") or config.mixture):
        what = "mixture" if config.mixture else f"method={config.method}"
        raise DataError(f"select: {what} needs a column `tags` in {table.name}; run `tag` first")

    atomic = atomic_tags(ontology) if ontology else None
    pool = Pool(table, config.splits, atomic, parents_in(ontology) if ontology else {}, richness)
    if not len(pool):
        raise DataError(f"select: {table.name} has no instruction in the splits {', '.join(config.splits)}")
    completeness = judged(config, table, pool, tools) if "judge" in tools.engines else None
    allowed = np.arange(len(pool)) if completeness is None else np.flatnonzero(complete(completeness, config))

    parts, several = _parts(config, pool, allowed)
    chosen = choose(config, pool, allowed, parts, tools.seed)
    tools.progress.say(f"{len(chosen)} of {len(pool)} instructions")
    if not len(chosen):
        raise DataError(
            f"select: none of the {len(pool)} instructions qualifies: they have no tags"
            f"{' of the ontology' if ontology else ''}, or the judge finds none complete; look at the summary of "
            "`tag`, or take method=random"
        )
    summary = figures(config.method, pool, allowed, chosen, len(set(atomic.values())) if atomic else None)
    if parts:
        summary["mixture"] = mixture_figures(parts, len(chosen), several)
    return Result(_selected(table, pool, chosen, completeness), summary)


def _parts(config: SelectConfig, pool: Pool, allowed: I64) -> tuple[dict[str, Part], int]:
    """The parts of the target mixture, none without one; and how many instructions have several top-level tags."""
    if not config.mixture:
        return {}, 0
    for name in config.mixture:
        if name not in pool.tops:
            known = [pool.tops[top] for top in np.argsort(-top_counts(pool), kind="stable")[:TOP]]
            under = root_of(name, pool.parents) if name in pool.names else None
            hint = f"it lies under '{under}'" if under else f"the top-level tags are {', '.join(known) or 'none'}"
            raise DataError(f"select: mixture: '{name}' is no top-level tag of the pool; {hint}")
    return parts_of(pool, allowed, config.mixture, config.count)


def choose(config: SelectConfig, pool: Pool, allowed: I64, parts: Mapping[str, Part], seed: int) -> list[int]:
    """The selected places of the pool, in the order of selection; ties are broken by the seed."""
    rng = np.random.default_rng(seed)
    order = np.empty(len(pool), dtype=np.int64)
    order[rng.permutation(allowed)] = np.arange(len(allowed))

    def by_method(places: I64, count: int) -> list[int]:
        shuffled = places[np.argsort(order[places])]
        if config.method == "complexity_first":
            return complexity_first(pool.flat, pool.ends, shuffled, count)
        if config.method != "random":
            scores = pool.complexity if config.method == "complexity" else pool.richness
            shuffled = shuffled[np.argsort(-scores[shuffled], kind="stable")]
        return [int(place) for place in shuffled[:count]]

    return mixed(parts, config.count, config.fill, by_method) if parts else by_method(allowed, config.count)


def richness(text: str) -> float:
    """Guiraud's R: distinct words over the square root of all words; 0 for a text without words."""
    found = words(text)
    return len(set(found)) / len(found) ** 0.5 if found else 0.0


def complete(completeness: NDArray[np.float64], config: SelectConfig) -> NDArray[np.bool_]:
    """Which instructions the judge passes; one without a score is not passed."""
    least = (config.judge_threshold - config.judge_lowest) / (config.judge_highest - config.judge_lowest)
    return np.nan_to_num(completeness, nan=-1.0) >= least - 1e-9


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
        new = set(pool.numbers(place).tolist()) - seen
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
            "top_tags": [pool.tops[top] for top in dict.fromkeys(pool.roots[pool.numbers(place)].tolist())],
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
    adds=(
        "tags",
        "top_tags",
        "selection_rank",
        "score_diversity",
        "score_richness",
        "score_complexity",
        "score_completeness",
    ),
    version=3,
)
