"""Which pairs does each way of scoring and pairing make of the same samples, and how many of them are right?

    python benchmarks/online_pairs.py --seed 40 --out runs/world --save benchmarks/results/online_pairs.json

One episode of 600 prompts that no model of the ladder has read, 8 samples each by the DPO policy of the quickstart's
ladder (found in OUT/SEED/run or made), sampled once for all settings. Nothing is trained. The tiny world's verifiers
say of every pair, whoever made it, whether the chosen is right and the rejected wrong. Of the settings nothing was
chosen by these figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from machine import machine
from rungs import align_run, made

from align.core.engines.cache import CachedEngine
from align.core.engines.transformers_engine import TransformersEngine
from align.core.manifest import versions
from align.core.records import Row
from align.core.store import Table
from align.train.episode_file import record_of
from align.train.episodes import Prompts, episode_rows
from align.train.online_settings import Config
from align.train.scoring import Scorer
from reward.members import load_judge
from reward.verifiers import Verifiers

FAMILIES = {"math": 200, "format": 200, "tag": 100, "benign": 50, "harmful": 50}
COMMON = {"prompts_per_episode": 600, "samples_per_prompt": 8, "max_tokens": 96, "max_length": 256, "probe_prompts": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "verifier": {"scorer": "verifier"},
    "reward_model": {"scorer": "reward_model"},
    "mix": {},
    "weighted": {"scorer": "weighted", "weights": {"verifier": 1.0, "reward_model": 0.5}},
    "weighted, min_margin 0.5": {
        "scorer": "weighted", "weights": {"verifier": 1.0, "reward_model": 0.5}, "min_margin": 0.5,
    },
    "mix, max_random": {"pairing": "max_random"},
    "mix, all, max_pairs 4": {"pairing": "all", "max_pairs": 4},
    "reward_model, all, max_pairs 4": {"scorer": "reward_model", "pairing": "all", "max_pairs": 4},
    "mix, length_penalty 2": {"length_penalty": 2.0},
    "mix, choose_from 2": {"choose_from": 2, "prompts_per_episode": 300},
    "mix, the first 300 prompts": {"prompts_per_episode": 300},
}  # fmt: skip
"""What differs from `COMMON` and the stage's defaults."""


def figures(
    rows: list[dict[str, Any]], prompts: dict[str, Row], verifiers: Verifiers, tokenizer: Any
) -> dict[str, Any]:
    """The yield of an episode, and what the verifiers say of its pairs."""
    record = record_of(rows)
    asked, lengths = [], []
    for row in rows:
        for pair in row["pairs"]:
            ids = [row["completion_ids"][pair[side]] for side in ("chosen", "rejected")]
            lengths.append(len(ids[0]) - len(ids[1]))
            prompt = prompts[row["prompt_id"]]
            for one in ids:
                text = tokenizer.decode(one, skip_special_tokens=True)
                asked.append((prompt["task"], text, prompt["reference"], prompt["prompt"][-1]["content"]))
    passed = [verdict.verdict == "passed" for verdict in verifiers.verify_many(asked)]
    both = list(zip(passed[::2], passed[1::2], strict=True))
    taken = [row for row in rows if row["outcome"] != "not_taken"]
    return {
        "prompts": len(taken),
        "completions": record["completions"],
        "pairs": record["pairs"],
        "prompts_with_a_pair": record["outcomes"].get("paired", 0),
        "pairs_of_100_completions": round(100 * record["pairs"] / record["completions"], 1),
        "right_beats_wrong": round(100 * fmean(pair == (True, False) for pair in both), 1),
        "wrong_beats_right": round(100 * fmean(pair == (False, True) for pair in both), 1),
        "both_right": round(100 * fmean(pair == (True, True) for pair in both), 1),
        "both_wrong": round(100 * fmean(pair == (False, False) for pair in both), 1),
        "chosen_longer_by": round(fmean(lengths), 2),
        "outcomes": record["outcomes"],
        "became": record["became"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument("--save", type=Path, required=True)
    options = parser.parse_args()
    ladder = made(options.seed, options.out, ("dpo", "reward_model"))
    source = {"tiny": {"families": FAMILIES, "split": "train", "seed": 9 + 100 * options.seed}}
    document = {"name": "pairs", "steps": {"asked": {"stage": "prompts", "with": {"source": source}}}}
    table = Table.open(align_run(document, options.out / str(options.seed) / "pairs") / "asked")
    plain = TransformersEngine(str(ladder / "dpo" / "model"), device="cpu")
    engine = CachedEngine(plain, options.out / str(options.seed) / "pairs" / "completions")
    reward_model = load_judge(str(ladder / "reward_model" / "model"))
    found: dict[str, Any] = {}
    with Verifiers() as verifiers:
        for name, settings in SETTINGS.items():
            config = Config.model_validate(COMMON | settings)
            rows = Prompts(table, config, options.seed).of_episode(0)
            scorer = Scorer(config, verifiers, reward_model, plain.tokenizer)
            made_of = episode_rows(engine, rows, scorer, config, options.seed, 0, plain.tokenizer)
            found[name] = figures(made_of, {row["prompt_id"]: row for row in rows}, verifiers, plain.tokenizer)
            print(name, json.dumps(found[name]))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "seed": options.seed,
        "prompts": FAMILIES,
        "settings": {name: COMMON | settings for name, settings in SETTINGS.items()},
        "found": found,
    }
    options.save.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
