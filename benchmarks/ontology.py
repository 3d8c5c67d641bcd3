"""What does the stage `ontology` cost, whole and step by step, and what do other libraries take for the same step?

    python benchmarks/ontology.py [--rounds 3] [--quick] [--out benchmarks/results/ontology.json]

Three questions, each run a process of its own with one thread, the runs of a question in turn, medians of the rounds:

whole         230,000 instructions with a million tags, about 100,000 different ones (made up by ontology_data.py): with
              the defaults, and with every tag kept (min_count=1), which is the hardest there is. Bar: 3 minutes, 4 GiB.
semantics     20,000 x 384 vectors, the clusters within a cosine distance of 0.05: ours, and scikit-learn's DBSCAN with
              two points to a cluster. Both must find the same clusters. Bar: 3 s.
association   the rules between two tags of 100,000 instructions, support 40 and confidence 0.99: ours, and mlxtend's
              FP-growth with its rules. Both must find the same pairs. Bar: 1 s, of processor time.

mlxtend is needed for that comparison only, and left out where it isn't installed: `pip install mlxtend` into an
environment of its own that sees this one's packages. The exit status is 1 where a bar is missed. The times that count
are processor times, and wall time less what other processes took; `wall_s` is the clock's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from ontology_data import instructions

SEED = 7
BARS = {"whole": 180, "semantics": 3, "association": 1}
"""Seconds."""
MOST_MB = 4096


class Silent:
    """A progress that says nothing."""

    def start(self, total: int | None, unit: str) -> None:
        """Nothing."""

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def make_pool(folder: Path, rows: int, unique: int) -> None:
    from align.core.records import Kind
    from align.core.writer import write_rows

    found = (
        {
            "prompt_id": f"{number:08x}", "prompt": [{"role": "user", "content": f"Write about {', '.join(tags)}."}],
            "split": "train", "source": "made up", "task": None, "family": None, "reference": None, "tags": tags,
        }
        for number, tags in enumerate(instructions(rows, unique, SEED))
    )  # fmt: skip
    write_rows(folder, found, Kind.PROMPTS)


def whole(folder: Path, min_count: int) -> Callable[[], Any]:
    from align.core.stage import Tools
    from align.core.store import Table
    from data_synthesis.ontology import STAGE

    def work() -> Any:
        with tempfile.TemporaryDirectory() as out:
            tools = Tools(0, {}, Silent(), Path(out), Path(out))
            result = STAGE.run(STAGE.config(min_count=min_count), {"prompts": Table.open(folder)}, tools)
            list(result.rows or ())
            file = (Path(out) / "ontology.yaml").stat().st_size
        kept = ("tags", "association_rules", "instructions", "levels")
        return {**{key: result.summary[key] for key in kept}, "file_mb": round(file / 1e6, 1)}

    return work


def vectors(count: int) -> Any:
    """Unit vectors spread as those of a sentence model are: some directions hold more, and many points have a twin."""
    rng = np.random.default_rng(SEED)
    spread = np.arange(1, 385) ** -0.5
    points = rng.normal(size=(count // 2, 384)) * spread
    found = points[rng.integers(0, count // 2, count)] + rng.normal(size=(count, 384)) * spread * 0.18
    found = found @ np.linalg.qr(rng.normal(size=(384, 384)))[0]
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def semantics_ours(count: int) -> Callable[[], Any]:
    from data_synthesis.neighbours import clusters

    given = vectors(count)
    return lambda: {"clusters": len(set(clusters(given, 0.05).tolist()))}


def semantics_dbscan(count: int) -> Callable[[], Any]:
    from sklearn.cluster import DBSCAN

    given = vectors(count)

    def work() -> Any:
        labels = DBSCAN(eps=0.05, min_samples=2, metric="cosine").fit_predict(given)
        return {"clusters": int(labels.max()) + 1 + int((labels < 0).sum())}

    return work


def incidence(rows: int) -> tuple[Any, list[str]]:
    """Instructions × tags, those on 20 instructions or more."""
    from collections import Counter

    from scipy.sparse import csr_matrix

    tags = list(instructions(rows, rows // 2, SEED))
    counts = Counter(tag for each in tags for tag in each)
    names = sorted(tag for tag, count in counts.items() if count >= 20)
    places = {name: number for number, name in enumerate(names)}
    pairs = [(row, places[tag]) for row, each in enumerate(tags) for tag in each if tag in places]
    where = tuple(zip(*pairs, strict=True))
    return csr_matrix((np.ones(len(pairs), dtype=np.int32), where), shape=(rows, len(names))), names


def association_ours(rows: int) -> Callable[[], Any]:
    from data_synthesis.tag_merging import rules_between

    matrix, names = incidence(rows)

    def work() -> Any:
        a, b, _ = rules_between(matrix, names, 40, 0.99)
        return {"tags": len(names), "rules": len(a), "first": sorted(zip(a.tolist(), b.tolist(), strict=True))[:3]}

    return work


def association_mlxtend(rows: int) -> Callable[[], Any]:
    import pandas as pd
    from mlxtend.frequent_patterns import association_rules, fpgrowth

    matrix, names = incidence(rows)
    frame = pd.DataFrame.sparse.from_spmatrix(matrix.astype(bool), columns=range(len(names)))

    def work() -> Any:
        sets = fpgrowth(frame, min_support=40 / rows, max_len=2)
        rules = association_rules(sets, metric="confidence", min_threshold=0.99)
        counts = np.asarray(matrix.sum(axis=0)).ravel()
        found = [(*a, *b) for a, b in zip(rules["antecedents"], rules["consequents"], strict=True)]
        upwards = sorted((int(a), int(b)) for a, b in found if (counts[b], -b) > (counts[a], -a))
        return {"tags": len(names), "rules": len(upwards), "first": [list(pair) for pair in upwards[:3]]}

    return work


def one_run(what: str, *arguments: str) -> dict[str, Any]:
    makers: dict[str, Callable[..., Callable[[], Any]]] = {
        "whole": lambda folder, least: whole(Path(folder), int(least)),
        "semantics_ours": lambda count: semantics_ours(int(count)),
        "semantics_dbscan": lambda count: semantics_dbscan(int(count)),
        "association_ours": lambda rows: association_ours(int(rows)),
        "association_mlxtend": lambda rows: association_mlxtend(int(rows)),
    }
    work = makers[what](*arguments)
    began = time.monotonic(), time.process_time(), waited_s()
    found = work()
    return {
        "wall_s": round(time.monotonic() - began[0], 2),
        "own_wall_s": round(time.monotonic() - began[0] - (waited_s() - began[2]), 2),
        "cpu_s": round(time.process_time() - began[1], 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "found": found,
    }


def waited_s() -> float:
    """How long this process has waited for a core that others had; 0 where the system doesn't tell."""
    told = Path("/proc/self/schedstat")
    return int(told.read_text().split()[1]) / 1e9 if told.exists() else 0.0


def in_turn(runs: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Medians of each run; what it found is the same every time."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, arguments in runs.items():
            command = [sys.executable, __file__, "--one-run", *arguments]
            told = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **threads}
            ).stdout
            done[name].append(json.loads(told.splitlines()[-1]))
            print(f"round {number + 1}, {name}: {told.splitlines()[-1][:200]}", flush=True)
    return {
        name: {
            **{
                key: statistics.median(run[key] for run in each) for key in ("wall_s", "own_wall_s", "cpu_s", "peak_mb")
            },
            "rounds": len(each),
            "found": each[0]["found"],
        }
        for name, each in done.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, for trying it out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one-run", nargs="+", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.one_run:
        print(json.dumps(one_run(*settings.one_run)))
        return 0
    part = 10 if settings.quick else 1
    count, rows = str(20_000 // part), str(100_000 // part)
    with_mlxtend = importlib.util.find_spec("mlxtend") is not None
    with tempfile.TemporaryDirectory() as folder:
        make_pool(Path(folder) / "pool", 230_000 // part, 100_000 // part)
        pool = str(Path(folder) / "pool")
        result: dict[str, Any] = {
            "question": "what the stage ontology costs, and what others take for its steps",
            "semantics": in_turn(
                {"ours": ["semantics_ours", count], "scikit-learn": ["semantics_dbscan", count]}, settings.rounds
            ),
            "association": in_turn(
                {
                    "ours": ["association_ours", rows],
                    **({"mlxtend": ["association_mlxtend", rows]} if with_mlxtend else {}),
                },
                settings.rounds,
            ),
            "whole": in_turn({"defaults": ["whole", pool, "20"], "every tag": ["whole", pool, "1"]}, settings.rounds),
            "bars_s": BARS,
            "most_mb": MOST_MB,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    for other in ("semantics", "association"):
        found = [run["found"] for run in result[other].values()]
        assert all(one == found[0] for one in found), f"{other}: {found}"
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    ours = [*(("whole", run) for run in result["whole"].values())]
    ours += [(name, result[name]["ours"]) for name in ("semantics", "association")]
    missed = [name for name, run in ours if run["own_wall_s"] > BARS[name] or run["peak_mb"] > MOST_MB]
    print("all bars met" if not missed else f"missed: {missed}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
