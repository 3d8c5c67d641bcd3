"""What each stage gains on the embedded tiny world, over several seeds, with controls beside the claims.

    python benchmarks/ladder.py --seeds 1 2 3 --out runs/ladder --save benchmarks/results/ladder.json

Runs recipes/quickstart.yaml once a seed, with these steps more than it has: online DPO by the reward model alone and by
verifiers alone, and rejection sampling on a random choice of instructions instead of the selected ones. A killed
benchmark goes on where it was. Writes mean and standard error over the seeds, and McNemar's test between neighbours.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from machine import machine

from align.core.manifest import Manifest, versions
from align.core.store import Table
from align.evaluate.scores import compare

ROOT = Path(__file__).resolve().parent.parent
LADDER = ("base_eval", "sft_eval", "rejection_sft_eval", "dpo_eval", "online_dpo_eval")
AGAINST = {
    "online_reward_only_eval": "dpo_eval",
    "online_verifier_only_eval": "dpo_eval",
    "control_self_training_eval": "rejection_sft_eval",
    "control_random_eval": "rejection_sft_eval",
    "control_chosen_sft_eval": "dpo_eval",
}
"""Beside which rung a run stands."""


def recipe(seed: int) -> dict[str, Any]:
    """The quickstart with the seed in all that is drawn for training, and the further runs."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    document |= {"name": f"ladder-{seed}", "seed": seed}
    steps = document["steps"]
    for name, step in steps.items():
        if step["stage"] == "prompts" and name != "heldout":
            sources = step["with"]["source"]
            for source in sources if isinstance(sources, list) else [sources]:
                source["tiny"]["seed"] += 100 * (seed - 1)

    def like(name: str, of: str, settings: dict[str, Any] | None = None, **inputs: Any) -> None:
        steps[name] = copy.deepcopy(steps[of])
        steps[name].setdefault("with", {}).update(settings or {})
        steps[name]["in"].update(inputs)

    def evaluated(name: str) -> None:
        like(f"{name}_eval", "dpo_eval")
        steps[f"{name}_eval"]["engines"] = {"policy": f"step:{name}"}

    like("online_reward_only", "online_dpo", {"scorer": "reward_model"})
    evaluated("online_reward_only")
    like("online_verifier_only", "online_dpo", {"scorer": "verifier"})
    del steps["online_verifier_only"]["in"]["reward_model"]
    evaluated("online_verifier_only")
    like("control_random_selected", "selected", {"method": "random"})
    like("control_random_samples", "samples", prompts="control_random_selected")
    like("control_random_sampled", "sampled", completions="control_random_samples")
    like("control_random", "rejection_sft", demonstrations=["control_random_sampled", "demonstrations"])
    evaluated("control_random")
    return document


def run(seed: int, folder: Path) -> dict[str, Manifest]:
    """Runs one seed to its end; the manifests of its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(seed), sort_keys=False))
    subprocess.run([sys.executable, "-m", "align.cli", "run", str(file), f"out={folder / 'run'}"], check=True)
    return {path.parent.name: Manifest.read(path.parent) for path in (folder / "run").glob("*/manifest.json")}


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else math.nan
    return {"mean": round(mean, 2), "standard_error": round(math.sqrt(variance / len(values)), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    runs = {seed: run(seed, options.out / str(seed)) for seed in options.seeds}

    figures: dict[str, Any] = {
        "what": "verified score in % on the test split of the tiny world, 750 instructions",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "seeds": options.seeds,
        "seconds": {s: round(sum(m.seconds for m in steps.values())) for s, steps in runs.items()},
        "cpu_seconds": {s: round(sum(m.cpu_seconds for m in steps.values())) for s, steps in runs.items()},
        "steps": {},
        "mcnemar": {},
        "reward_model": {},
    }
    for name in (*LADDER, *AGAINST):
        scores = {seed: steps[name].summary["scores"] for seed, steps in runs.items()}
        figures["steps"][name] = {
            mode: mean_and_error([s[mode]["overall"]["score"] for s in scores.values()])
            | {"by_seed": {seed: round(s[mode]["overall"]["score"], 2) for seed, s in scores.items()}}
            | {
                "by_family": {
                    family: mean_and_error([s[mode]["by_family"][family]["score"] for s in scores.values()])
                    for family in scores[options.seeds[0]][mode]["by_family"]
                }
            }
            for mode in ("greedy", "sampled")
        }
    for above, below in (*((b, a) for a, b in itertools.pairwise(LADDER)), *AGAINST.items()):
        figures["mcnemar"][f"{above} against {below}"] = {
            seed: compare(
                Table.open(options.out / str(seed) / "run" / below), Table.open(options.out / str(seed) / "run" / above)
            )
            for seed in options.seeds
        }
    for seed, steps in runs.items():
        figures["reward_model"][seed] = {
            family: {key: round(100 * gate[key], 1) for key in ("sampled", "best_of_n")}
            for family, gate in steps["reward_model"].summary["by_family"].items()
        }
    text = json.dumps(figures, indent=2, default=vars) + "\n"
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(text)
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    families = list(next(iter(figures["steps"].values()))["greedy"]["by_family"])
    lines = ["| step | greedy | T = 1 | " + " | ".join(f"{f} (greedy)" for f in families) + " |"]
    lines.append("|---" * (3 + len(families)) + "|")
    for name, by_mode in figures["steps"].items():
        cells = [f"{s['mean']:.1f} ± {s['standard_error']:.1f}" for s in by_mode.values()]
        cells += [f"{by_mode['greedy']['by_family'][f]['mean']:.0f}" for f in families]
        lines.append(f"| {name.removesuffix('_eval')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
