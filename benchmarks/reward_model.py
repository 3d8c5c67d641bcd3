"""Does best-of-n by the reward model beat the average sample, on new seeds of the embedded tiny world?

python benchmarks/reward_model.py --seeds 11 12 13 --out runs/reward_model --save benchmarks/results/reward_model.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TRAIN = {"math": 450, "code": 60, "format": 600, "tag": 400, "benign": 300, "harmful": 290}
DEV = {"math": 120, "code": 40, "format": 120, "tag": 100, "benign": 80, "harmful": 80}
TEST = {"math": 200, "code": 100, "format": 200, "tag": 200, "benign": 150, "harmful": 150}


def data(seed: int) -> dict[str, Any]:
    """The policy, SFT and then DPO as in the quickstart, and six samples of it for each of three sets of prompts."""
    quick = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["steps"]
    kept = ("written", "demonstrations", "sft", "requests", "principled", "practice", "explored", "preferences", "dpo")
    steps = {name: quick[name] for name in kept}
    steps["explored"]["engines"] = {"sampler": "step:sft"}
    steps["preferences"]["in"] = {"completions": ["explored", "principled"]}
    steps["dpo"]["in"]["policy"] = "sft"
    more = {"answers": True, "wrong": True}
    steps["fresh"] = {
        "stage": "prompts",
        "with": {
            "source": [
                {"tiny": {"families": TRAIN, "seed": 5, **more}},
                {"tiny": {"families": DEV, "split": "dev", "seed": 6, **more}},
            ]
        },
    }
    steps["graded"] = {
        "stage": "reject", "in": {"prompts": "fresh"}, "engines": {"sampler": "step:dpo"},
        "with": {"samples": 6, "temperature": 1.0, "max_tokens": 96, "splits": ["train", "dev"]},
    }  # fmt: skip
    steps["heldout"] = {
        "stage": "prompts",
        "with": {"source": {"tiny": {"families": TEST, "split": "test", "seed": 8}}},
    }
    steps["candidates"] = {
        "stage": "evaluate", "in": {"prompts": "heldout"}, "engines": {"policy": "step:dpo"},
        "with": {"greedy": False, "samples": 6, "temperature": 1.0, "max_tokens": 96},
    }  # fmt: skip
    for step in steps.values():
        if step["stage"] == "prompts":
            sources = step["with"]["source"]
            for source in sources if isinstance(sources, list) else [sources]:
                source["tiny"]["seed"] += 100 * (seed - 1)
    return {"name": f"reward-model-{seed}", "seed": seed, "steps": steps}


def align_run(document: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    subprocess.run([sys.executable, "-m", "align.cli", "run", str(file), f"out={folder / 'run'}"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--out", type=Path, default=Path("runs/reward_model"))
    options = parser.parse_args()
    for seed in options.seeds:
        align_run(data(seed), options.out / str(seed) / "data")


if __name__ == "__main__":
    main()
