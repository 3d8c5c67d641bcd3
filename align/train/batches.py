"""What one process computes in one optimizer step of SFT: its share of the global batch, in micro batches.

The rows of a step are dealt to the processes so that all have about as many tokens, and cut into micro batches of at
most so many tokens. Neither changes the step: the loss is divided by the weight of the whole global batch, which every
process knows, since it knows which rows the others have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from align.core.chat import IGNORED
from align.core.segments import Branch, Tree, collate

AT_ONCE = {"cpu": 4096, "cuda": 16384}
"""Tokens of a micro batch at most, where memory allows and nothing else is said."""


class Steps:
    """All steps of a training in order; item `step * processes + process` is that process's share of the step.

    An item holds `parts`, the micro batches (see `align.core.segments.collate`), each with the `weights` of its
    predictions; and of the whole global batch the sum of the weights (`weight`), how many tokens it has (`tokens`), how
    many of them are fed, which are all but each row's last (`positions`), and how many are supervised (`supervised`).

    Args:
        rows: a `datasets.Dataset` with `input_ids`; `turns`, the first token and the one after the last of each
            supervised message, one pair after the other; and `weights`, of each message, or none where all are 1.
        order: row numbers of all steps.
        batch: rows of a step, over all processes.
        processes: that share a step.
        flat: whether rows lie one behind the other, or are padded.
        tokens_at_once: of a micro batch at most; a longer row is one by itself.
        rows_at_once: of a micro batch at most.
        pad_id: any token.
    """

    def __init__(
        self,
        rows: Any,
        order: npt.NDArray[np.int64],
        batch: int,
        processes: int,
        flat: bool,
        tokens_at_once: int,
        rows_at_once: int,
        pad_id: int,
    ) -> None:
        self.rows, self.order, self.batch, self.processes = rows, order, batch, processes
        self.flat, self.pad_id = flat, pad_id
        self.tokens_at_once, self.rows_at_once = tokens_at_once, rows_at_once
        self.lengths = column(rows, "length")
        self.supervised, self.weight = supervision(rows)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch) * self.processes

    def __getitem__(self, item: int) -> dict[str, Any]:
        step, process = divmod(int(item), self.processes)
        numbers = self.order[step * self.batch : (step + 1) * self.batch]
        lengths = self.lengths[numbers]
        shares = deal(lengths, self.processes)
        cuts = [cut(lengths[share], self.flat, self.tokens_at_once, self.rows_at_once) for share in shares]
        most = max(len(parts) for parts in cuts)  # processes whose weights are sharded must run in step
        mine = cut(lengths[shares[process]], self.flat, self.tokens_at_once, self.rows_at_once, most)
        return {
            "parts": [self.part(numbers[shares[process][places]]) for places in mine],
            "weight": float(self.weight[numbers].sum()),
            "tokens": int(lengths.sum()),
            "positions": int((lengths - 1).sum()),
            "supervised": int(self.supervised[numbers].sum()),
        }

    def part(self, numbers: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The micro batch of some rows."""
        found = self.rows[numbers.tolist()]
        trees: list[Tree] = []
        weights: list[float] = []
        weighted = any(found["weights"])
        for ids, turns, given in zip(found["input_ids"], found["turns"], found["weights"], strict=True):
            labels = [IGNORED] * len(ids)
            for place in range(0, len(turns), 2):
                start, end = max(1, turns[place]), turns[place + 1]  # nothing comes before the first token
                labels[start:end] = ids[start:end]
                weights += [given[place // 2] if given else 1.0] * (end - start) if weighted else ()
            trees.append(Tree(ids[:1], [Branch(ids[1:], labels[1:])]))
        batch = collate(trees, self.flat, self.pad_id)
        wanted = batch["shift_labels"] != IGNORED
        batch["weights"] = wanted.float()
        if weighted:  # predictions and weights are in the order of the rows
            batch["weights"][wanted] = torch.tensor(weights)
        del batch["branch"]
        return batch


def column(rows: Any, name: str) -> npt.NDArray[Any]:
    """A column of numbers."""
    return np.asarray(rows.with_format("numpy")[name][:])


def supervision(rows: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Of each row how many tokens are supervised, (N,), and the sum of their weights, (N,)."""
    counts, weights = [], []
    for chunk in rows.with_format("arrow").iter(100_000):
        turns = chunk["turns"].combine_chunks()
        edges = turns.flatten().to_numpy().reshape(-1, 2)
        tokens = edges[:, 1] - np.maximum(1, edges[:, 0])
        row = np.repeat(np.arange(len(turns)), turns.value_lengths().to_numpy() // 2)
        given = chunk["weights"].combine_chunks()
        of_row = np.repeat(np.arange(len(given)), given.value_lengths().to_numpy())
        each = np.ones(len(tokens))
        each[np.isin(row, of_row)] = given.flatten().to_numpy()
        counts.append(np.bincount(row, tokens, len(turns)).astype(np.int64))
        weights.append(np.bincount(row, tokens * each, len(turns)))
    return np.concatenate(counts), np.concatenate(weights)


def deal(lengths: npt.NDArray[np.integer[Any]], processes: int) -> list[npt.NDArray[np.int64]]:
    """Places of a step's rows for each process, the longest first, so that all have about as many rows and tokens."""
    longest_first = np.argsort(-lengths, kind="stable")
    place = np.arange(len(lengths))
    there, back = place % processes, processes - 1 - place % processes  # 0 1 2, 2 1 0, 0 1 2, ...
    process = np.where(place // processes % 2, back, there)
    return [longest_first[process == each] for each in range(processes)]


def cut(
    lengths: npt.NDArray[np.integer[Any]], flat: bool, tokens: int, rows: int, at_least: int = 1
) -> list[list[int]]:
    """Places of each micro batch; the lengths fall.

    Args:
        lengths: of the rows.
        flat: whether only the rows' own tokens count, or each row as long as the longest beside it.
        tokens: of a micro batch at most.
        rows: of a micro batch at most.
        at_least: micro batches, where there are as many rows.
    """
    parts: list[list[int]] = []
    held = 0
    for place, length in enumerate(lengths.tolist()):
        full = not parts or len(parts[-1]) == rows
        if full or (held + length if flat else int(lengths[parts[-1][0]]) * (len(parts[-1]) + 1)) > tokens:
            parts.append([])
            held = 0
        parts[-1].append(place)
        held += length
    while len(parts) < min(at_least, len(lengths)):
        largest = max(parts, key=len)
        half = len(largest) // 2
        parts.append(largest[half:])
        del largest[half:]
    return parts
