"""Does online DPO beat the offline DPO that it starts from? On the tiny world, with its controls, over several seeds.

    python benchmarks/online_world.py --seeds 41 42 43 44 --out runs/world --save benchmarks/results/online_world.json
    python benchmarks/online_world.py --tune --seeds 40 --out runs/world --save benchmarks/results/online_world.json

The first command runs, from each seed's DPO policy (the quickstart's ladder, found in OUT/SEED/run or made):

    mix             a verifier where a program decides, the reward model for the rest
    reward_model    the reward model alone
    verifier        verifiers alone
    rejection       online rejection sampling: SFT on the best completion of each pair of mix (only the loss differs)

with the same prompts, samples, episodes and seed; and evaluates each on the test split, greedily and by `--samples`
samples a prompt at temperature 1. The bar, set before any of these seeds was run: on every seed mix is better than
offline DPO at T=1 (the paired 95% interval, clustered by prompt, lies above 0) and no worse greedily (that interval is
not wholly below 0, and the mean over seeds is not below 0).

The second command is how the settings were chosen: all of `TRIED`, on the dev split with another seed. What was
measured stands in the same file, under `tried`. A killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from ladder import recipe as ladder_recipe
from machine import machine
from rungs import HELD_OUT, align_run, difference, evaluation, made, manifest, save, scores

from align.core.manifest import versions

RUNGS = ("dpo", "reward_model")
SFT = {"losses": ["sft"], "nll_weight": 0.0}
"""In place of DPO's loss: the mean negative log-likelihood of the chosen."""
TRIED: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "every prompt taken": {"choose_from": 1},
    "8 episodes, lr 1e-4": {"episodes": 8, "learning_rate": 1e-4},
    "every prompt taken, 6 more samples where none is right": {"choose_from": 1, "resample": 6},
    "rejection": SFT,
    "rejection, lr 5e-4": {"learning_rate": 5e-4, **SFT},
}
"""What differs from the quickstart's `online_dpo`."""

FINAL: dict[str, dict[str, Any]] = {
    "mix": {},
    "reward_model": {"scorer": "reward_model"},
    "verifier": {"scorer": "verifier"},
    "rejection": SFT,
}


def recipe(seed: int, ladder: Path, runs: dict[str, dict[str, Any]], split: str, samples: int) -> dict[str, Any]:
    """All the runs of a seed, and their evaluations beside that of the policy they start from."""
    quick = ladder_recipe(seed)["steps"]
    steps: dict[str, Any] = {
        "unread": quick["unread"],
        "asked": {
            "stage": "prompts",
            "with": {"source": {"tiny": {"families": HELD_OUT, "split": split, "seed": 1000}}},
        },
        "dpo_eval": evaluation(str(ladder / "dpo"), "asked", split, samples),
    }
    for name, settings in runs.items():
        inputs = {"policy": str(ladder / "dpo"), "prompts": "unread", "reward_model": str(ladder / "reward_model")}
        told = quick["online_dpo"]["with"] | settings
        if told.get("scorer") == "verifier":
            del inputs["reward_model"]
        steps[name] = {"stage": "online-dpo", "in": inputs, "with": told}
        steps[f"{name}_eval"] = evaluation(f"step:{name}", "asked", split, samples)
    return {"name": f"online-{seed}", "seed": seed, "steps": steps}


def run(seed: int, out: Path, runs: dict[str, dict[str, Any]], split: str, samples: int) -> dict[str, Any]:
    """One seed, from its ladder to the figures of each run."""
    ladder = made(seed, out, RUNGS)
    folder = align_run(recipe(seed, ladder, runs, split, samples), out / str(seed) / f"online_{split}")
    found: dict[str, Any] = {"dpo": {"scores": scores(folder / "dpo_eval"), "samples": samples}}
    for name in runs:
        about = manifest(folder / name)
        found[name] = {
            "scores": scores(folder / f"{name}_eval"),
            "against_dpo": difference(folder / "dpo_eval", folder / f"{name}_eval"),
            "benign_against_dpo": difference(folder / "dpo_eval", folder / f"{name}_eval", ["benign"]),
            "harmful_against_dpo": difference(folder / "dpo_eval", folder / f"{name}_eval", ["harmful"]),
            "pairs": about.summary["pairs"],
            "steps": about.summary["steps"],
            "chosen_logp_change": round(about.summary["chosen_logp_change"], 2),
            "rolled_back": about.summary["rolled_back"],
            "guards_saw": [round(about.summary["heldout_start"], 1), round(about.summary["heldout_end"], 1)],
            "cpu_seconds": round(about.cpu_seconds),
        }
    return found


def bar(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Whether mix holds what was asked of it."""
    against = {seed: one["mix"]["against_dpo"] for seed, one in found.items()}
    greedy = [one["greedy"]["points"] for one in against.values()]
    return {
        "better_at_t1": {seed: one["sampled"]["low"] > 0 for seed, one in against.items()},
        "no_worse_greedy": {seed: one["greedy"]["high"] >= 0 for seed, one in against.items()},
        "greedy_mean": round(sum(greedy) / len(greedy), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43, 44])
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument("--save", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--samples", type=int, default=4, help="of a prompt at temperature 1")
    parser.add_argument("--tune", action="store_true", help="what was tried, on the dev split of the first seed")
    options = parser.parse_args()
    about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    about["settings"] = ladder_recipe(1)["steps"]["online_dpo"]["with"]
    if options.tune:
        seed = options.seeds[0]
        names = {f"try_{number}": name for number, name in enumerate(TRIED)}
        runs = {step: TRIED[name] for step, name in names.items()}
        found = {
            names.get(step, step): one for step, one in run(seed, options.out, runs, "dev", options.samples).items()
        }
        told = {"split": "dev", "seed": seed, "changes": TRIED, "runs": found}
        save(options.save, {"tried": about | told})
        print(table({seed: found}))
        return
    about["what"] = "verified score in % on 750 test instructions of the tiny world; differences are paired, in points"
    about["changes"] = FINAL
    seeds: dict[int, Any] = {}
    for seed in options.seeds:
        seeds[seed] = run(seed, options.out, FINAL, "test", options.samples)
        save(options.save, about | {"bar": bar(seeds), "seeds": seeds})
    print(table(seeds))


def table(found: dict[int, dict[str, Any]]) -> str:
    """The figures as a Markdown table, greedy / T = 1, the difference with its 95% interval."""
    lines = ["| seed | run | score | against DPO, greedy | against DPO, T = 1 | benign | harmful | rolled back |"]
    lines.append("|---" * 8 + "|")
    for seed, runs in found.items():
        for name, one in runs.items():
            both = {
                family: " / ".join(f"{one['scores'][mode][family]:.1f}" for mode in ("greedy", "sampled"))
                for family in ("overall", "benign", "harmful")
            }
            against = [
                f"{d['points']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})" for d in one.get("against_dpo", {}).values()
            ]
            cells = [both["overall"], *(against or ["", ""]), both["benign"], both["harmful"]]
            lines.append(f"| {seed} | {name} | " + " | ".join(cells) + f" | {len(one.get('rolled_back', []))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
