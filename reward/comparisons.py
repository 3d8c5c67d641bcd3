"""What a reward model learns from: the distinct completions of one prompt, the better ones against the worse ones.

Completions with verdicts (right, wrong), with rewards (a person's ranking) and plain preferences all become the same
thing: a group of completions with values, where any completion of higher value should score above any of lower value.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from align.core.chat import IGNORED, encode_demonstrations
from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Message, Messages, Row, message_text
from align.core.store import Table

SCHEMA = pa.schema(
    {
        "family": pa.string(),
        "absolute": pa.bool_(),
        "values": pa.list_(pa.float64()),
        "counts": pa.list_(pa.int32()),
        "ids": pa.list_(pa.list_(pa.int32())),
        "labels": pa.list_(pa.list_(pa.int32())),
        "length": pa.int32(),
        "tokens": pa.int32(),
        "learned": pa.int32(),
    }
)
"""A group on disk; `absolute` where a value of 1 means right and 0 wrong, and not only better and worse. In tokens:
`length`, that of the longest prompt and completion; `tokens`, the prompt and all completions; `learned`, those of the
completions alone."""


@dataclass(slots=True)
class Group:
    """The distinct completions of one prompt.

    Attributes:
        prompt: messages.
        family: what figures are reported by.
        held_out: not to be trained on.
        absolute: whether values are verdicts (1 right, 0 wrong) or only mean better and worse.
        completions: messages of each.
        values: of each; higher is better.
        counts: how often each was sampled.
        tools: that the prompt may call, where it has any.
    """

    prompt: Messages
    family: str
    held_out: bool
    absolute: bool
    completions: list[list[Message]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tools: Any = None


def read_groups(
    table: Table, work: Path, held_out_share: float, answers: bool, counts: Counter[str], *,
    wrong_answers: bool = False, use_margins: bool = False, filled: Counter[str] | None = None,
) -> Iterator[Group]:  # fmt: skip
    """Groups of every prompt in the splits `train` and `dev`.

    Held out are the prompts of the split `dev`; where there are none, a share of the others, by their ids' hash.

    Args:
        table: completions or preferences.
        work: a folder for what is in between.
        held_out_share: see above.
        answers: whether the column `answer` (text or messages) is a right completion for a prompt that has none.
        counts: gets what was left out, and why.
        wrong_answers: whether the column `wrong_answer` is a wrong completion for a prompt that has none.
        use_margins: whether a preference's chosen completion is worth its `margin`; else, and where none is known, it
            is worth 1. The rejected one is worth 0.
        filled: gets how many prompts were filled from which of the two columns.
    """
    columns = {"answer": 1.0} if answers else {}
    columns |= {"wrong_answer": 0.0} if wrong_answers else {}
    filled = Counter() if filled is None else filled
    has_dev = any(row["split"] == "dev" for row in table.rows(["split"]))
    comparisons = "chosen" in table.columns
    for rows in by_prompt(table, work):
        first = rows[0]
        if first["split"] not in ("train", "dev"):
            counts[f"of split {first['split']}"] += 1
            continue
        held_out = first["split"] == "dev" if has_dev else _fraction(first["prompt_id"]) < held_out_share
        if comparisons:
            for row in rows:
                margin = row["margin"] if use_margins and row["margin"] is not None else 1.0
                if not 0 < margin < math.inf:
                    counts["preferences without a margin above 0"] += 1
                    continue
                family = str(row.get("family") or "all")
                sides = [list(row["chosen"]), list(row["rejected"])]
                yield Group(
                    row["prompt"], family, held_out, False, sides, [float(margin), 0.0], [1, 1], first.get("tools")
                )
        elif group := _group(rows, held_out, counts, columns, filled):
            yield group


def _group(
    rows: list[Row], held_out: bool, counts: Counter[str], columns: Mapping[str, float], filled: Counter[str]
) -> Group | None:
    # of a ranking only the best passes, and the others are not wrong for that: its rewards say more
    absolute = "rank" not in rows[0] and all(row["verdict"] is not None for row in rows)
    family = str(rows[0].get("family") or rows[0].get("task") or "all")
    group = Group(rows[0]["prompt"], family, held_out, absolute, tools=rows[0].get("tools"))
    places: dict[str, int] = {}
    for row in rows:
        value = {"passed": 1.0, "failed": 0.0}.get(row["verdict"]) if absolute else row["reward"]
        if value is None or row["verdict"] == "error":
            counts["completions without a verdict"] += 1
            continue
        if row.get("finish_reason") == "length":  # ended with an end token it would look finished
            counts["truncated completions"] += 1
            continue
        text = message_text(row["completion"]).strip()
        if not text:
            counts["empty completions"] += 1
        elif text in places:
            group.counts[places[text]] += 1
        else:
            places[text] = len(group.values)
            _add(group, row["completion"], value)
    if absolute and not held_out:
        for column, value in columns.items():
            if value not in group.values and rows[0][column]:
                answer = rows[0][column]
                _add(group, [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer, value)
                filled[column] += 1
    return group if group.values else None


def _add(group: Group, completion: list[Message], value: float) -> None:
    group.completions.append(completion)
    group.values.append(float(value))
    group.counts.append(1)


def both_sides(group: Group, per_side: int) -> list[int]:
    """Places of up to `per_side` of the best and of the worst completions; empty if all are worth the same."""
    values = group.values
    order = sorted(range(len(values)), key=lambda i: -values[i])
    high = [i for i in order if values[i] > min(values)][:per_side]
    low = [i for i in reversed(order) if values[i] < max(values) and i not in high][:per_side]
    return high + sorted(low) if high and low else []


def groups_on_disk(
    folder: Path, groups: Iterator[Group], tokenizer: Any, per_side: int, max_length: int, counts: Counter[str]
) -> tuple[Any, Any]:
    """Groups as token ids, memory-mapped: those to train on (both sides, cut to `per_side`) and those held out (whole).

    Args:
        folder: where `train.arrow` and `held_out.arrow` go.
        groups: from `read_groups`.
        tokenizer: the reward model's.
        per_side: see `both_sides`.
        max_length: longest prompt and completion in tokens; a longer one is left out and counted.
        counts: gets what was left out, and why.

    Raises:
        DataError: nothing is left to train on, or nothing to hold out.
    """
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    waiting: deque[tuple[Group, list[int]]] = deque()

    def rows() -> Iterator[Row]:
        for group in groups:
            places = list(range(len(group.values))) if group.held_out else both_sides(group, per_side)
            if not places:
                counts["prompts with one side only"] += 1
                continue
            waiting.append((group, places))
            for place in places:
                tools = {} if group.tools is None else {"tools": group.tools}
                yield {"prompt": group.prompt, "completion": group.completions[place], **tools}

    encoded = encode_demonstrations(tokenizer, rows())
    written: Counter[str] = Counter()
    with _Writer(folder / "train.arrow") as train, _Writer(folder / "held_out.arrow") as held_out:
        for first in encoded:
            group, places = waiting.popleft()
            pairs = [first, *(next(encoded) for _ in places[1:])]
            kept = [(place, pair) for place, pair in zip(places, pairs, strict=True) if len(pair[0]) <= max_length]
            counts["completions longer than max_length"] += len(places) - len(kept)
            values = [group.values[place] for place, _ in kept]
            if not kept or (not group.held_out and len(set(values)) < 2):
                counts["prompts left with one side only"] += 1
                continue
            learned = [sum(label != IGNORED for label in labels) for _, (_, labels) in kept]
            (held_out if group.held_out else train).add(
                {
                    "family": group.family,
                    "absolute": group.absolute,
                    "values": values,
                    "counts": [group.counts[place] for place, _ in kept],
                    "ids": [ids for _, (ids, _) in kept],
                    "labels": [labels for _, (_, labels) in kept],
                    "length": max(len(ids) for _, (ids, _) in kept),
                    "tokens": sum(learned) + len(kept[0][1][0]) - learned[0],
                    "learned": sum(learned),
                }
            )
            written["held_out" if group.held_out else "train"] += 1
    left_out = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    if not written["train"]:
        raise DataError(
            "no prompt of the split `train` has both better and worse completions to compare "
            f"({left_out or 'the table is empty'}); sample more completions a prompt, at a higher "
            "temperature, or let gold answers fill in (answers=true)"
        )
    if not written["held_out"]:
        raise DataError(
            f"none of the {written['train']} prompts is held out to gate the reward model on (left out: "
            f"{left_out or 'nothing'}); raise held_out_share, or give rows of the split `dev`"
        )
    opened = [datasets.Dataset.from_file(str(folder / name)) for name in ("train.arrow", "held_out.arrow")]
    return opened[0], opened[1]


class _Writer:
    """An Arrow stream, some hundred rows at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> _Writer:
        self.sink = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, SCHEMA)
        return self

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == 500:
            self._flush()

    def _flush(self) -> None:
        self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=SCHEMA))
        self.rows = []

    def __exit__(self, *problem: object) -> None:
        self._flush()
        self.stream.close()
        self.sink.close()


def _fraction(prompt_id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(sha256(f"held out {prompt_id}".encode()).digest()[:8], "big") / 2**64
