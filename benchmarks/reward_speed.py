"""What a step of training a reward model takes, ours against TRL's RewardTrainer: same ids, model, batches, optimizer.

    python benchmarks/reward_speed.py --save benchmarks/results/reward_speed.json

Two sorts of data, of uneven lengths. *Pairs*: a prompt with one better and one worse completion. *Groups*: a prompt
with three better and three worse ones, nine pairs, which TRL takes as nine rows of two sequences. One optimizer step
each in turn, timed in CPU seconds without the trainers' own loops around it, the median of several; TRL once as it is
by default (activation checkpointing) and once with its best flags for a CPU. The losses of the first step must agree
to 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from align.core.manifest import versions
from reward.batches import Rewards
from reward.loss import Objective, batch_loss

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 8192


def a_model() -> Any:
    """A random Qwen2 of 256 × 4 with a scalar head."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config)


def groups(count: int, per_side: int, rng: random.Random) -> list[dict[str, Any]]:
    """Prompts of 32-192 tokens, completions of 8-96."""
    found = []
    for _ in range(count):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(32, 193))]
        own = [[rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(8, 97))] for _ in range(2 * per_side)]
        found.append(
            {
                "values": [1.0] * per_side + [0.0] * per_side,
                "ids": [prompt + one for one in own],
                "labels": [[-100] * len(prompt) + one for one in own],
            }
        )
    return found


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every better with every worse completion, as TRL takes them."""
    return [
        {"chosen_ids": row["ids"][i], "rejected_ids": row["ids"][j]}
        for row in rows
        for i, better in enumerate(row["values"])
        for j, worse in enumerate(row["values"])
        if better > worse
    ]


def ours(model: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
    return batch_loss(Objective(), Rewards(model, "scalar", 1.0), batch, "cpu").loss / len(batch)


def trls(model: Any, batch: list[dict[str, Any]], checkpointing: bool) -> Callable[[Any, list[dict[str, Any]]], Any]:
    """TRL's collator and loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", max_length=None,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "align" / "tiny" / "base"))
    tokenizer.pad_token_id = 0
    trainer = RewardTrainer(
        model, arguments, train_dataset=Dataset.from_list(pairs_of(batch)), processing_class=tokenizer
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lambda model, batch: trainer.compute_loss(model, trainer.data_collator(pairs_of(batch)))


def step(
    model: Any, optimizer: Any, loss: Callable[[Any, Any], Any], batch: list[dict[str, Any]]
) -> tuple[float, float]:
    """One optimizer step; its loss and its CPU seconds."""
    begun = time.process_time()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(value.detach()), time.process_time() - begun


def measure(per_side: int, prompts: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step by each way, and how many times as long as ours."""
    rng = random.Random(0)
    batches = [groups(prompts, per_side, rng) for _ in range(repeats + 1)]
    start = a_model().train()
    models = {name: copy.deepcopy(start) for name in ("ours", "TRL's defaults", "TRL's best flags")}
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "ours": ours,
        "TRL's defaults": trls(models["TRL's defaults"], batches[0], checkpointing=True),
        "TRL's best flags": trls(models["TRL's best flags"], batches[0], checkpointing=False),
    }
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, batch in enumerate(batches):
        firsts = []
        for name, model in models.items():
            value, took = step(model, optimizers[name], losses[name], batch)
            firsts.append(value)
            if number:  # the first one warms up
                seconds[name].append(took)
        if number == 0 and max(firsts) - min(firsts) > 1e-4:
            raise SystemExit(f"the first step's losses differ: {firsts}")
    median = {name: statistics.median(took) for name, took in seconds.items()}
    return {
        "prompts": prompts, "completions_of_a_prompt": 2 * per_side, "repeats": repeats,
        "seconds_of_a_step": {name: round(took, 3) for name, took in median.items()},
        "times_ours": {name: round(took / median["ours"], 2) for name, took in median.items() if name != "ours"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "what": "CPU seconds of one optimizer step, 256 x 4, vocabulary 8,192, scalar head, one thread",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(),
        "pairs": measure(1, 16, options.repeats), "groups": measure(3, 6, options.repeats),
    }  # fmt: skip
    if options.save:
        options.save.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: found[name] for name in ("pairs", "groups")}, indent=2))


if __name__ == "__main__":
    main()
