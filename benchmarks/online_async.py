"""Samples made one episode ahead in a second process, against samples of the policy as it is: time, and the score.

    python benchmarks/online_async.py --seeds 40 41 --out runs/world --save benchmarks/results/online_async.json

The quickstart's online step (verifier where a program decides, reward model for the rest) from each seed's DPO policy,
found in OUT/SEED/run or made: in turn with and without `asynchronous`, else the same; the wall time is that of the
step. Synchronously one process has all cores; asynchronously two have half of them each. On a machine busy with other
work the times say little: `load` stands beside them. Each model is evaluated on the test split, greedily and by 8
samples a prompt at temperature 1, and the difference is paired. `ideal_s` is what the steps would take if sampling an
episode and training the one before it overlapped whole, as measured in the synchronous run.
"""

from __future__ import annotations

import argparse
import datetime
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from ladder import recipe as ladder_recipe
from machine import machine
from rungs import align_run, difference, evaluation, made, manifest, scores

from align.core.manifest import Manifest, versions

RUNGS = ("heldout", "dpo", "fresh", "reward_model")
SAMPLES = 8


def recipe(seed: int, ladder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """The two steps and their evaluations."""
    settings = ladder_recipe(seed)["steps"]["online_dpo"]["with"] | more
    inputs = {name: str(ladder / name) for name in ("dpo", "fresh", "reward_model")}
    given = {"policy": inputs["dpo"], "prompts": inputs["fresh"], "reward_model": inputs["reward_model"]}
    steps: dict[str, Any] = {}
    for name, asynchronous in (("sync", False), ("async", True)):
        told = settings | ({"asynchronous": True} if asynchronous else {})
        steps[name] = {"stage": "online-dpo", "in": given, "with": told}
        steps[f"{name}_eval"] = evaluation(f"step:{name}", str(ladder / "heldout"), "test", SAMPLES)
    return {"name": "online_async", "seed": seed, "steps": steps}


def seconds(about: Manifest) -> dict[str, Any]:
    """The step's wall time, and where it went."""
    parts = [record["seconds"] for record in about.summary["episodes"]]
    spent = {part: round(sum(one[part] for one in parts), 1) for part in ("samples", "steps", "look")}
    return {"wall_s": round(about.seconds, 1), "cpu_s": round(about.cpu_seconds, 1), **spent}


def ideal(about: Manifest) -> float:
    """The synchronous step's time less what could lie under the training and the look of the episode before."""
    parts = [record["seconds"] for record in about.summary["episodes"]]
    under = [min(after["samples"], one["steps"] + one["look"]) for one, after in pairwise(parts)]
    return round(about.seconds - sum(under), 1)


def run(seed: int, out: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Both ways on one seed."""
    ladder = made(seed, out, RUNGS)
    folder = align_run(recipe(seed, ladder, more), out / str(seed) / "online_async")
    sync, ahead = manifest(folder / "sync"), manifest(folder / "async")
    return {
        "sync": seconds(sync) | {"ideal_s": ideal(sync), "scores": scores(folder / "sync_eval")},
        "async": seconds(ahead) | {"scores": scores(folder / "async_eval")},
        "quicker": round(sync.seconds / ahead.seconds, 2),
        "async_against_sync": difference(folder / "sync_eval", folder / "async_eval"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[40])
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--with", dest="more", type=json.loads, default={}, help="settings that differ, as JSON")
    options = parser.parse_args()
    found = {seed: run(seed, options.out, options.more) for seed in options.seeds}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "what": "seconds of the quickstart's online step; verified scores on 750 test instructions, differences paired",
        "settings": options.more,
        "seeds": found,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
