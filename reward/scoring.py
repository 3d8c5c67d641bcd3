"""Rewards of many rows, a chunk at a time; what was scored stays scored, whatever happens to the process.

A chunk's rewards are written to the step's work folder before its rows are given, in one rename. A run that was killed
reads them back and goes on with the chunk that it was at. Within a chunk rows of like length share a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.core.records import Messages, Row
from align.core.stage import Tools

if TYPE_CHECKING:  # it imports torch
    from reward.members import Judge
    from reward.model import Item

CHUNK = 256
"""Rows of a chunk: enough to find texts of like length, few enough to lose little."""

Rewards = list[float | None]


def scored(
    judge: Judge, rows: Iterable[Row], sides: Sequence[str], tools: Tools, counts: Counter[str]
) -> Iterator[tuple[Row, Rewards]]:
    """Yields each row with the rewards of its sides, in order.

    Args:
        judge: a reward model or an ensemble.
        rows: with a `prompt`, messages under each side's name, and `tools` where the prompt may call some.
        sides: columns to score, such as `completion`, or `chosen` and `rejected`.
        tools: for the work folder and the progress; `start` is the caller's.
        counts: gets what has no reward (None), by reason: `too_long` for the model, `empty`.
    """
    folder = tools.work / "rewards"
    folder.mkdir(parents=True, exist_ok=True)
    following = iter(rows)
    number = 0
    while chunk := list(islice(following, CHUNK)):
        file = folder / f"{number:06d}.npy"
        rewards = _kept(file, len(chunk), len(sides))
        if rewards is None:
            rewards = _score(judge, chunk, sides)
            _keep(file, rewards)
        empty = sum(not row[side] for row in chunk for side in sides)
        counts["empty"] += empty
        counts["too_long"] += int(np.isnan(rewards).sum()) - empty
        tools.progress.advance(len(chunk))
        for row, own in zip(chunk, rewards.tolist(), strict=True):
            yield row, [None if reward != reward else reward for reward in own]
        number += 1


def item_of(prompt: Messages, completion: Messages, tools: Any) -> Item:
    """What a judge scores: a prompt, a completion and, where the prompt may call some, the tools of its row."""
    return (prompt, completion, tools) if tools else (prompt, completion)


def _score(judge: Judge, chunk: Sequence[Row], sides: Sequence[str]) -> Any:
    """Rewards of a chunk, (rows, sides), nan where there is none."""
    places = [(i, j) for i, row in enumerate(chunk) for j, side in enumerate(sides) if row[side]]
    items = [item_of(chunk[i]["prompt"], chunk[i][sides[j]], chunk[i].get("tools")) for i, j in places]
    rewards = np.full((len(chunk), len(sides)), np.nan)
    for place, reward in zip(places, judge.score_fitting(items), strict=True):
        rewards[place] = np.nan if reward is None else reward
    return rewards


def _kept(file: Path, rows: int, sides: int) -> Any:
    """A chunk's rewards from an earlier attempt; None where there are none, or not as many."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows, sides) else None


def _keep(file: Path, rewards: Any) -> None:
    part = file.with_suffix(".part")
    with part.open("wb") as opened:
        np.save(opened, rewards)
    part.replace(file)
