"""Peak memory of training against the estimate that is shown before it (`align/core/memory.py`), on a CPU.

Each training runs in a process of its own on random demonstrations and a random Qwen2; what counts is the highest
resident size of the process less what it was before the model was loaded, and the estimate is the one that the stage
itself says before its first step.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

RESULT = Path(__file__).parent / "results" / "memory.json"
SHAPES: list[dict[str, Any]] = [
    {"name": "all weights", "d": 256, "layers": 8, "vocabulary": 8192},
    {"name": "all weights, long rows", "d": 128, "layers": 4, "vocabulary": 8192, "words": 900},
    {"name": "all weights, large vocabulary", "d": 128, "layers": 4, "vocabulary": 64000},
    {"name": "LoRA of rank 16", "d": 256, "layers": 8, "vocabulary": 8192, "lora_rank": 16},
    {"name": "checkpointing", "d": 128, "layers": 8, "vocabulary": 8192, "words": 900, "gradient_checkpointing": True},
]


def resident(name: str) -> int:
    """A figure of this process in bytes: VmRSS is what it has, VmHWM the most it had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains two steps of two micro batches in this process, and tells peak and estimate."""
    import torch
    import transformers

    from align.core.stage import Tools
    from align.train import models, sft, sft_trainer
    from tests.train import steps
    from tests.train.tiny import make_tokenizer

    assert models and sft_trainer  # loaded before the memory is looked at, with the libraries that they take
    torch.set_num_threads(1)
    d = shape["d"]
    config = transformers.Qwen2Config(
        vocab_size=shape["vocabulary"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=shape["layers"],
        num_attention_heads=d // 32, num_key_value_heads=d // 64, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    text = "yes " * shape.get("words", 100)
    rows: list[dict[str, Any]] = [
        {"prompt_id": str(i), "split": "train", "prompt": [{"role": "user", "content": "hello"}],
         "completion": [{"role": "assistant", "content": text}]}
        for i in range(16)
    ]  # fmt: skip
    inputs = {"model": steps.policy(folder / "base"), "demonstrations": steps.table(folder / "rows.parquet", rows)}
    speed = {
        "device": "cpu",
        "micro_batch_size": 4,
        "gradient_checkpointing": shape.get("gradient_checkpointing", False),
    }
    tools = Tools(seed=1, engines={}, progress=steps.Silent(), work=folder / "work", out=folder / "out", speed=speed)
    tools.work.mkdir(parents=True)
    settings = sft.Config(epochs=1.0, global_batch_size=8, lora_rank=shape.get("lora_rank", 0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    summary = sft.run(settings, inputs, tools).summary
    peak = resident("VmHWM") - before
    parts = summary["start"]["memory"]
    return {"name": shape["name"], "measured": peak, "estimated": sum(parts.values()), "parts": parts}


def main() -> None:
    found = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if child == 0:
                try:
                    (Path(folder) / "found.json").write_text(json.dumps(measure(shape, Path(folder))))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            one = json.loads((Path(folder) / "found.json").read_text())
        one["ratio"] = round(one["estimated"] / one["measured"], 3)
        print(f"{one['name']:<32} measured {one['measured'] / 2**20:6.0f} MiB, estimated "
              f"{one['estimated'] / 2**20:6.0f} MiB, ratio {one['ratio']:.2f}", flush=True)  # fmt: skip
        found.append(one)
        result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "found": found}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
