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
        families: instructions by family that its first step draws.
        gives: steps that are trained on: demonstrations, preferences.
        step: the step that draws them.
        more: further settings of that source.
        policy: whether the recipe samples from a policy.
        overrides: further arguments, `key=value`.
        heldout: families that are evaluated instead of the common ones.
    """

    families: dict[str, int]
    gives: tuple[str, ...] = ("demonstrations", "preferences")
    step: str = "prompts"
    more: dict[str, Any] = field(default_factory=dict)
    policy: bool = True
    overrides: tuple[str, ...] = ()
    heldout: dict[str, int] = field(default_factory=dict)


ONLY_D, ONLY_P = ("demonstrations",), ("preferences",)
METHODS: dict[str, Method] = {
    "reject": Method({"math": 400, "format": 400}),
    "execute": Method({"code": 100}),
    "follow": Method({"format": 200}, more={"simple": 1.0}, overrides=("steps.constrained.with.per_constraint=25",)),
    "evolve": Method({"math": 120, "code": 60, "format": 120}, more={"simple": 1.0}),
    "repurpose": Method(
        {"math": 120, "code": 80, "format": 150, "benign": 80}, ONLY_D, "texts", {"answers": True}, policy=False
    ),
    "back_translate": Method(
        {"math": 100, "code": 80, "format": 100, "benign": 60}, ONLY_D, "texts", {"answers": True}, policy=False
    ),
    "role_play": Method({"role": 100}, ONLY_D, "profiles", policy=False, heldout={"role": 200}),
    "constitute": Method({"benign": 80, "harmful": 120}),
    "rank": Method({"math": 60, "code": 30, "format": 60}),
    "instagger": Method({"math": 120, "code": 80, "format": 120}, ONLY_D, "pool", policy=False),
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


def training(seed: int, first: Path, made: Path, method: Method) -> dict[str, Any]:
    """What is trained on a method's demonstrations and preferences, and evaluated."""
    steps: dict[str, Any] = {}
    heldout, gives = str(first / "heldout"), method.gives
    if method.heldout:
        heldout = "heldout"
        source = {"tiny": {"families": method.heldout, "split": "test", "seed": 1000}}
        steps["heldout"] = {"stage": "prompts", "with": {"source": source}}
    evaluate = {"stage": "evaluate", "in": {"prompts": heldout}, "with": {"max_tokens": 96}}
    if method.heldout:
        steps["before_eval"] = {**evaluate, "engines": {"policy": str(first / "sft")}}
    if "demonstrations" in gives:
        both = [str(made / "demonstrations"), str(first / "demonstrations")]
        steps["sft"] = {"stage": "sft", "in": {"model": "tiny", "demonstrations": both}, "with": RETRAIN}
        steps["sft_eval"] = {**evaluate, "engines": {"policy": "step:sft"}}
    if "preferences" in gives:
        inputs = {"policy": str(first / "sft"), "preferences": str(made / "preferences")}
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
    source = {"tiny": {"families": method.families, "seed": 1000 * seed + 7, **method.more}}
    overrides = [f"steps.{method.step}.with.source={json.dumps(source)}", f"seed={seed}", *method.overrides]
    if method.policy:
        overrides.append(f"engines.policy.model={first / 'sft'}")
    folder = out / str(seed) / name
    made = align_run(ROOT / "recipes" / "synthesis" / f"{name}.yaml", folder, *overrides)
    after_folder = out / str(seed) / f"{name}-after"
    after = align_run(training(seed, first, folder / "run", method), after_folder)
    before = after_folder / "run" / "before_eval" if method.heldout else first / "sft_eval"
    found: dict[str, Any] = {
        "rows": {step: made[step].rows for step in method.gives},
        "yield": {step: m.summary["yield"] for step, m in made.items() if "yield" in m.summary},
        "cpu_seconds": round(sum(m.cpu_seconds for m in made.values()), 1),
    }
    if method.heldout:
        found["before"] = after["before_eval"].summary["scores"]
    for trained in ("sft", "dpo"):
        if f"{trained}_eval" in after:
            compared = compare(Table.open(before), Table.open(after_folder / "run" / f"{trained}_eval"))
            found[trained] = after[f"{trained}_eval"].summary["scores"] | {"mcnemar": compared}
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
            **{what: scores_of([run[what] for run in runs]) for what in ("before", "sft", "dpo") if what in runs[0]},
        }
    if options.save:
        options.save.write_text(json.dumps(figures, indent=2, default=vars) + "\n")
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table: scores before and after, McNemar's z, the families that moved most."""
    lines = ["| trained on | rows | greedy | T = 1 | z by seed (greedy; T = 1) | families that moved most (greedy) |"]
    lines += ["|---|---|---|---|---|---|"]

    def line(what: str, rows: str, scores: dict[str, Any], before: dict[str, Any]) -> str:
        moved = {f: s - before["greedy"]["by_family"][f] for f, s in scores["greedy"]["by_family"].items()}
        most = sorted(moved, key=lambda f: -abs(moved[f]))[:3]
        cells = [f"{scores[m]['mean']:.1f} ± {scores[m]['standard_error']:.1f}" for m in ("greedy", "sampled")]
        z = "; ".join(", ".join(f"{v:+.1f}" for v in scores["z"][m]) for m in scores["z"]) if "z" in scores else ""
        families = ", ".join(f"{f} {moved[f]:+.0f}" for f in most if abs(moved[f]) >= 0.5)
        return f"| {what} | {rows} | {' | '.join(cells)} | {z} | {families} |"

    common = figures["before"]
    lines.append(line("the first policy", "", common, common))
    lines.append(line("the written demonstrations again (control)", "", figures["control"], common))
    for name, found in figures["methods"].items():
        before = found.get("before", common)
        if "before" in found:
            lines.append(line(f"the first policy, on {', '.join(before['greedy']['by_family'])}", "", before, before))
        for trained, step, letter in (("sft", "demonstrations", "D"), ("dpo", "preferences", "P")):
            if trained in found:
                counts = sorted(run[step] for run in found["rows"])
                rows = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}–{counts[-1]}"
                lines.append(line(f"{letter} of `{name}`", rows, found[trained], before))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
