"""How fast are near-duplicates found, and which of them, beside datasketch and rensa on the same texts?

Speed: MB of text a CPU second, from texts to the list of duplicates, one thread. Quality: of texts with near-copies of
every degree, which have an earlier text whose exact Jaccard similarity of word 5-grams is at least the threshold?
The peers get the same words, cut by the same function (their own users must write one), and 128 permutations, their
default; once with their decision alone (the LSH's candidates), once with their estimate checked as well.

    python benchmarks/near_duplicates.py [--megabytes 20] [--out FILE.json]

The peers are left out where they aren't installed: `pip install datasketch rensa` into an environment of your own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from texts import edited, megabytes, texts

from align.core.text import ngrams, words
from data_synthesis.near_duplicates import GRAM, later_duplicates, signatures

THRESHOLD = 0.8
Found = list[bool]


def ours(found: list[str]) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "signatures"
        signatures(found, file)
        return later_duplicates(file, np.zeros(len(found), dtype=np.uint8), THRESHOLD).tolist()


def shingles(text: str) -> list[str]:
    cut = words(text)
    return [" ".join(gram) for gram in ngrams(cut, GRAM)] or [" ".join(cut)]


def datasketch(found: list[str], check: bool) -> Found:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    kept: dict[int, Any] = {}
    duplicates = []
    for number, text in enumerate(found):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        near = index.query(sketch)
        if check:
            near = [other for other in near if sketch.jaccard(kept[other]) >= THRESHOLD]
        duplicates.append(bool(near))
        index.insert(number, sketch)
        kept[number] = sketch
    return duplicates


def rensa(found: list[str], check: bool) -> Found:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=128, num_bands=16)
    kept: dict[int, Any] = {}
    duplicates = []
    for number, text in enumerate(found):
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update(shingles(text))
        near = index.query(sketch)
        if check:
            near = [other for other in near if sketch.jaccard(kept[other]) >= THRESHOLD]
        duplicates.append(bool(near))
        index.insert(number, sketch)
        kept[number] = sketch
    return duplicates


def exact(found: list[str]) -> list[float]:
    """The largest Jaccard similarity of each text with one before it."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes: list[int] = []
    largest: list[float] = []
    for number, text in enumerate(found):
        grams = set(shingles(text))
        shared: dict[int, int] = defaultdict(int)
        for gram in grams:
            for other in holders[gram]:
                shared[other] += 1
            holders[gram].append(number)
        sizes.append(len(grams))
        largest.append(max((n / (sizes[o] + len(grams) - n) for o, n in shared.items()), default=0.0))
    return largest


def quality(said: Found, largest: list[float]) -> dict[str, Any]:
    """Recall and precision at the threshold, and recall by bands of similarity."""
    truth = [value >= THRESHOLD for value in largest]
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    bands = {}
    for low, high in ((0.5, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 1.01)):
        inside = [a for a, value in zip(said, largest, strict=True) if low <= value < high]
        bands[f"{low}-{min(high, 1.0)}"] = [round(sum(inside) / len(inside), 3) if inside else None, len(inside)]
    return {
        "recall": round(both / sum(truth), 4),
        "precision": round(both / max(1, sum(said)), 4),
        "share_called_duplicates_by_similarity": bands,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    judged = texts(4000, rng)
    judged += [edited(judged[int(rng.integers(4000))], float(rng.uniform(0, 0.12)), rng) for _ in range(6000)]
    largest = exact(judged)
    many = texts(int(settings.megabytes * 1e6 / 620), rng)
    chinese = ["".join(chr(0x4E00 + int(c)) for c in rng.zipf(1.3, 120) % 3000) for _ in range(10_000)]
    ways: dict[str, tuple[Callable[[list[str]], Found], int]] = {"ours": (ours, 1)}
    versions = {}
    for name, way in (("datasketch", datasketch), ("rensa", rensa)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for check in (False, True):
            label = f"{name}, estimate checked" if check else name
            ways[label] = (lambda found, way=way, check=check: way(found, check), 10)
    results: dict[str, Any] = {}
    for label, (way, part) in ways.items():
        said = way(judged)
        some, speeds = many[: len(many) // part], []
        for _ in range(3):
            began = time.process_time()
            way(some)
            speeds.append(megabytes(some) / (time.process_time() - began))
        results[label] = {
            "mb_a_cpu_s": round(max(speeds), 2),
            "megabytes": round(megabytes(some), 1),
            **quality(said, largest),
        }
        if label == "ours":
            began = time.process_time()
            way(chinese)
            results[label]["chinese_mb_a_cpu_s"] = round(megabytes(chinese) / (time.process_time() - began), 2)
        print(label, json.dumps(results[label]), flush=True)
    result = {
        "question": "MB of text a CPU second; recall and precision against an exact Jaccard of word 5-grams of 0.8",
        "texts_judged": len(judged),
        "results": results,
        "versions": versions,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
