"""The alignment tax on the tiny world: what preference training on some families gains there and costs on the others.

    python benchmarks/alignment_tax.py --seeds 41 42 43 44 --out runs/world --save benchmarks/results/alignment_tax.json
    python benchmarks/alignment_tax.py --tune --seeds 40 --out runs/world --save benchmarks/results/alignment_tax.json
    python benchmarks/alignment_tax.py --plot docs/alignment_tax.svg --save benchmarks/results/alignment_tax.json

DPO of each seed's rejection_sft (the quickstart's ladder, found in OUT/SEED/run or made) on its pairs of `TRAINED`
alone, once gently and once harshly (`TRAININGS`); with AdamW, with an NLL term, with the Online Merging Optimizer
(arXiv:2405.17931), and with AdamW and an offline merge afterwards (`merge`). Gain: points on the trained families; tax:
points lost on the others; both against rejection_sft, paired, on the test split, greedy and at T=1.

The second command is how settings were chosen: all of `TRIED`, on the dev split with another seed. A killed benchmark
goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from ladder import mean_and_error
from machine import machine
from rungs import align_run, difference, evaluation, made, manifest, save, scores
from safetensors.torch import load_file, save_file
from tax_plot import drawn

from align.core.manifest import versions
from align.core.store import TINY, Table

RUNGS = ("rejection_sft", "preferences")
TRAINED = ("format", "benign", "harmful")
OTHERS = ("math", "code", "tag")
HELD_OUT = {"math": 100, "code": 50, "format": 100, "tag": 100, "benign": 50, "harmful": 50}
SAMPLES = 2
"""Of a prompt at temperature 1."""

Weights = dict[str, torch.Tensor]


def merge(
    base: Weights,
    before: Weights,
    after: Weights,
    method: Literal["linear", "dare", "ties"],
    back: float,
    keep: float = 1.0,
    seed: int = 0,
) -> Weights:
    """Offline merging of a trained model with the one from before the training, as differences to their base.

        linear   base + (1 - back) d_after + back d_before
        dare     each difference keeps a coordinate with probability `keep`, divided by `keep` (arXiv:2311.03099)
        ties     each keeps its `keep` largest by magnitude, over all weights; a coordinate's sign is that of the
                 weighted sum, and the weighted mean is over the differences that have it (arXiv:2306.01708)

    Args:
        base: weights by name.
        before: of the same names, such as the SFT model's.
        after: such as the DPO model's.
        back: how much the model from before counts, 0 to 1.
        keep: share of coordinates, 0 to 1; linear takes all.
        seed: decides the masks of dare.
    """
    names = sorted(base)
    d_after, d_before = (torch.cat([(one[n] - base[n]).flatten() for n in names]) for one in (after, before))
    if method == "dare":
        rng = torch.Generator().manual_seed(seed)
        d_after, d_before = (d * (torch.rand(d.shape, generator=rng) < keep) / keep for d in (d_after, d_before))
    if method == "ties":
        d_after, d_before = (d * (d.abs() >= d.abs().quantile(1 - keep)) for d in (d_after, d_before))
        parts = torch.stack([d_after, d_before])
        counts = torch.tensor([[1 - back], [back]]) * (parts != 0)
        agree = counts * (parts.sign() == (counts * parts).sum(0).sign())
        merged = (agree * parts).sum(0) / agree.sum(0).clamp(min=1e-12)
    else:
        merged = (1 - back) * d_after + back * d_before
    sizes = [base[n].numel() for n in names]
    return {n: base[n] + d.view_as(base[n]) for n, d in zip(names, torch.split(merged, sizes), strict=True)}


TRAININGS: dict[str, dict[str, Any]] = {"gentle": {"learning_rate": 2e-4}, "harsh": {"learning_rate": 5e-4}}
"""The quickstart's DPO; and one that is too fast for the others."""
COMMON: dict[str, Any] = {"beta": 0.1, "epochs": 2, "global_batch_size": 16, "max_length": 256}


def merging(kind: str, keep: float, alpha: float, as_in: str) -> dict[str, Any]:
    """Settings of the Online Merging Optimizer."""
    return {"merging": kind, "merging_keep": keep, "merging_alpha": alpha, "merging_as_in": as_in}


ADAMW: dict[str, dict[str, Any]] = {"AdamW": {}, "NLL 1.0": {"nll_weight": 1.0}}
TRIED: dict[str, dict[str, dict[str, Any]]] = {
    "gentle": ADAMW,
    "harsh": ADAMW
    | {
        "OnDARE code 0.5 1e-3": merging("ondare", 0.5, 1e-3, "code"),
        "OnDARE code 0.5 5e-3": merging("ondare", 0.5, 5e-3, "code"),
        "OnDARE code 0.1 1e-3": merging("ondare", 0.1, 1e-3, "code"),
        "OnDARE paper 0.5 1e-3": merging("ondare", 0.5, 1e-3, "paper"),
        "OnTIES code 0.5 1e-3": merging("onties", 0.5, 1e-3, "code"),
        "OnTIES code 0.5 5e-3": merging("onties", 0.5, 5e-3, "code"),
        "OnTIES code 0.1 1e-3": merging("onties", 0.1, 1e-3, "code"),
        "OnTIES paper 0.5 1e-3": merging("onties", 0.5, 1e-3, "paper"),
    },
}
"""Settings of `dpo` beside those of the training; of the optimizer: variant, keep, alpha."""
MERGED_TRIED: dict[str, dict[str, Any]] = {
    f"{method} {back:g}": {"method": method, "back": back, "keep": keep}
    for method, keep, backs in (("linear", 1.0, (0.25, 0.5, 0.75)), ("dare", 0.5, (0.5,)), ("ties", 0.5, (0.5,)))
    for back in backs
}
"""Arguments of `merge`, on AdamW's model."""

CHOSEN = {name: TRIED["harsh"][name] for name in ("AdamW", "NLL 1.0", "OnDARE paper 0.5 1e-3", "OnTIES code 0.1 1e-3")}
CONTROLS = {
    "AdamW at half the rate": {"learning_rate": 2.5e-4},
    "OnDARE code 0.5 1e-3": TRIED["harsh"]["OnDARE code 0.5 1e-3"],
    "OnDARE paper 0.5 0": merging("ondare", 0.5, 0.0, "paper"),
    "OnTIES code 0.1 0": merging("onties", 0.1, 0.0, "code"),
}
"""As small a step by AdamW; the other variant; the steps thinned alone, without tau."""
METHODS = {"gentle": CHOSEN, "harsh": CHOSEN | CONTROLS}
MERGES = {"harsh": {name: MERGED_TRIED[name] for name in ("linear 0.5", "dare 0.5", "ties 0.5")}}


def trained_pairs(ladder: Path, file: Path) -> Path:
    """The ladder's pairs of the trained families, as a file."""
    rows = Table.open(ladder / "preferences").rows()
    kept = [json.dumps(row) for row in rows if row["family"] in TRAINED]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(kept) + "\n")
    return file


def merged_model(ladder: Path, after: Path, folder: Path, settings: Mapping[str, Any], seed: int) -> Path:
    """A folder with AdamW's model, merged with the one from before."""
    weights = [load_file(one / "model.safetensors") for one in (TINY, ladder / "rejection_sft" / "model", after)]
    base, before, after_weights = ({n: t.float() for n, t in one.items()} for one in weights)
    folder.mkdir(parents=True, exist_ok=True)
    for file in after.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(merge(base, before, after_weights, seed=seed, **settings), folder / "model.safetensors", {"format": "pt"})
    return folder


def run(seed: int, out: Path, split: str, methods: Mapping[str, Any], merges: Mapping[str, Any]) -> dict[str, Any]:
    """One seed, from its ladder to gain and tax of each method under each training."""
    ladder = made(seed, out, RUNGS)
    place = out / str(seed) / f"tax_{split}"
    pairs = str(trained_pairs(ladder, place.parent / "tax_pairs.jsonl"))
    asked = {"stage": "prompts", "with": {"source": {"tiny": {"families": HELD_OUT, "split": split, "seed": 1000}}}}
    policy = str(ladder / "rejection_sft")
    steps = {"asked": asked, "before_eval": evaluation(policy, "asked", split, SAMPLES)}
    models: dict[tuple[str, str], str] = {}
    for training, rate in TRAININGS.items():
        for number, (method, settings) in enumerate(methods[training].items()):
            name = models[training, method] = f"{training}_{number}"
            inputs = {"policy": policy, "preferences": pairs} | (
                {"base": "tiny"} if settings.get("merging_alpha") else {}
            )
            steps[name] = {"stage": "dpo", "in": inputs, "with": COMMON | rate | settings}
            steps[f"{name}_eval"] = evaluation(f"step:{name}", "asked", split, SAMPLES)
    document = {"name": f"tax-{seed}", "seed": seed, "steps": steps}
    align_run(document, place)
    for training, every in merges.items():
        after = place / models[training, "AdamW"] / "model"
        for number, (method, settings) in enumerate(every.items()):
            name = models[training, method] = f"{training}_merged_{number}"
            folder = merged_model(ladder, after, place.parent / "tax_merged" / f"{split}_{name}", settings, seed)
            steps[f"{name}_eval"] = evaluation(str(folder), "asked", split, SAMPLES)
    align_run(document, place)
    found: dict[str, Any] = {"before": scores(place / "before_eval")}
    for (training, method), name in models.items():
        before, after = place / "before_eval", place / f"{name}_eval"
        found.setdefault(training, {})[method] = {
            "scores": scores(after),
            "gain": difference(before, after, TRAINED),
            "others": difference(before, after, OTHERS),
        }
        if (place / name / "manifest.json").exists():
            about = manifest(place / name)
            one = {"chosen_logp_change": round(about.summary["chosen_logp_change"], 2), "steps": about.summary["steps"]}
            found[training][method] |= one | {"cpu_seconds": round(about.cpu_seconds)}
    return found


def summary(seeds: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over the seeds of gain and of what became of the others, by training, method and mode."""
    first = next(iter(seeds.values()))
    return {
        training: {
            method: {
                mode: {
                    what: mean_and_error([one[training][method][what][mode]["points"] for one in seeds.values()])
                    for what in ("gain", "others")
                }
                for mode in ("greedy", "sampled")
            }
            for method in first[training]
        }
        for training in TRAININGS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43, 44])
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument(
        "--save", type=Path, required=True, help="JSON file for the figures; what else it holds is kept"
    )
    parser.add_argument("--tune", action="store_true", help="what was tried, on the dev split of the first seed")
    parser.add_argument("--plot", type=Path, default=None, help="SVG file to draw from what was saved; runs nothing")
    options = parser.parse_args()
    if options.plot:
        options.plot.write_text(drawn(json.loads(options.save.read_text())["mean"], TRAINED, OTHERS))
        return
    about: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    about |= {"trained": TRAINED, "others": OTHERS, "trainings": TRAININGS, "prompts": HELD_OUT, "samples": SAMPLES}
    if options.tune:
        seed = options.seeds[0]
        found = run(seed, options.out, "dev", TRIED, dict.fromkeys(TRAININGS, MERGED_TRIED))
        told = {"split": "dev", "seed": seed, "methods": TRIED, "merges": MERGED_TRIED, "runs": found}
        save(options.save, {"tried": about | told})
        print(table(summary({seed: found})))
        return
    about["what"] = (
        "points of verified score gained and lost against rejection_sft, test split of the tiny world, paired"
    )
    about |= {"methods": METHODS, "merges": MERGES}
    seeds: dict[int, Any] = {}
    for seed in options.seeds:
        seeds[seed] = run(seed, options.out, "test", METHODS, MERGES)
        save(options.save, about | {"seeds": seeds, "mean": summary(seeds)})
    print(table(summary(seeds)))


def table(means: Mapping[str, Any]) -> str:
    """The means as a Markdown table."""
    lines = [
        "| training | method | trained, greedy | others, greedy | trained, T = 1 | others, T = 1 |",
        "|---" * 6 + "|",
    ]
    for training, methods in means.items():
        for method, modes in methods.items():
            cells = [
                f"{modes[mode][what]['mean']:+.1f} ± {modes[mode][what]['standard_error']:.1f}"
                for mode in ("greedy", "sampled")
                for what in ("gain", "others")
            ]
            lines.append(f"| {training} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
