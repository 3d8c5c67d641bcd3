"""Rungs of the quickstart's ladder that other benchmarks start from, and how two models are compared on one test.

A folder `OUT/SEED/run` with the rungs is found and not made again; else recipes/quickstart.yaml makes them, with the
seed in all that is drawn for training.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ladder import recipe

from align.core.manifest import Manifest
from align.core.store import Table

HELD_OUT = {"math": 150, "code": 150, "format": 150, "tag": 150, "benign": 75, "harmful": 75}
"""As many of each family as the quickstart's test."""


def made(seed: int, out: Path, upto: Sequence[str]) -> Path:
    """The folder with the rungs `upto` of a seed's ladder, and all that they need; made where one isn't there."""
    folder = out / str(seed) / "run"
    if all((folder / name / "manifest.json").exists() for name in upto):
        return folder
    document = recipe(seed)
    needed, waiting = set(), list(upto)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [other for other in document["steps"] if other in str(document["steps"][name])]
    document["steps"] = {name: step for name, step in document["steps"].items() if name in needed}
    return align_run(document, folder)


def align_run(document: Mapping[str, Any], folder: Path) -> Path:
    """Runs a recipe to its end, or what is left of it; gives the folder with its steps."""
    file = folder.parent / f"{folder.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False))
    subprocess.run([sys.executable, "-m", "align.cli", "run", str(file), f"out={folder}"], check=True)
    return folder


def manifest(step: Path) -> Manifest:
    """Of a step that has run."""
    found = Manifest.read(step)
    if found is None:
        raise SystemExit(f"{step}: no manifest; the step has not run to its end")
    return found


def evaluation(policy: str, prompts: str, split: str, samples: int) -> dict[str, Any]:
    """A step that answers held-out prompts greedily and several times at temperature 1."""
    return {
        "stage": "evaluate", "in": {"prompts": prompts}, "engines": {"policy": policy},
        "with": {"split": split, "samples": samples, "max_tokens": 96},
    }  # fmt: skip


def scores(step: Path) -> dict[str, Any]:
    """Greedy and at temperature 1, over all and by family, in percent."""
    found = manifest(step).summary["scores"]
    return {
        mode: {"overall": one["overall"]["score"]} | {name: f["score"] for name, f in one["by_family"].items()}
        for mode, one in found.items()
    }


def difference(before: Path, after: Path, families: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """How much better the second of two outputs of `evaluate` is, in points with a 95% interval, by mode.

    Paired and clustered by prompt: a prompt's difference is that of its two means over samples, and the interval is
    1.96 standard errors of the mean over prompts. Samples of one prompt are so never counted as independent.

    Args:
        families: of these alone; of all where it is empty.
    """
    first, second = _by_prompt(before, families), _by_prompt(after, families)
    found = {}
    for mode in ("greedy", "sampled"):
        values = [100 * (second[key] - first[key]) for key in first if key[0] == mode]
        n, mean = len(values), sum(values) / len(values)
        half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
        found[mode] = {"points": round(mean, 2), "low": round(mean - half, 2), "high": round(mean + half, 2)}
    return found


def _by_prompt(step: Path, families: Sequence[str]) -> dict[tuple[str, str], float]:
    """The share of a prompt's completions that passed, by mode and prompt."""
    verdicts: dict[tuple[str, str], list[bool]] = {}
    for row in Table.open(step).rows(["mode", "prompt_id", "family", "verdict"]):
        if not families or row["family"] in families:
            verdicts.setdefault((row["mode"], row["prompt_id"]), []).append(row["verdict"] == "passed")
    return {key: sum(passed) / len(passed) for key, passed in verdicts.items()}


def save(file: Path, result: dict[str, Any]) -> None:
    """Writes figures into a JSON file; what else it holds is kept."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(kept | result, indent=2) + "\n")
