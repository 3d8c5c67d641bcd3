"""The time of an optimizer step: torch's AdamW and the Online Merging Optimizer, on the same parameters.

    python benchmarks/merging_step.py [--out FILE.json] [--device cpu|cuda] [--models 3M 30M] [--repeats 5] [--steps 20]

Parameters have the shapes of a Qwen2 model (biases and norms among them) and fixed random gradients; nothing else is
computed. One process, one thread on a CPU, all optimizers in turn (A B C A B C ...), each figure the median over the
repeats of the mean over the steps, after steps that warm up; CPU seconds on a CPU, on the clock on a GPU. Weight decay
is off, as `dpo` has it. Tau is random.

adamw default    torch.optim.AdamW as it comes (foreach on a GPU, a loop over the tensors on a CPU)
adamw fused      torch.optim.AdamW(fused=True), which transformers and we use by default
ondare, onties   the paper's settings (keep 0.01, alpha 1e-7), in both variants, and OnDARE every 10 steps

`extra_bytes`: what an optimizer holds beyond AdamW's state, a parameter (on a GPU: also its peak above AdamW's).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import torch
from machine import machine

from align.train.merging import Merging, MergingAdamW

# hidden, layers, MLP, keys and values, vocabulary
MODELS = {
    "3M": (256, 3, 768, 64, 2048),
    "30M": (512, 8, 1408, 128, 8192),
    "0.5B": (896, 24, 4864, 128, 151_936),
    "1.5B": (1536, 28, 8960, 256, 151_936),
}
BAR = 2.0
"""Times AdamW's step, at 3M."""


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters; embeddings are tied."""
    hidden, layers, wide, narrow, vocabulary = MODELS[model]
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    for layer in range(layers):
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
            found[f"{layer}.{name}.weight"], found[f"{layer}.{name}.bias"] = (rows, hidden), (rows,)
        found[f"{layer}.o.weight"] = (hidden, hidden)
        found[f"{layer}.gate.weight"] = found[f"{layer}.up.weight"] = (wide, hidden)
        found[f"{layer}.down.weight"] = (hidden, wide)
        found[f"{layer}.norm1.weight"] = found[f"{layer}.norm2.weight"] = (hidden,)
    return found


def optimizers(named: list[tuple[str, Any]], scale: float) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """What is compared."""
    own = dict(named)

    def tau(name: str) -> torch.Tensor:
        return scale * torch.randn_like(own[name])

    def ours(**settings: Any) -> Callable[[], torch.optim.Optimizer]:
        return lambda: MergingAdamW(named, Merging(**settings), tau)

    parameters = [parameter for _, parameter in named]
    return {
        "adamw default": lambda: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        "adamw fused": lambda: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True),
        "ondare, code": ours(method="ondare"),
        "ondare, paper": ours(method="ondare", as_in="paper"),
        "ondare, every 10": ours(method="ondare", every=10),
        "onties, code": ours(method="onties"),
        "onties, paper": ours(method="onties", as_in="paper"),
    }


def measure(model: str, device: str, repeats: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of each, and their ratios."""
    torch.manual_seed(0)
    named = [
        (name, torch.nn.Parameter(0.02 * torch.randn(shape, device=device))) for name, shape in shapes(model).items()
    ]
    for _, parameter in named:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    count = sum(parameter.numel() for _, parameter in named)
    times: dict[str, list[float]] = {}
    extra: dict[str, float] = {}
    big = count > 10**8
    made = {} if big else {name: make() for name, make in optimizers(named, 1e-3).items()}
    for _ in range(repeats):
        for name, make in optimizers(named, 1e-3).items():
            optimizer = made.get(name) or make()  # a large model's state is there once at a time
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                optimizer.step()
            since = now(device)
            for _ in range(steps):
                optimizer.step()
            times.setdefault(name, []).append((now(device) - since) / steps * 1000)
            if device != "cpu":
                extra[name] = torch.cuda.max_memory_allocated() / count
            del optimizer
    took = {name: statistics.median(found) for name, found in times.items()}
    fused, default = took["adamw fused"], took["adamw default"]
    return {
        "parameters": count,
        "tensors": len(named),
        "milliseconds": {name: round(value, 3) for name, value in took.items()},
        "times_fused": {name: round(value / fused, 2) for name, value in took.items()},
        "times_default": {name: round(value / default, 2) for name, value in took.items()},
        "spread": {name: [round(min(found), 3), round(max(found), 3)] for name, found in times.items()},
    } | ({"peak_bytes_a_parameter": {name: round(value, 2) for name, value in extra.items()}} if extra else {})


def now(device: str) -> float:
    """Seconds: of this thread on a CPU, which other work on the machine doesn't count in; on the clock on a GPU."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["3M", "30M"], choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(), "torch": torch.__version__}
    if given.device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    found["models"] = {}
    for model in given.models:
        result = measure(model, given.device, given.repeats, given.steps)
        found["models"][model] = result
        print(f"{model}: {result['parameters']:,} parameters in {result['tensors']} tensors")
        for name, value in result["milliseconds"].items():
            ratios = f"{result['times_fused'][name]:5.2f} x fused  {result['times_default'][name]:5.2f} x default"
            print(f"  {name:18} {value:9.2f} ms  {ratios}")
    first = found["models"][given.models[0]]
    worst = {
        against: max(ratio for name, ratio in first[f"times_{against}"].items() if name.startswith("on"))
        for against in ("default", "fused")
    }
    found["bar"] = {"times": BAR, "worst": worst, "holds": {name: ratio <= BAR for name, ratio in worst.items()}}
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
