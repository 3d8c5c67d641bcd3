"""Rows as token ids on disk, and the order in which they are trained on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from align.core.errors import DataError
from align.core.records import Messages

TokenRow = Mapping[str, Sequence[int | float]]
"""Lists of numbers; `weights` are fractions, all others whole. Columns of token ids have names that end in "_ids"."""


def tokens_on_disk(path: Path, rows: Iterable[TokenRow | str], what: str) -> tuple[Any, Counter[str]]:
    """Writes rows of ids to an Arrow file, bounded in memory, and opens it memory-mapped; what is there is used again.

    Args:
        path: the file; beside it the counts are kept.
        rows: a row's lists, or the reason for which a row was left out, which is counted.
        what: what the rows are, for the error message.

    Returns:
        A `datasets.Dataset` with the rows' columns and `length`, the token ids of all its columns; and the counts.

    Raises:
        DataError: no row is left.
    """
    import datasets

    counts_file = path.with_suffix(".json")
    if not counts_file.exists():
        counts = Counter(_write(path, rows))
        part = counts_file.with_suffix(".counts")
        part.write_text(json.dumps(counts))
        part.replace(counts_file)
    counts = Counter(json.loads(counts_file.read_text()))
    if not counts["rows"]:
        left_out = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n) or "there were none"
        remedy = "; raise max_length" if counts["too_long"] else ""
        raise DataError(f"no {what} to train on: {left_out}{remedy}")
    return datasets.Dataset.from_file(str(path)), counts


def _write(path: Path, rows: Iterable[TokenRow | str]) -> Counter[str]:
    import pyarrow as pa

    counts: Counter[str] = Counter(rows=0)
    left = iter(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = None
    with pa.OSFile(str(part), "wb") as sink:
        while chunk := list(islice(left, 1000)):
            kept = [row for row in chunk if not isinstance(row, str)]
            counts.update(row for row in chunk if isinstance(row, str))
            if not kept:
                continue
            counts["rows"] += len(kept)
            types = {name: pa.list_(pa.float32() if name == "weights" else pa.int32()) for name in kept[0]}
            columns = {name: pa.array([row[name] for row in kept], kind) for name, kind in types.items()}
            ids = [name for name in types if name.endswith("_ids")]
            columns["length"] = pa.array([sum(len(row[name]) for name in ids) for row in kept], pa.int32())
            batch = pa.RecordBatch.from_pydict(columns)
            writer = writer or pa.ipc.new_stream(sink, batch.schema)
            writer.write_batch(batch)
        if writer:
            writer.close()
    part.rename(path)
    return counts


def batch_order(
    lengths: npt.NDArray[np.integer[Any]], epochs: float, global_batch_size: int, seed: int, by_length: bool = True
) -> npt.NDArray[np.int64]:
    """Row numbers of all epochs in training order: a whole number of global batches.

    It depends on nothing but its arguments, so that the same rows meet in a step however a global batch is split over
    micro batches and processes. Every row comes at least ⌊epochs⌋ times; the last batch is filled from a further pass.
    Data too small for one global batch give one step on all of it.

    Args:
        lengths: of the rows in tokens, (N,).
        epochs: passes.
        global_batch_size: rows of a step.
        seed: of the shuffling.
        by_length: whether rows of like length meet in a step, which saves padding; else chance alone decides.
    """
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    wanted = math.ceil(rows * epochs)
    if wanted >= global_batch_size:
        wanted = math.ceil(wanted / global_batch_size) * global_batch_size
    order = np.concatenate([rng.permutation(rows) for _ in range(math.ceil(wanted / rows))])[:wanted]
    if not by_length:
        return order
    # Shuffled windows of some batches are sorted by length, cut, and the batches shuffled again: little padding, and
    # over the epochs a row meets many others.
    window = 8 * global_batch_size
    parts: list[npt.NDArray[np.int64]] = []
    for start in range(0, wanted, window):
        near = order[start : start + window]
        near = near[np.argsort(lengths[near], kind="stable")]
        batches = [near[i : i + global_batch_size] for i in range(0, len(near), global_batch_size)]
        parts += [batches[i] for i in rng.permutation(len(batches))]
    return np.concatenate(parts)


def silent(messages: Messages) -> bool:
    """Whether the assistant's turns have neither text nor a tool call: who learns from them learns to say nothing."""
    turns = [message for message in messages if message["role"] == "assistant"]
    return bool(turns) and not any((turn["content"] or "").strip() or turn.get("tool_calls") for turn in turns)
