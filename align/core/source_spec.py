"""How a user names data: the settings of one source, and of a mixture of several."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.core.errors import RecipeError

Spec = str | Path | Mapping[str, Any] | Sequence[Any]


class Source(BaseModel):
    """One source of a mixture.

    `weight`: each source's share of the result. The mixture is the largest one with these shares that repeats no row:
    of n_i rows each, source i gives floor(w_i · min_j(n_j / w_j)). Either all sources of a mixture have a weight, or
    none; without weights every source gives all its rows. `fraction` and `count` apply before. All subsets are random,
    drawn with the seed, in the source's order; sources follow one another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str = Field(description="a file, folder, glob, or Hub id")
    name: str | None = Field(default=None, description="a Hub dataset's configuration")
    split: str | None = Field(default=None, description="only the rows of this split")
    revision: str | None = Field(default=None, description="a Hub dataset's revision")
    columns: dict[str, str | None] = Field(default={}, description="their column: our column; null leaves it out")
    fraction: float | None = Field(default=None, gt=0, le=1, description="share of the rows")
    count: int | None = Field(default=None, ge=1, description="number of rows")
    weight: float | None = Field(default=None, gt=0, description="share of the mixture, relative to the other weights")
    seed: int | None = Field(default=None, description="decides the random subset; else the step's seed does")
    task: str | None = Field(default=None, description="the task of rows that name none")
    family: str | None = Field(default=None, description="the family of rows that name none; else the task")
    reference_from: str | dict[str, str] | None = Field(
        default=None, description="a column with the answer; gsm8k; ifeval; or {key of the reference: column}"
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        default="refuse", description="what to do at a row that can't be converted: stop, or leave it out and count it"
    )
    license: str | None = Field(default=None, description="the source's licence, for the dataset card")


def parse_sources(spec: Spec) -> list[Source]:
    """The sources that a setting names.

    Raises:
        RecipeError: keys or values that no source has; all of them at once.
    """
    items = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    problems: list[str] = []
    sources: list[Source] = []
    for number, item in enumerate(items):
        where = f"source {number + 1} of {len(items)}: " if len(items) > 1 else "source: "
        if isinstance(item, (str, Path)):
            sources.append(Source(source=str(item)))
        elif isinstance(item, Source):
            sources.append(item)
        elif isinstance(item, Mapping):
            if {"path", "source"} <= set(item):
                problems.append(f"{where}source and path are one and the same; give one of them")
                continue
            keys = {"path": "source"}
            try:
                sources.append(Source.model_validate({keys.get(key, key): value for key, value in item.items()}))
            except ValidationError as problem:
                problems += [where + _said(error) for error in problem.errors()]
        else:
            problems.append(f"{where}{item!r:.60} was found, a name or a mapping was expected")
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        problems.append("source: some sources of the mixture have a weight and some have none; give all of them one")
    if not items:
        problems.append("source: an empty list; at least one source was expected")
    if problems:
        raise RecipeError(problems)
    return sources


def _said(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, list(Source.model_fields), n=1)
        return f"{key}: unknown key{f'; did you mean {close[0]!r}?' if close else ''}"
    return f"{key}: {error['msg']}" + ("" if error["type"] == "missing" else f" ({error['input']!r:.60} was found)")
