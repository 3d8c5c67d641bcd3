"""What each synthesis method gains by itself on the embedded tiny world: a model before and after, over several seeds.

    python benchmarks/synthesis.py --seeds 1 2 3 --out runs/synthesis --save benchmarks/results/synthesis.json

For each seed a first policy is tuned on 300 written demonstrations (the quickstart's first SFT). Then each recipe of
`recipes/synthesis` runs with that policy, larger counts (`METHODS`) and fresh instructions. Its demonstrations train
the base model again, beside the written ones; its preferences train the policy by DPO. Both are evaluated on the same
750 held-out instructions as the policy, and McNemar's test tells the difference from noise. A killed benchmark goes on
where it was.

The control beside every row that trains on demonstrations: the written ones alone, with as many epochs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from machine import machine

from align.core.manifest import Manifest, versions
from align.core.store import Table
from align.evaluate.scores import compare

ROOT = Path(__file__).resolve().parent.parent
RETRAIN = {
    "learning_rate": 1e-3, "min_lr_ratio": 0.0, "warmup_ratio": 0.05, "epochs": 4, "global_batch_size": 16,
    "max_length": 256, "weight_decay": 0.0,
}  # fmt: skip
PREFER = {
    "beta": 0.1,
    "nll_weight": 1.0,
    "learning_rate": 2e-4,
    "epochs": 2,
    "global_batch_size": 16,
    "max_length": 256,
}


@dataclass(frozen=True)
class Method:
    """A recipe of `recipes/synthesis` as the benchmark runs it.

    Attributes:
        families: instructions by family that its step `prompts` draws; none: the recipe's own source stands.
        gives: steps that are trained on: demonstrations, preferences.
        more: further overrides, `key=value`.
        simple: share of instructions without difficulties.
        heldout: another held-out set than the common one: families by count.
    """

    families: dict[str, int] = field(default_factory=dict)
    gives: tuple[str, ...] = ("demonstrations", "preferences")
    more: tuple[str, ...] = ()
    simple: float = 0.0


METHODS: dict[str, Method] = {
    "reject": Method({"math": 500, "format": 500}),
}
"""By the recipe's name."""


def first_policy(seed: int) -> dict[str, Any]:
    """The held-out instructions, the written demonstrations, the first policy, and the control."""
    quick = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["steps"]
    steps = {name: quick[name] for name in ("heldout", "written", "demonstrations", "sft", "sft_eval")}
    steps["written"]["with"]["source"]["tiny"]["seed"] += 100 * (seed - 1)
    steps["again"] = {**steps["sft"], "with": RETRAIN}
    steps["again_eval"] = {**steps["sft_eval"], "engines": {"policy": "step:again"}}
    return {"name": f"synthesis-{seed}", "seed": seed, "steps": steps}


def training(seed: int, first: Path, method: Path, gives: tuple[str, ...]) -> dict[str, Any]:
    """What is trained on a method's demonstrations and preferences, and evaluated."""
    steps: dict[str, Any] = {}
    evaluate = {"stage": "evaluate", "in": {"prompts": str(first / "heldout")}, "with": {"max_tokens": 96}}
    if "demonstrations" in gives:
        both = [str(method / "demonstrations"), str(first / "demonstrations")]
        steps["sft"] = {"stage": "sft", "in": {"model": "tiny", "demonstrations": both}, "with": RETRAIN}
        steps["sft_eval"] = {**evaluate, "engines": {"policy": "step:sft"}}
    if "preferences" in gives:
        inputs = {"policy": str(first / "sft"), "preferences": str(method / "preferences")}
        steps["dpo"] = {"stage": "dpo", "in": inputs, "with": PREFER}
        steps["dpo_eval"] = {**evaluate, "engines": {"policy": "step:dpo"}}
    return {"name": "after", "seed": seed, "steps": steps}


def align_run(document: dict[str, Any] | Path, folder: Path, *overrides: str) -> dict[str, Manifest]:
    """Runs a recipe to its end, or what is left of it; the manifests of its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    file = document if isinstance(document, Path) else folder / "recipe.yaml"
    if not isinstance(document, Path):
        file.write_text(yaml.safe_dump(document, sort_keys=False))
    command = [sys.executable, "-m", "align.cli", "run", str(file), *overrides, f"out={folder / 'run'}"]
    subprocess.run(command, check=True)
    return {path.parent.name: Manifest.read(path.parent) for path in (folder / "run").glob("*/manifest.json")}


def one_method(seed: int, name: str, out: Path) -> dict[str, Any]:
    """A method with one seed: what it gave, and how the models trained on it score."""
    method, first = METHODS[name], out / str(seed) / "first" / "run"
    source = {"tiny": {"families": method.families, "seed": 1000 * seed + 7, "simple": method.simple}}
    overrides = [f"steps.prompts.with.source={json.dumps(source)}"] if method.families else []
    overrides += [f"engines.policy.model={first / 'sft'}", f"seed={seed}", *method.more]
    made = align_run(ROOT / "recipes" / "synthesis" / f"{name}.yaml", out / str(seed) / name, *overrides)
    after = align_run(
        training(seed, first, out / str(seed) / name / "run", method.gives), out / str(seed) / f"{name}-after"
    )
    found: dict[str, Any] = {
        "rows": {step: made[step].rows for step in method.gives},
        "yield": {step: m.summary["yield"] for step, m in made.items() if "yield" in m.summary},
        "cpu_seconds": round(sum(m.cpu_seconds for m in made.values()), 1),
    }
    for trained in ("sft", "dpo"):
        if f"{trained}_eval" in after:
            found[trained] = after[f"{trained}_eval"].summary["scores"] | {
                "mcnemar": compare(
                    Table.open(first / "sft_eval"),
                    Table.open(out / str(seed) / f"{name}-after" / "run" / f"{trained}_eval"),
                )
            }
    return found


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else math.nan
    return {"mean": round(mean, 1), "standard_error": round(math.sqrt(variance / len(values)), 1)}


def scores_of(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean scores over the seeds, whole and by family, greedy and sampled."""
    found: dict[str, Any] = {}
    for mode in ("greedy", "sampled"):
        families = by_seed[0][mode]["by_family"]
        found[mode] = mean_and_error([s[mode]["overall"]["score"] for s in by_seed])
        found[mode]["by_family"] = {
            f: mean_and_error([s[mode]["by_family"][f]["score"] for s in by_seed])["mean"] for f in families
        }
    if "mcnemar" in by_seed[0]:
        found["z"] = {mode: [round(s["mcnemar"][mode]["z"], 1) for s in by_seed] for mode in ("greedy", "sampled")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/synthesis"))
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    options.out = options.out.resolve()
    first = {seed: align_run(first_policy(seed), options.out / str(seed) / "first") for seed in options.seeds}
    figures: dict[str, Any] = {
        "what": "verified score in % on the test split of the tiny world, 750 instructions",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "seeds": options.seeds,
        "before": scores_of([first[seed]["sft_eval"].summary["scores"] for seed in options.seeds]),
        "control": scores_of([first[seed]["again_eval"].summary["scores"] for seed in options.seeds]),
        "methods": {},
    }  # fmt: skip
    for name in options.methods:
        runs = [one_method(seed, name, options.out) for seed in options.seeds]
        figures["methods"][name] = {
            "rows": [run["rows"] for run in runs],
            "yield": runs[0]["yield"],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            **{trained: scores_of([run[trained] for run in runs]) for trained in ("sft", "dpo") if trained in runs[0]},
        }
    if options.save:
        options.save.write_text(json.dumps(figures, indent=2, default=vars) + "\n")
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table: greedy and sampled scores, those families that moved most, McNemar's z."""
    before = figures["before"]
    lines = ["| trained on | rows | greedy | T = 1 | z by seed (greedy; T = 1) | families that moved most (greedy) |"]
    lines += ["|---|---|---|---|---|---|"]

    def line(what: str, rows: str, scores: dict[str, Any]) -> str:
        moved = {f: s - before["greedy"]["by_family"][f] for f, s in scores["greedy"]["by_family"].items()}
        most = sorted(moved, key=lambda f: -abs(moved[f]))[:3]
        cells = [f"{scores[m]['mean']:.1f} ± {scores[m]['standard_error']:.1f}" for m in ("greedy", "sampled")]
        z = "; ".join(", ".join(f"{v:+.1f}" for v in scores["z"][m]) for m in scores["z"]) if "z" in scores else ""
        families = ", ".join(f"{f} {moved[f]:+.0f}" for f in most if abs(moved[f]) >= 0.5)
        return f"| {what} | {rows} | {' | '.join(cells)} | {z} | {families} |"

    lines.append(line("nothing more: the first policy", "", before))
    lines.append(line("the written demonstrations again (control)", "", figures["control"]))
    for name, found in figures["methods"].items():
        for trained, step in (("sft", "demonstrations"), ("dpo", "preferences")):
            if trained in found:
                rows = "–".join(
                    str(n) for n in sorted({run[step] for run in found["rows"]})[:: max(1, len(found["rows"]) - 1)]
                )
                letter = "D" if trained == "sft" else "P"
                lines.append(line(f"{letter} of `{name}`", rows, found[trained]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
