"""What adaptive rejection sampling saves: samples taken and distinct right paths kept, against k of every prompt.

    OMP_NUM_THREADS=1 python benchmarks/adaptive_sampling.py --save benchmarks/results/adaptive_sampling.json

The policy is `tiny` after the quickstart's first SFT, one for each seed; the prompts are of the tiny world's training
split. Both ways run the stage `reject` itself. A sample is decided by its prompt and index, so adaptive sampling takes
a part of the very samples that the fixed way takes: they are sampled once and kept. The settings that are compared with
the stage's own (`least_rate` 0.1) show what giving up earlier, or never, does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import machine

from align.core.engines.build import EngineSettings, build_engine
from align.core.engines.cache import CachedEngine
from align.core.manifest import versions
from align.core.records import Kind
from align.core.stage import Tools
from align.core.store import Table
from align.core.writer import write_rows
from align.pipeline import run
from align.progress import Silent
from align.recipe import load_recipe
from align.tiny.world import rows
from data_synthesis.reject import STAGE

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("math", "code", "format", "tag")
OTHERS: tuple[dict[str, float], ...] = ({"least_rate": 0.2}, {"least_rate": 0.0})


def policy(seed: int, folder: Path) -> Path:
    """The quickstart's model after its first SFT, its draws made with another seed."""
    document = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    steps = {name: document["steps"][name] for name in ("written", "demonstrations", "sft")}
    steps["written"]["with"]["source"]["tiny"]["seed"] += 100 * (seed - 1)
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump({"name": "policy", "seed": seed, "steps": steps}, sort_keys=False))
    run(load_recipe(file, (), folder / "policy"))
    return folder / "policy" / "sft" / "model"


def rejected(settings: dict[str, Any], table: Table, engine: CachedEngine, folder: Path) -> dict[str, Any]:
    """What one run of the stage took and kept, by family."""
    tools = Tools(0, {"sampler": engine}, Silent(), folder, folder)
    result = STAGE.run(STAGE.config(temperature=1.0, max_tokens=96, **settings), {"prompts": table}, tools)
    assert result.rows is not None
    samples, kept = dict.fromkeys(FAMILIES, 0), dict.fromkeys(FAMILIES, 0)
    solved = dict.fromkeys(FAMILIES, 0)
    prompts_kept: set[str] = set()
    for row in result.rows:
        samples[row["family"]] += 1
        kept[row["family"]] += row["kept"]
        if row["kept"] and row["prompt_id"] not in prompts_kept:
            prompts_kept.add(row["prompt_id"])
            solved[row["family"]] += 1
    return {"samples": samples, "kept": kept, "prompts_with_one": solved, "ended": result.summary.get("ended", {})}


def compared(fixed: dict[str, Any], adaptive: dict[str, Any]) -> dict[str, Any]:
    """Adaptive against fixed, in per cent of what the fixed way took and kept."""

    def share(of: str, families: tuple[str, ...]) -> float:
        return round(100 * sum(adaptive[of][f] for f in families) / max(1, sum(fixed[of][f] for f in families)), 1)

    columns = ("samples", "kept", "prompts_with_one")
    return {of: {"all": share(of, FAMILIES), **{f: share(of, (f,)) for f in FAMILIES}} for of in columns}


def means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds: per cent of the samples, of the kept paths, and of the prompts with at least one."""
    groups: dict[tuple[int, int, float], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["k"], one["keep"], one.get("least_rate", 0.1)), []).append(one["per_cent"])
    return [
        {"k": k, "keep": keep, "least_rate": rate}
        | {of: round(sum(each[of]["all"] for each in its) / len(its), 1) for of in its[0]}
        | {"least_kept": min(each["kept"]["all"] for each in its)}
        for (k, keep, rate), its in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=50, help="of each family")
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            settings = EngineSettings(kind="transformers", model=str(policy(seed, folder)))
            engine = CachedEngine(build_engine(settings, generator=f"sft-{seed}"), folder / "completions")
            write_rows(
                folder / "prompts", rows(dict.fromkeys(FAMILIES, options.prompts), seed=500 + seed), Kind.PROMPTS
            )
            table = Table.open(folder / "prompts")
            for k in (16, 32):
                for keep in (1, 2):
                    fixed = rejected({"samples": k, "keep": keep}, table, engine, folder)
                    for more in ({}, *OTHERS):
                        how = {"samples": 4, "right": keep, "keep": keep, "max_samples": k, **more}
                        adaptive = rejected(how, table, engine, folder)
                        found.append(
                            {"seed": seed, "k": k, "keep": keep, **more, "fixed": fixed, "adaptive": adaptive,
                             "per_cent": compared(fixed, adaptive)}
                        )  # fmt: skip
                        print(
                            json.dumps(
                                {key: found[-1].get(key) for key in ("seed", "k", "keep", "least_rate")}
                                | {"samples": found[-1]["per_cent"]["samples"], "kept": found[-1]["per_cent"]["kept"]}
                            ),
                            flush=True,
                        )
            engine.close()
    if options.save:
        result = {
            "question": "samples and distinct right paths of adaptive sampling, in % of k samples of every prompt",
            "means": means(found),
            "runs": found,
            "machine": machine(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
