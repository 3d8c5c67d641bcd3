"""How fast does the core of `decontaminate` go, and what does it find?

Speed, in CPU time on one core: the scan for shared runs of 13 and of 8 words, MB of text a second; longest common
subsequences, pairs a second, of 100 words each. Quality on GSM8K, where ALIGN_TEST_DATA names a folder with it: test
questions planted as they are, and with one word in 20, 10, 7 and 5 made another one, for runs of several lengths; and
the share of GSM8K's own training rows that is dropped against its test set. And the pitfall that the runs are for: of
test questions and long texts put together of training questions, how many pairs has the subsequence alone?

    python benchmarks/decontaminate.py [--megabytes 50] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from texts import megabytes, texts

from align.core.overlap import Index, common_lengths
from align.core.text import words

LEAST, SHARE = 13, 0.6


def best_of(times: int, work: Any, *given: Any) -> float:
    """The least CPU seconds of several tries."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        work(*given)
        spent.append(time.process_time() - began)
    return min(spent)


def speeds(size: float, rng: np.random.Generator) -> dict[str, Any]:
    tests = texts(5000, rng)
    training = texts(int(size * 1e6 / 620), rng)
    long = [" ".join(training[at : at + 70]) for at in range(0, len(training), 70)]
    curly = [text.replace(" ", " ’", 1) + " café" * (number % 10 == 0) for number, text in enumerate(training)]
    found: dict[str, Any] = {}
    for run in (13, 8):
        index = Index(tests, run)
        for name, some in (("short texts", training), ("texts of 8,000 words", long), ("with other symbols", curly)):
            found[f"scan, runs of {run}, {name}, MB/s"] = round(megabytes(some) / best_of(3, index.hits, some), 1)
        found[f"whole filter, runs of {run}, MB/s"] = round(
            megabytes(training) / best_of(3, index.overlaps, training, LEAST, SHARE), 1
        )
    hundred = [" ".join(text.split()[:100]) for text in texts(4000, rng, 100, 100)]
    index = Index(hundred, LEAST)
    ones, others = index.codes * 25, (index.codes[1:] + index.codes[:1]) * 25
    found["LCS of 100 words, pairs/s"] = round(len(ones) / best_of(3, common_lengths, ones, others))
    ones, others = index.bytes_ * 25, (index.bytes_[1:] + index.bytes_[:1]) * 25
    found["its bound, which rules most pairs out, pairs/s"] = round(
        len(ones) / best_of(3, common_lengths, ones, others)
    )
    return found


def pitfall(items: list[str], clean: list[str]) -> dict[str, Any]:
    """Test questions of at most 25 words against training questions put together to texts of about 8,000 words."""
    short = [item for item in items if LEAST <= len(words(item)) <= 25]
    long = [" ".join(clean[at : at + 170]) for at in range(0, len(clean) - 170, 170)]
    index = Index(short, 8)
    coded = [index.coded(words(text)) for text in long]
    needed = np.maximum(LEAST, SHARE * index.lengths)
    alone = [(common_lengths([text] * len(short), index.codes) >= needed).mean() for text in coded]
    pairs = len(long) * len(short)
    return {
        "words of a long text": round(sum(map(len, coded)) / len(coded)),
        "pairs": pairs,
        "dropped by the subsequence alone, %": round(100 * float(np.mean(alone)), 2),
        "with runs of 8 and stretches, %": round(100 * len(index.overlaps(long, LEAST, SHARE)) / pairs, 4),
    }


def edited(text: str, every: int, draw: random.Random) -> str:
    parts = text.split()
    for place in draw.sample(range(len(parts)), max(1, len(parts) // every)):
        parts[place] = "changed"
    return " ".join(parts)


def gsm8k(folder: Path) -> dict[str, Any]:
    draw = random.Random(0)
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    items = [row["question"] for row in rows["test"]]
    clean = [row["question"] for row in rows["train"]]
    planted = {"as they are": items}
    planted |= {
        f"one word in {every} changed": [edited(item, every, draw) for item in items] for every in (20, 10, 7, 5)
    }
    found: dict[str, Any] = {}
    for run in (13, 10, 8, 6, 5):
        index = Index(items, run)
        recall = {}
        for name, some in planted.items():
            hit = {overlap.text for overlap in index.overlaps(some, LEAST, SHARE) if overlap.text == overlap.item}
            recall[name] = round(100 * len(hit) / len(items), 1)
        dropped = {overlap.text for overlap in index.overlaps(clean, LEAST, SHARE)}
        found[f"runs of {run}"] = {
            "found of the planted, %": recall,
            "training rows dropped": len(dropped),
            "of": len(clean),
            "%": round(100 * len(dropped) / len(clean), 2),
        }
    found["long texts"] = pitfall(items, clean)
    found["test items of fewer than 13 words"] = sum(len(words(item)) < LEAST for item in items)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {
        "question": "speed of the scan and of the subsequences on one core; what is found on GSM8K, and what wrongly",
        "speed": speeds(settings.megabytes, rng),
    }
    folder = Path(os.environ.get("ALIGN_TEST_DATA", "")) / "gsm8k"
    if "ALIGN_TEST_DATA" in os.environ and folder.is_dir():
        result["gsm8k"] = gsm8k(folder)
    result |= {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(json.dumps(result, indent=2))
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
