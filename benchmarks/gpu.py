"""SFT and DPO on a GPU at the shapes of Qwen2.5, beside plain TRL: tokens per second, MFU, peak memory.

    python benchmarks/gpu.py --out gpu.json                              # 0.5b, 1.5b and 7b, on the first GPU
    python benchmarks/gpu.py --shapes tiny --device cpu --out /tmp/x     # does it run? No GPU needed, no figure meant

Random weights and random words, for neither changes the speed; ragged rows (log-normal lengths); ids from the project's
own small tokenizer, in the vocabulary of the shape. Ours are the stages as users run them. TRL's trainers get the same
ids, weights, batches and optimizer, once as they come and once with the flags found best here: no activation
checkpointing, no padding (FlashAttention where it is installed), reference log-probabilities beforehand. Each run is a
process of its own; the first steps are left out. `tokens` are real ones: no padding, and of a pair the prompt once.
MFU counts 6 FLOP a matrix weight and token, and attention; its peak is 989 TFLOP/s (H100, H200; bf16, dense).
The 7b shape is trained by LoRA (rank 64) unless `--full` is given: all its weights with AdamW need 112 GB before any
activation. TRL's DPO takes text, so there the ids go through the tokenizer once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "0.5b": {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
"""Of Qwen2.5, from their published config files; tiny is for trying the script."""

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""bf16 FLOP/s without sparsity, from the makers' data sheets."""

WHO = ("ours", "trl", "trl_best")
LEFT_OUT = 3
"""First steps that aren't timed: memory is being laid out, kernels are being chosen."""


def main() -> None:
    """Runs every case in a process of its own and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b", "7b"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16, help="rows (pairs: half as many) of a step")
    parser.add_argument("--micro", type=int, default=4, help="rows at once (pairs: half as many)")
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--full", action="store_true", help="train all weights of the 7b shape")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_case(**given.case)), flush=True)
        return
    found: list[dict[str, Any]] = []
    longest = 200 if given.shapes == ["tiny"] else given.longest
    with tempfile.TemporaryDirectory() as folder:
        for shape in given.shapes:
            model = Path(folder) / shape
            for stage in given.stages:
                for who in given.who:
                    case = {
                        "who": who, "stage": stage, "shape": shape, "folder": str(model), "device": given.device,
                        "steps": given.steps, "rows": given.rows, "micro": given.micro, "longest": longest,
                        "lora": 64 if shape == "7b" and not given.full else 0,
                    }  # fmt: skip
                    found.append(_in_a_process(case))
                    print(_line(found[-1]), flush=True)
                    about = {"machine": machine() | {"gpu": found[0].get("gpu")}, "date": str(date.today())}
                    given.out.write_text(json.dumps(about | {"settings": vars_of(given), "cases": found}, indent=1))


def vars_of(given: argparse.Namespace) -> dict[str, Any]:
    """The settings, as they go into the result."""
    return {name: value for name, value in vars(given).items() if name not in ("out", "case")}


def _in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    what = {name: case[name] for name in ("who", "stage", "shape", "lora")}
    if done.returncode:
        return what | {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    return what | json.loads(done.stdout.strip().splitlines()[-1])


def _line(case: Mapping[str, Any]) -> str:
    name = f"{case['shape']:>5} {case['stage']} {case['who']:<9}"
    if "failed" in case:
        return f"{name} failed: {case['failed']}"
    mfu = "" if case["mfu"] is None else f"  MFU {case['mfu']:.1%}"
    return (
        f"{name} {case['tokens_per_second']:>10,.0f} tokens/s{mfu}  {case['peak_gb']:.1f} GB  loss {case['loss']:.4f}"
    )


def run_case(
    who: str,
    stage: str,
    shape: str,
    folder: str,
    device: str,
    steps: int,
    rows: int,
    micro: int,
    longest: int,
    lora: int,
) -> dict[str, Any]:
    """One training of some steps: what it did a second, and how much memory it took."""
    import torch

    model = Path(folder)
    if not model.exists():
        _make_model(shape, model)
    pairs = stage == "dpo"
    data = _rows(model, steps * (rows // 2 if pairs else rows), longest, pairs)
    clock = Clock(device)
    train = _ours if who == "ours" else _trl
    at_once = (rows // 2, micro // 2) if pairs else (rows, micro)
    loss = train(
        stage, model, data, *at_once, device, lora, clock, **({} if who == "ours" else {"best": who == "trl_best"})
    )
    tokens = sum(sum(len(part) for part in row.values()) for row in data["ids"])
    timed = clock.timed(steps)
    per_step = tokens / steps
    speed = per_step * len(timed) / sum(timed)
    name = torch.cuda.get_device_name() if device == "cuda" else None
    peak = next((flops for gpu, flops in PEAK.items() if name and gpu in name), None)
    flops = _flops_a_token(SHAPES[shape], np.mean([sum(len(p) for p in row.values()) for row in data["ids"]]), lora > 0)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_rss()
    return {
        "tokens_per_second": speed,
        "seconds_a_step": sum(timed) / len(timed),
        "tokens_a_step": per_step,
        "mfu": None if peak is None else speed * flops / peak,
        "peak_gb": memory / 1e9,
        "loss": loss,
        "gpu": name,
    }


class Clock:
    """The moments at which steps ended, and the Progress of a stage."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.moments: list[float] = []
        self.counting = False

    def tick(self) -> None:
        """One step more has ended."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    def timed(self, steps: int) -> list[float]:
        """Seconds of each step but the first ones."""
        return [float(s) for s in np.diff(self.moments[-steps:])][LEFT_OUT - 1 :]

    def start(self, total: int | None, unit: str) -> None:
        """A count begins; that of the steps is the one that is timed."""
        self.counting = unit == "steps"

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """One step, where steps are counted."""
        if self.counting and by == 1:
            self.tick()

    def say(self, line: str) -> None:
        """Not here."""


def _ours(
    stage: str, model: Path, data: Mapping[str, Any], rows: int, micro: int, device: str, lora: int, clock: Clock
) -> float:
    from align.core.records import Kind
    from align.core.stage import Tools
    from align.core.store import ModelRef, Table
    from align.stages import load

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        table = Table([data["file"]], "random words", f"random-{rows}")
        policy = ModelRef(str(model), Kind.MODEL, model.name, model.name)
        common = {
            "learning_rate": 1e-5, "epochs": 1.0, "global_batch_size": rows, "max_length": 10**6, "weight_decay": 0.0,
            "lora_rank": lora, "warmup_ratio": 0.0,
        }  # fmt: skip
        found = load(stage)
        inputs = {"sft": {"model": policy, "demonstrations": table}, "dpo": {"policy": policy, "preferences": table}}
        speed = {"device": device, "micro_batch_size": micro, "save_every": 10**6}
        tools = Tools(0, {}, clock, out / "work", out, speed)
        (out / "work").mkdir()
        found.run(found.config(**common), inputs[stage], tools)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float(next(line["loss"] for line in lines if "loss" in line))


def _trl(
    stage: str,
    model: Path,
    data: Mapping[str, Any],
    rows: int,
    micro: int,
    device: str,
    lora: int,
    clock: Clock,
    best: bool,
) -> float:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import is_flash_attn_2_available
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    flash = device == "cuda" and is_flash_attn_2_available()
    attention = "flash_attention_2" if flash and best else "sdpa"
    losses: list[float] = []

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "learning_rate": 1e-5, "num_train_epochs": 1, "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": rows // micro, "max_length": None, "logging_steps": 1, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "use_cpu": device == "cpu", "bf16": device == "cuda",
            "gradient_checkpointing": not best,
        }  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
        adapters = LoraConfig(r=lora, lora_alpha=32, target_modules="all-linear") if lora else None
        if stage == "sft":
            dataset = Dataset.from_list(
                [
                    {
                        "input_ids": [*row["prompt_ids"], *row["chosen_ids"]],
                        "labels": [-100] * len(row["prompt_ids"]) + list(row["chosen_ids"]),
                    }
                    for row in data["ids"]
                ]
            )
            more = {"padding_free": True} if best and flash else {}
            arguments = SFTConfig(**common, **more, dataset_kwargs={"skip_prepare_dataset": True})
            trainer: Any = SFTTrainer(
                policy, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters
            )
        else:
            decode = tokenizer.decode
            dataset = Dataset.from_list(
                [
                    {name[:-4]: decode(ids, skip_special_tokens=False) for name, ids in row.items()}
                    for row in data["ids"]
                ]
            )
            arguments = DPOConfig(**common, precompute_ref_log_probs=best)
            reference = None
            if not lora:
                reference = AutoModelForCausalLM.from_pretrained(
                    model, dtype=torch.float32, attn_implementation=attention
                )
            trainer = DPOTrainer(
                policy, reference, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters
            )
        trainer.add_callback(Ticks())
        trainer.train()
    return losses[0]


def _make_model(shape: str, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    import align.tiny

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, rope_theta=1e6)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(align.tiny.__file__).parent / "base").save_pretrained(folder)


def _rows(model: Path, count: int, longest: int, pairs: bool) -> dict[str, Any]:
    """Random words in ragged rows: as a table for the stages, and as the ids that its rows have."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from align.core.chat import encode_pairs

    rng = np.random.default_rng(0)
    words = ["sum", "list", "the", "of", "number", "and", "word", "a", "box", "apples", "how", "many", "green"]

    def text(tokens: float) -> str:
        return " ".join(rng.choice(words, size=max(2, int(tokens))))

    # a log-normal of median a sixth of the longest: mean about a quarter, few near the longest
    lengths = np.minimum(rng.lognormal(np.log(longest / 6), 0.8, count), 0.6 * longest)
    rows = []
    for number, length in enumerate(lengths):
        prompt = [{"role": "user", "content": text(length / 3)}]
        sides = [[{"role": "assistant", "content": text(length / 3)}] for _ in range(2)]
        rows.append(
            {"prompt_id": str(number), "split": "train", "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if pairs else ("prompt_ids", "chosen_ids")
    ids = [dict(zip(names, three, strict=False)) for three in encode_pairs(tokenizer, rows)]
    file = model / f"{'pairs' if pairs else 'rows'}.parquet"
    if not pairs:
        rows = [{**row, "completion": row.pop("chosen")} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return {"file": file, "ids": ids}


def _flops_a_token(shape: Mapping[str, Any], length: float, lora: bool) -> float:
    """Training FLOP: 6 for each weight of a matrix (the head among them; 4 with LoRA, whose base has no gradient of
    its own), and 6 L T d for causal attention over rows of T tokens."""
    d, layers, heads, kv = (
        shape[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    each = d * d * 2 + 2 * d * (d // heads) * kv + 3 * d * shape["intermediate_size"]
    weights = layers * each + d * shape["vocab_size"]
    return (4 if lora else 6) * weights + 6 * layers * length * d


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
