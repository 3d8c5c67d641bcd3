"""Records that hold more than one answer in a row of their own making: taken apart into one record an answer."""

from __future__ import annotations

from typing import Any

from align.core.errors import DataError

Record = dict[str, Any]

LLMBAR = {"input", "output_1", "output_2", "label"}
"""The columns of LLMBar (arXiv:2310.07641)."""

OF_EACH = ("reward", "verdict", "detail", "generator", "finish_reason")
"""Columns that say something of each answer of a list."""

SIDES = ("chosen", "rejected")


def are_texts(value: Any) -> bool:
    """Whether a value is a list of texts, rather than of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def each_pair(record: Record) -> list[Record]:
    """The pairs of a record: one, or each of the chosen with each of the rejected where these are lists of texts."""
    if not all(are_texts(record[side]) for side in SIDES):
        return [record]
    return [
        {**record, "chosen": chosen, "rejected": rejected}
        for chosen in record["chosen"]
        for rejected in record["rejected"]
    ]


def each_answer(record: Record, answer: str, where: str) -> list[Record]:
    """The answers of a record: one, or each of a list of texts, with what is said of each.

    Raises:
        DataError: what is said of them are not as many.
    """
    texts = record[answer]
    if not are_texts(texts):
        return [record]
    told = {name: record[name] for name in OF_EACH if isinstance(record.get(name), list)}
    if uneven := [name for name, values in told.items() if len(values) != len(texts)]:
        raise DataError(f"{where}: {answer} has {len(texts)} answers, {uneven[0]} {len(told[uneven[0]])}; one each")
    found = []
    for number, text in enumerate(texts):
        own = {name: values[number] for name, values in told.items()}
        if isinstance(own.get("verdict"), bool):
            own["verdict"] = "passed" if own["verdict"] else "failed"
        found.append({**record, answer: text, "sample_index": number, **own})
    return found


def two_outputs(record: Record, where: str) -> Record:
    """LLMBar's record as a preference.

    Raises:
        DataError: the label is neither 1 nor 2.
    """
    better = str(record["label"])
    if better not in ("1", "2"):
        raise DataError(
            f"{where}: label is {record['label']!r:.60}; 1 or 2 was expected, the number of the better output"
        )
    worse = "1" if better == "2" else "2"
    sides = {"prompt": record["input"], "chosen": record[f"output_{better}"], "rejected": record[f"output_{worse}"]}
    return {key: value for key, value in record.items() if key not in LLMBAR} | sides
