"""Does DPO beat a well-tuned SFT on the same chosen completions, where only comparisons show a habit? Three new seeds.

    python benchmarks/habit.py --seeds 31 32 33 --out runs/habit --save benchmarks/results/habit.json

Runs recipes/habit.yaml once a seed, with larger counts (600 demonstrations, 250 prompts of two samples, 750 held-out
instructions) and SFT on the chosen with each of `SFT`; the best of them by its own test score, the choice that is
kindest to SFT, stands against DPO. A score is strict: right, and without a needless phrase. The difference is McNemar's
paired test over the same instructions. Beside it the control that needs a detector of the habit: SFT on clean right
samples alone. A killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
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
HELD_OUT = {"math": 150, "code": 150, "format": 150, "tag": 150, "benign": 75, "harmful": 75}
SFT: dict[str, dict[str, float]] = {
    "lr 1e-4, 4 epochs": {"learning_rate": 1e-4, "epochs": 4},
    "lr 2e-4, 4 epochs": {"learning_rate": 2e-4, "epochs": 4},
    "lr 5e-4, 4 epochs": {"learning_rate": 5e-4, "epochs": 4},
    "lr 1e-3, 2 epochs": {"learning_rate": 1e-3, "epochs": 2},
    "lr 1e-3, 8 epochs": {"learning_rate": 1e-3, "epochs": 8},
}
"""Settings of SFT on the chosen."""


def recipe(seed: int) -> dict[str, Any]:
    """The shipped recipe with the benchmark's counts and the further settings of SFT."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "habit.yaml").read_text())
    document |= {"name": f"habit-{seed}", "seed": seed}
    steps = document["steps"]
    for name, step in steps.items():
        if step["stage"] == "prompts":
            tiny = step["with"]["source"]["tiny"]
            if name == "heldout":
                tiny["families"] = HELD_OUT
            else:
                tiny["seed"] += 100 * (seed - 1)
    for number, settings in enumerate(SFT.values()):
        for kind in ("", "_answers", "_strict"):
            step = steps[f"chosen_sft_{number}{kind}"] = copy.deepcopy(steps[f"chosen_sft{kind}"])
            if kind == "":
                step["with"] |= settings
            elif kind == "_answers":
                step["engines"] = {"policy": f"step:chosen_sft_{number}"}
            else:
                step["in"] = {"completions": f"chosen_sft_{number}_answers"}
    for kind in ("", "_answers", "_strict"):
        del steps[f"chosen_sft{kind}"]
    return document


def run(seed: int, folder: Path) -> Path:
    """Runs one seed to its end; gives the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(seed), sort_keys=False))
    command = [sys.executable, "-m", "align.cli", "run", str(folder / "recipe.yaml"), f"out={folder / 'run'}"]
    subprocess.run(command, check=True)
    return folder / "run"


def figures(run: Path) -> dict[str, Any]:
    """What one seed gave: strict score, correctness and habit of each model, and DPO against the best SFT by mode."""

    def scores(name: str) -> dict[str, Any]:
        summary = done(run / f"{name}_strict").summary
        return {
            mode: {
                "strict": summary["scores"][mode]["overall"]["score"],
                "correct": round(100 * summary["habit"][mode]["correct"], 2),
                "with_closers": round(100 * summary["habit"][mode]["with_closers"], 2),
            }
            for mode in ("greedy", "sampled")
        }

    names = [f"chosen_sft_{number}" for number in range(len(SFT))]
    sft = {label: scores(name) for label, name in zip(SFT, names, strict=True)}
    pairs = list(Table.open(run / "preferences").rows(["chosen_reward"]))
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "clean_chosen": round(100 * sum(row["chosen_reward"] == 1 for row in pairs) / len(pairs), 1),
        "start": scores("start"), "dpo": scores("dpo"), "sft_on_clean": scores("clean_sft"), "sft_on_chosen": sft,
        "dpo_against_best_sft": {}, "dpo_against_sft_on_clean": {},
    }  # fmt: skip
    dpo = Table.open(run / "dpo_strict")
    for mode in ("greedy", "sampled"):
        best = max(range(len(SFT)), key=lambda n: sft[list(SFT)[n]][mode]["strict"])
        tested = compare(Table.open(run / f"{names[best]}_strict"), dpo)[mode]
        found["dpo_against_best_sft"][mode] = {"sft": list(SFT)[best], **rounded(tested)}
        against = compare(Table.open(run / "clean_sft_strict"), dpo)[mode]
        found["dpo_against_sft_on_clean"][mode] = rounded(against)
    found["cpu_seconds"] = round(sum(done(m.parent).cpu_seconds for m in run.glob("*/manifest.json")))
    return found


def rounded(tested: dict[str, Any]) -> dict[str, Any]:
    """For the file: z to a tenth, p to two digits."""
    return tested | {
        "a": round(tested["a"], 2),
        "b": round(tested["b"], 2),
        "z": round(tested["z"], 1),
        "p": float(f"{tested['p']:.2g}"),
    }


def done(step: Path) -> Manifest:
    """The manifest of a step that has run."""
    found = Manifest.read(step)
    if found is None:
        raise SystemExit(f"{step}: no manifest; the step has not run to its end")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--out", type=Path, default=Path("runs/habit"))
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    found = {seed: figures(run(seed, options.out / str(seed))) for seed in options.seeds}
    result = {
        "what": "strict score in % (right and without a needless phrase) on 750 test instructions of the tiny world",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "seeds": found,
    }  # fmt: skip
    if options.save:
        options.save.write_text(json.dumps(result, indent=2) + "\n")
    print(table(found))


def table(found: dict[int, dict[str, Any]]) -> str:
    """The figures as a Markdown table, greedy / T = 1."""
    lines = [
        "| seed | pairs (clean chosen) | start | best SFT on chosen | DPO (z) | habit, SFT → DPO | SFT on clean ones |"
    ]
    lines.append("|---" * 7 + "|")
    for seed, one in found.items():
        tests = [one["dpo_against_best_sft"][mode] for mode in ("greedy", "sampled")]
        both = [
            " / ".join(f"{one[who][mode]['strict']:.1f}" for mode in ("greedy", "sampled"))
            for who in ("start", "sft_on_clean")
        ]
        habit = [one["sft_on_chosen"][tests[1]["sft"]]["sampled"], one["dpo"]["sampled"]]
        lines.append(
            f"| {seed} | {one['pairs']} ({one['clean_chosen']:.0f}%) | {both[0]} "
            f"| {tests[0]['a']:.1f} / {tests[1]['a']:.1f} "
            f"| {tests[0]['b']:.1f} / {tests[1]['b']:.1f} ({tests[0]['z']}, {tests[1]['z']}) "
            f"| {habit[0]['with_closers']:.0f} → {habit[1]['with_closers']:.0f}% | {both[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
