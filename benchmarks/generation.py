"""How many useful tokens a CPU-second gives: the embedded engine against transformers' own ways to generate.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --out generation.json

One random Qwen2 model, the same prompt ids, n samples a prompt at temperature 1, the same end tokens. A token is useful
if it belongs to a completion (the end token too); padding after a row's end is not. Ways are run in turn, round by
round, in one process; CPU-seconds of the whole process count. Greedy completions are compared first: all ways that
support it must give the same ids. The random model ends a completion at each token with a fixed chance, so lengths are
geometric and cut at max_tokens; `--ends 0` gives completions of one length, where slots refilled early can't help.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from machine import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from align.core.engines.base import SamplingParams
from align.core.engines.transformers_engine import TransformersEngine

VOCABULARY = 768
CONTINUOUS = "generate_batch (continuous)"
SLOW = {CONTINUOUS}
"""Ways that get a quarter of the prompts, so that the whole stays under two minutes."""
Way = Callable[[list[list[int]], int, bool], list[list[int]]]


def make_model(hidden: int, layers: int, ends: int) -> Any:
    """A random tied Qwen2; the last `ends` ids of the vocabulary end a completion."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=list(range(VOCABULARY - ends, VOCABULARY)) or None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=0)
    return model


def make_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.add_tokens([f"w{i}" for i in range(VOCABULARY - len(alphabet))])
    return tokenizer


def align_way(model: Any, max_tokens: int, slots: int) -> Way:
    engine = TransformersEngine(model, make_tokenizer(), slots=slots, fingerprint="benchmark")

    def run(prompts: list[list[int]], n: int, greedy: bool) -> list[list[int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0 if greedy else 1.0)
        out: dict[tuple[int, int], list[int]] = {}
        for number, index, completion in engine.sample(prompts, n, params):
            out[number, index] = list(completion.token_ids)
        return [out[key] for key in sorted(out)]

    return run


def _useful(model: Any, ids: list[int]) -> list[int]:
    """Up to and with the first end token."""
    ends = set(model.generation_config.eos_token_id or ())
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def generate_way(model: Any, max_tokens: int, batch: int, **settings: Any) -> Way:
    def run(prompts: list[list[int]], n: int, greedy: bool) -> list[list[int]]:
        out: list[list[int]] = []
        for at in range(0, len(prompts), batch):
            part = prompts[at : at + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "num_return_sequences": n}
            rows = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, **how, **settings)
            if greedy:
                rows = rows.repeat_interleave(n, 0)
            out += [_useful(model, row) for row in rows[:, width:].tolist()]
        return out

    return run


def continuous_way(model: Any, max_tokens: int) -> Way:
    def run(prompts: list[list[int]], n: int, greedy: bool) -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=not greedy,
            top_k=0 if not greedy else 50,
            eos_token_id=model.generation_config.eos_token_id or -1,
            pad_token_id=0,
        )
        # Pages and blocks chosen for short sequences on a CPU; the defaults are many times slower here.
        tuned = ContinuousBatchingConfig(
            page_size=32, num_blocks=2048, max_batch_tokens=512, allow_block_sharing=False, use_cuda_graph=False
        )
        inputs = [p for p in prompts for _ in range(n)]
        results = model.generate_batch(inputs, generation_config=config, continuous_batching_config=tuned)
        ordered = sorted(results.values(), key=lambda r: int(r.request_id.split("_")[-1]))
        return [_useful(model, list(r.generated_tokens)) for r in ordered]

    return run


def measure(hidden: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs every way on one model size; returns figures by way."""
    model = make_model(hidden, 4, args.ends)
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 256) for _ in range(rng.randint(25, 70))] for _ in range(args.prompts)]
    ways: dict[str, Way] = {
        "align": align_way(model, args.max_tokens, args.slots),
        "generate, 16 prompts a batch": generate_way(model, args.max_tokens, 16),
        "generate, static cache": generate_way(
            model, args.max_tokens, 16, cache_implementation="static", disable_compile=True
        ),
    }
    if args.continuous:
        ways[CONTINUOUS] = continuous_way(model, args.max_tokens)
    expected = ways["align"](prompts[:4], 1, True)
    figures: dict[str, Any] = {}
    for name, way in list(ways.items()):
        try:
            same = way(prompts[:4], 1, True) == expected
        except Exception as problem:  # a way that this version can't run here is left out, and said
            print(f"{name}: left out: {type(problem).__name__}: {problem}", file=sys.stderr)
            del ways[name]
            continue
        figures[name] = {"greedy_ids_equal": same, "tokens": [], "cpu_s": []}
    others = [name for name in ways if name != "align"]
    for round_number in range(args.rounds):
        for name in [w for other in others for w in ("align", other)]:  # A B A C A D: the machine's mood is shared
            part = prompts[: len(prompts) // 4] if name in SLOW else prompts
            torch.manual_seed(round_number)
            start = time.process_time()
            tokens = sum(map(len, ways[name](part, args.samples, False)))
            figures[name]["cpu_s"].append(round(time.process_time() - start, 3))
            figures[name]["tokens"].append(tokens)
    for figure in figures.values():
        speeds = [t / s for t, s in zip(figure["tokens"], figure["cpu_s"], strict=True)]
        figure["tokens_per_cpu_s"] = round(statistics.median(speeds))
        figure["best_tokens_per_cpu_s"] = round(max(speeds))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ends", type=int, default=26, help="ids of 768 that end a completion")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="of every way; align runs once beside each other way")
    parser.add_argument("--no-continuous", dest="continuous", action="store_false")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "results": {},
    }  # fmt: skip
    print(
        f"{args.prompts} prompts x {args.samples} samples, at most {args.max_tokens} new tokens, 4 layers, one process"
    )
    for hidden in args.hidden:
        figures = measure(hidden, args)
        report["results"][f"hidden {hidden}"] = figures
        base = max(f["tokens_per_cpu_s"] for name, f in figures.items() if name.startswith("generate, "))
        print(f"\nhidden {hidden:<28} tokens  CPU-s (median)  tokens/CPU-s   best  x generate's best  greedy ids")
        for name, f in figures.items():
            print(
                f"{name:<35} {round(statistics.mean(f['tokens'])):>6}  {statistics.median(f['cpu_s']):>14.2f}"
                f"  {f['tokens_per_cpu_s']:>12}  {f['best_tokens_per_cpu_s']:>5}  {f['tokens_per_cpu_s'] / base:>17.2f}"
                f"  {'equal' if f['greedy_ids_equal'] else 'DIFFER'}"
            )
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
