"""DPO on a CPU beside plain TRL: CPU-seconds a pair, the reference included.

    python benchmarks/dpo.py [--out FILE.json] [--repeats 3] [--cells 8192x128 8192x512 768x128 32000x128 32000x512]

In one process a cell: the same pairs of token ids in the same batches, the same start, reference, optimizer and seed,
in fp32 on one thread, in turn (A B C D A B C D ...). The model has the shape of the tiny world's (hidden 128, 4
layers), its vocabulary is the cell's; prompts have the cell's length on average (3/4 to 5/4 of it), completions 16 to
96 tokens. The reference is another model, so that no log-ratio is 0. Batches are of pairs of like length for all.

ours          the trainer of the stage `dpo`: flat, a prompt once for both completions, log-probabilities of the
              reference computed once with the same code, and counted
ours again    the same without the reference, as a run that finds it in the cache
trl           DPOTrainer as it comes, on a CPU in fp32: its gradient_checkpointing is on, so activations come twice
trl, no ckpt  the same without that
trl, best     further precompute_ref_log_probs, and of the micro batches 2, 4 and 8 the quickest here. Its
              padding_free exists and is switched off in 1.16, whatever one sets.

The first step of each run is left out. The losses of the first step must agree to 1e-5; log-probabilities are held
against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ |= {
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import numpy as np
from machine import machine

CELLS = ("8192x128", "8192x512", "768x128", "768x512", "32000x128", "32000x512")
BATCH = 8
BARS = {"trl": 2.4, "trl, best": 2.0}
"""At a vocabulary of 8,192 and prompts of 128 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of 8 pairs; one more goes before them")
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        vocabulary, prompt = (int(number) for number in given.cell.split("x"))
        print(json.dumps(one_cell(vocabulary, prompt, given.repeats, given.steps)))
        return
    found: dict[str, Any] = {"cells": []}
    if given.out and given.out.exists():  # cells may be measured one by one
        found["cells"] = [c for c in json.loads(given.out.read_text())["cells"] if c["cell"] not in given.cells]
    for cell in given.cells:
        command = [
            sys.executable,
            __file__,
            "--cell",
            cell,
            "--repeats",
            str(given.repeats),
            "--steps",
            str(given.steps),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{cell}: see above")
        result = json.loads(done.stdout.strip().splitlines()[-1]) | {"cell": cell, "machine": machine()}
        result |= {"repeats": given.repeats, "steps": given.steps}
        found["cells"].append(result)
        print(line_of(result), flush=True)
        if given.out:
            found |= {"date": str(date.today()), "settings": {"batch": BATCH}}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    reached = next((cell["times"] for cell in found["cells"] if cell["cell"] == "8192x128"), {})
    missed = [f"{name}: {reached[name]} < {bar}" for name, bar in BARS.items() if reached and reached[name] < bar]
    if missed:
        sys.exit(f"bars missed: {'; '.join(missed)}")


def line_of(cell: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {1e3 * value['cpu_s']:.1f} ms" for name, value in cell["runs"].items())
    times = ", ".join(f"{value:.2f}x {name}" for name, value in cell["times"].items())
    return f"{cell['cell']:>9}: {figures}\n           ours is {times}"


# --- one cell ---------------------------------------------------------------------------------------------------------


def one_cell(vocabulary: int, prompt: int, repeats: int, steps: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    pairs = make_pairs(vocabulary, prompt, BATCH * (steps + 1))
    sizes = {size: plain(pairs, vocabulary, steps=1, micro=size, best=True)["cpu_s"] for size in (2, 4, 8)}
    quickest = min(sizes, key=lambda size: sizes[size])
    kinds = {
        "ours": lambda: ours(pairs, vocabulary, steps),
        "trl": lambda: plain(pairs, vocabulary, steps, checkpointing=True),
        "trl, no ckpt": lambda: plain(pairs, vocabulary, steps),
        "trl, best": lambda: plain(pairs, vocabulary, steps, micro=quickest, best=True),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in kinds.items():
            runs[name].append(run())
            print(f"{name}: {1e3 * runs[name][-1]['cpu_s']:.1f} ms a pair", file=sys.stderr, flush=True)
    losses = {name: each[0]["loss"] for name, each in runs.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses
    cpu = {name: statistics.median(run["cpu_s"] for run in each) for name, each in runs.items()}
    again = statistics.median(run["steps_s"] for run in runs["ours"])
    tokens = [sum(len(pair[name]) for pair in pairs) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return {
        "vocabulary": vocabulary,
        "prompt": prompt,
        "mean_prompt": round(tokens[0] / len(pairs), 1),
        "mean_completion": round(sum(tokens[1:]) / 2 / len(pairs), 1),
        "parameters": int(sum(p.numel() for p in make_model(vocabulary, 0).parameters())),
        "runs": {
            name: {"cpu_s": round(cpu[name], 5), "least_cpu_s": round(min(run["cpu_s"] for run in each), 5),
                   "reference_s": round(statistics.median(run["reference_s"] for run in each), 5),
                   "all": [round(run["cpu_s"], 5) for run in each]}
            for name, each in runs.items()
        } | {"ours again": {"cpu_s": round(again, 5)}},
        "times": {name: round(cpu[name] / cpu["ours"], 2) for name in kinds if name != "ours"},
        "times_reference_cached": {name: round(cpu[name] / again, 2) for name in kinds if name != "ours"},
        "best_micro_batch": quickest,
        "micro_batches": {str(size): round(value, 5) for size, value in sizes.items()},
        "first_loss": losses,
        "logp_error": errors(pairs[:BATCH], vocabulary),
    }  # fmt: skip


def make_pairs(vocabulary: int, prompt: int, count: int) -> list[dict[str, list[int]]]:
    from align.train.data import batch_order

    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        lengths = [rng.integers(prompt * 3 // 4, prompt * 5 // 4 + 1), *rng.integers(16, 97, 2)]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs.append({name: rng.integers(5, vocabulary, n).tolist() for name, n in zip(names, lengths, strict=True)})
    lengths = np.array([sum(len(ids) for ids in pair.values()) for pair in pairs])
    return [pairs[place] for place in batch_order(lengths, 1.0, BATCH, 0)]


def make_model(vocabulary: int, seed: int) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.04, max_position_embeddings=2048,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def tokenizer() -> Any:
    """Any: the rows are ids. Its padding token must be one of the vocabulary."""
    from transformers import AutoTokenizer

    from align.core.store import TINY

    return AutoTokenizer.from_pretrained(TINY)


class Clock:
    """Processor time of the reference and of the steps after the first."""

    def __init__(self) -> None:
        self.reference = self.began = self.took = 0.0
        self.loss: float | None = None

    def callback(self) -> Any:
        """What starts and stops it."""
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    clock.began = time.process_time()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == state.max_steps:
                    clock.took = time.process_time() - clock.began

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if clock.loss is None and "loss" in logs:
                    clock.loss = logs["loss"]

        return Steps()

    def figures(self, pairs: int, steps: int) -> dict[str, float]:
        """Seconds a pair."""
        reference, each = self.reference / pairs, self.took / (steps * BATCH)
        assert self.loss is not None
        return {"cpu_s": reference + each, "reference_s": reference, "steps_s": each, "loss": self.loss}


def ours(pairs: list[dict[str, list[int]]], vocabulary: int, steps: int) -> dict[str, float]:
    from datasets import Dataset

    from align.train.reference import with_reference

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        dpo = our_trainer(pairs, vocabulary, folder)
        reference = dpo.score_like_the_policy(make_model(vocabulary, 1))
        began = time.process_time()
        logps = dpo.reference_logps(pairs, reference)
        clock.reference = time.process_time() - began
        dpo.train_dataset = with_reference(Dataset.from_list(pairs), logps)
        dpo.add_callback(clock.callback())
        dpo.train()
    return clock.figures(len(pairs), steps)


def our_trainer(pairs: list[dict[str, list[int]]], vocabulary: int, folder: str) -> Any:
    from datasets import Dataset

    from align.core.stage import Tools
    from align.progress import Silent
    from align.train.dpo import Config
    from align.train.preference import DPO, dpo_arguments
    from align.train.settings import Speed
    from align.train.trainer import set_batches

    config = Config(global_batch_size=BATCH, learning_rate=1e-5, warmup_ratio=0.0, max_length=2048)
    speed = Speed(device="cpu", precision="fp32")
    tools = Tools(0, {}, Silent(), Path(folder) / "work", Path(folder))
    arguments = dpo_arguments(config, speed, tools)
    arguments.save_strategy = "no"
    set_batches(arguments, BATCH, len(pairs), speed)
    return DPO(
        config, tools, len(pairs), model=make_model(vocabulary, 0), args=arguments, processing_class=tokenizer(),
        train_dataset=Dataset.from_list(pairs),
    )  # fmt: skip


def plain(
    pairs: list[dict[str, list[int]]],
    vocabulary: int,
    steps: int,
    micro: int = 8,
    best: bool = False,
    checkpointing: bool = False,
) -> dict[str, float]:
    """TRL's trainer; its default micro batch is 8."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    clock = Clock()
    pairs = pairs[: BATCH * (steps + 1)]

    class Plain(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)  # the same batches as ours

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the same ids as ours

        def _precompute_ref_logps(self, *args: Any) -> Any:
            began = time.process_time()
            try:
                return super()._precompute_ref_logps(*args)
            finally:
                clock.reference = time.process_time() - began

    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=BATCH // micro,
            learning_rate=1e-5, max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=best, logging_steps=1, num_train_epochs=1, report_to="none", disable_tqdm=True,
            save_strategy="no", log_level="error",
        )  # fmt: skip
        trl = Plain(
            make_model(vocabulary, 0), make_model(vocabulary, 1), arguments, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(), callbacks=[clock.callback()],
        )  # fmt: skip
        trl.train()
    return clock.figures(len(pairs), steps)


def errors(pairs: list[dict[str, list[int]]], vocabulary: int) -> dict[str, float]:
    """How far summed log-probabilities lie from those of a float64 forward without padding, nats."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    exact = make_model(vocabulary, 0).double().eval()
    expected = np.zeros((len(pairs), 2))
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            for side, name in enumerate(("chosen_ids", "rejected_ids")):
                ids = torch.tensor([pair["prompt_ids"] + pair[name]])
                logps = exact(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                expected[number, side] = logps[-len(pair[name]) :].sum().item()
        with tempfile.TemporaryDirectory() as folder:
            flat = our_trainer(pairs, vocabulary, folder).policy_logps(pairs)
        model = make_model(vocabulary, 0).eval()
        add_fused_lm_head(model)
        batch = DataCollatorForPreference(0)(pairs)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        trl = out.log_probs.sum(1).view(2, -1).T.numpy()
    return {
        "ours": float(np.abs(flat - expected).max()),
        "trl": float(np.abs(trl - expected).max()),
        "apart": float(np.abs(flat - trl).max()),
        "of": float(np.abs(expected).max()),
    }


if __name__ == "__main__":
    main()
