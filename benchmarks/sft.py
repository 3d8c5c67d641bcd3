"""How quick is `sft` on a CPU beside TRL's SFTTrainer, on the same ragged rows?

Both train the same model from the same start on the same ids and labels, in the same global batches and order, in fp32,
on one thread. Counted are real tokens (no padding) per second of the process's CPU time, from the second step on. Every
run is a process of its own; ours and theirs take turns, and the median counts. The first step's loss must be the same.

Theirs is run at TRL's defaults (8 rows at a time; on a CPU neither bf16 nor gradient checkpointing, which the default
would switch on, is fair; what checkpointing costs is told apart), and with the best of the flags that help here: more
or fewer rows at a time, rows of like length together, rows flattened (`padding_free`, which is also what its packing
does within a batch).

    python benchmarks/sft.py [--steps 6] [--repeats 3] [--out benchmarks/results/sft.json]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from machine import machine
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from align.core.stage import Tools
from align.core.store import TINY
from align.train import sft_trainer
from align.train.batches import Steps
from align.train.data import tokens_on_disk
from align.train.settings import Speed
from align.train.sft import Config

BATCH = 32
WARM = 1
"""Steps that are not counted."""

Rows = list[tuple[list[int], int]]
"""Ids, and the first supervised place; all from there on are supervised."""


@dataclass(frozen=True)
class Case:
    """A model's vocabulary and the lengths of the rows."""

    name: str
    vocabulary: int
    median: int
    spread: float
    longest: int


CASES = [
    Case("rows of 16 to 160 tokens, vocabulary 768", 768, 45, 0.5, 160),
    Case("rows of 16 to 160 tokens, vocabulary 8,192", 8192, 45, 0.5, 160),
    Case("rows of 16 to 320 tokens, vocabulary 8,192", 8192, 64, 0.9, 320),
]


def rows_of(case: Case, count: int) -> Rows:
    """Rows whose lengths are log-normal; about half of a row is supervised."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(case.median), case.spread, count).astype(int), 16, case.longest)
    return [
        (rng.integers(5, case.vocabulary, length).tolist(), max(1, int(length * rng.uniform(0.3, 0.7))))
        for length in lengths
    ]


def model_of(case: Case) -> Any:
    """The tiny world's model, with the case's vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU time after each step, and the first step's loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.loss: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Reads the clock."""
        self.times.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
        """Keeps the first loss."""
        if self.loss is None and "loss" in (logs or {}):
            self.loss = float(logs["loss"])


class Theirs(SFTTrainer):  # type: ignore[misc]
    """TRL's, in the order of the rows, so that the global batches are ours."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def theirs(case: Case, rows: Rows, folder: Path, at_once: int, alike: bool, **flags: Any) -> Clock:
    """TRL, `at_once` rows at a time; `alike`: sorted by length within each global batch."""
    if alike:
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rows = [row for batch in batches for row in sorted(batch, key=lambda row: len(row[0]))]
    data = Dataset.from_dict(
        {"input_ids": [ids for ids, _ in rows], "labels": [[-100] * at + ids[at:] for ids, at in rows]}
    )
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=at_once, gradient_accumulation_steps=BATCH // at_once,
        num_train_epochs=1, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-3,
        **({"gradient_checkpointing": False} | flags),
    )  # fmt: skip
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    Theirs(model_of(case), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]).train()
    return clock


def ours(case: Case, rows: Rows, folder: Path) -> Clock:
    """The stage's own trainer and batches, as the stage puts them together."""
    config = Config(learning_rate=1e-3, epochs=1.0, global_batch_size=BATCH, max_length=1024)
    speed = Speed(device="cpu", precision="fp32", save_every=10**9)
    tools = Tools(seed=0, engines={}, progress=Quiet(), work=folder / "work", out=folder / "out")
    encoded = ({"input_ids": ids, "turns": [at, len(ids)], "weights": []} for ids, at in rows)
    data, _ = tokens_on_disk(folder / "tokens.arrow", encoded, "row")
    sft = sft_trainer.SFT(
        config, tools, model=model_of(case), args=sft_trainer.sft_arguments(config, speed, tools),
        processing_class=AutoTokenizer.from_pretrained(TINY), train_dataset=data, rows=len(data),
    )  # fmt: skip
    sft.train_dataset = Steps(data, np.arange(len(data)), **sft.split(len(data), speed))
    clock = Clock()
    sft.add_callback(clock)
    sft.train()
    return clock


class Quiet:
    """Says nothing."""

    def start(self, total: int | None, unit: str) -> None:
        """Nothing."""

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


Way = Callable[[Case, Rows, Path], Clock]

DEFAULT = "TRL, defaults in fp32 without checkpointing: 8 rows at a time"
FLAGS: dict[str, Way] = {
    DEFAULT: lambda *given: theirs(*given, at_once=8, alike=False),
    "TRL, 8 rows at a time of like length": lambda *given: theirs(*given, at_once=8, alike=True),
    "TRL, 32 rows at a time": lambda *given: theirs(*given, at_once=32, alike=False),
    "TRL, padding_free, 4 rows at a time of like length": lambda *given: theirs(
        *given, at_once=4, alike=True, padding_free=True
    ),
}
CHECKPOINTED = "TRL, defaults in fp32: 8 rows at a time, checkpointing"
OURS = "align"


def measured(way: Way, case: Case, rows: Rows) -> dict[str, float]:
    """One run in a process of its own: real tokens a second of CPU time, and the first step's loss."""
    tokens = sum(len(ids) for ids, _ in rows[WARM * BATCH :])
    with tempfile.TemporaryDirectory() as name:
        given = Path(name) / "figures.json"
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = 1
            try:
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                torch.set_num_threads(1)
                clock = way(case, rows, Path(name))
                per_s = tokens / (clock.times[-1] - clock.times[WARM - 1])
                given.write_text(json.dumps({"tokens_per_cpu_s": per_s, "loss": clock.loss}))
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        figures: dict[str, float] = json.loads(given.read_text())
        return figures


def compared(case: Case, steps: int, repeats: int) -> dict[str, Any]:
    """Ours, TRL's default and the best of its flags, taking turns."""
    rows = rows_of(case, (steps + WARM) * BATCH)
    tried = {name: measured(way, case, rows) for name, way in FLAGS.items()}
    best = max(tried, key=lambda name: tried[name]["tokens_per_cpu_s"])
    turns: dict[str, Way] = {OURS: ours, DEFAULT: FLAGS[DEFAULT], best: FLAGS[best]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, way in turns.items():
            runs[name].append(measured(way, case, rows))
    loss = {name: found[0]["loss"] for name, found in (runs | {k: [v] for k, v in tried.items()}).items()}
    apart = max(loss.values()) - min(loss.values())
    assert apart < 1e-5, f"the first step's losses differ by {apart}: {loss}"
    speed = {name: statistics.median(run["tokens_per_cpu_s"] for run in found) for name, found in runs.items()}
    checkpointed = measured(
        lambda *given: theirs(*given, at_once=8, alike=False, gradient_checkpointing=True), case, rows
    )
    lengths = [len(ids) for ids, _ in rows]
    return {
        "case": case.name,
        "tokens": sum(lengths),
        "length": {"mean": round(sum(lengths) / len(lengths), 1), "longest": max(lengths)},
        "rows_of_a_step": BATCH,
        "tokens_per_cpu_s": {name: round(found) for name, found in speed.items()},
        "each_run": {name: [round(run["tokens_per_cpu_s"]) for run in found] for name, found in runs.items()},
        "tried_once": {name: round(found["tokens_per_cpu_s"]) for name, found in tried.items()}
        | {CHECKPOINTED: round(checkpointed["tokens_per_cpu_s"])},
        "best_flags": best,
        "times_the_default": round(speed[OURS] / speed[DEFAULT], 2),
        "times_the_best_flags": round(speed[OURS] / speed[best], 2),
        "first_losses_apart": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", type=int, action="append", help="only this one, counted from 0")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = []
    for number in settings.case or range(len(CASES)):
        cases.append(compared(CASES[number], settings.steps, settings.repeats))
        print(json.dumps(cases[-1], indent=2), flush=True)
    result = {
        "question": "real tokens a second of CPU time: `sft` beside TRL's SFTTrainer, same rows, batches and model",
        "model": "Qwen2, hidden 128, 4 layers, tied embeddings, fp32, one thread",
        "cases": cases,
        "versions": {name: __import__(name).__version__ for name in ("torch", "transformers", "trl")},
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
