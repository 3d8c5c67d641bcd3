"""What does the completion cache cost: time, memory, disk, and what does it give back after a kill?

    python benchmarks/cache.py [--out FILE.json]

A scripted engine hands out ready completions, so nearly all that is measured is the machinery. Every run is a process
of its own. First 100,000 prompts x 8 samples: without a cache, into an empty one, from the full one. Then the cost of
writing by itself: pairs of shorter runs, without and with a cache, one after the other, for short and long completions;
the difference is what a completion costs more, in processor time and in wall time less what other processes took. It
must stay under 5% of a run that samples 2,000 a second, which is 25 microseconds; the memory under 200 MB at 8 million
completions. The exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import machine

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.order import in_order
from align.core.engines.scripted import ScriptedEngine

PER_SECOND = 2000
MOST_SHARE = 0.05
MOST_MB = 200
MEMORY_AT = 8_000_000
SAMPLES = 8


def one_run(prompts: int, tokens: int, cache: str) -> dict[str, Any]:
    """Samples all prompts once; `cache` is the file, or nothing for a run without one."""
    ids, text = tuple(range(tokens)), "word " * tokens

    def answer(prompt: Prompt, index: int) -> Completion:
        return Completion(f"{prompt} {index} {text}", ids, "stop")

    def questions() -> Iterator[Prompt]:
        for number in range(prompts):
            yield f"This is the instruction number {number}, of about the length of one in GSM8K. " * 3

    engine: Engine = ScriptedEngine(answer, ahead=64, fingerprint="benchmark")
    began = time.monotonic(), time.process_time(), waited_s()
    cached = CachedEngine(engine, cache) if cache else None
    opened = time.process_time()
    count = 0
    for _, completions in in_order(cached or engine, questions(), SAMPLES, SamplingParams()):
        count += len(completions)
    (cached or engine).close()
    return {
        "completions": count,
        "wall_s": round(time.monotonic() - began[0], 3),
        "own_wall_s": round(time.monotonic() - began[0] - (waited_s() - began[2]), 3),
        "cpu_s": round(time.process_time() - began[1], 3),
        "opening_cpu_s": round(opened - began[1], 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "from_cache": cached.hits if cached else 0,
    }


def waited_s() -> float:
    """How long this process has waited for a core that others had; 0 where the system doesn't tell."""
    told = Path("/proc/self/schedstat")
    return int(told.read_text().split()[1]) / 1e9 if told.exists() else 0.0


def in_a_process(prompts: int, tokens: int, cache: Path | str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one-run", str(prompts), str(tokens), str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def whole(prompts: int, tokens: int, folder: Path) -> dict[str, Any]:
    """The large runs: without a cache, into an empty one, from the full one."""
    cache = folder / "completions"
    without = in_a_process(prompts, tokens, "")
    writing = in_a_process(prompts, tokens, cache)
    size = cache.stat().st_size
    again = in_a_process(prompts, tokens, cache)
    cache.unlink()
    completions = writing["completions"]
    assert again["from_cache"] == completions and writing["from_cache"] == 0, "the second run found all"
    return {
        "prompts": prompts, "samples": SAMPLES, "completions": completions, "tokens_each": tokens,
        "without_cache": without, "into_empty_cache": writing, "from_full_cache": again,
        "size_mb": round(size / 1e6, 1), "bytes_each": round(size / completions, 1),
        "memory_mb": round(max(run["peak_mb"] for run in (writing, again)) - without["peak_mb"], 1),
        "opening_s_per_million": round(again["opening_cpu_s"] / completions * 1e6, 3),
    }  # fmt: skip


def pairs(rounds: int, prompts: int, tokens: int, folder: Path) -> dict[str, Any]:
    """What writing costs a completion, in microseconds: runs without and with a cache, in turn.

    Other processes can only make a run slower, so the least of each kind is nearest to the truth. `own_wall` is wall
    time without that in which they had the cores: processor time and waiting for the disk.
    """
    clocks = ("cpu", "own_wall", "wall")
    runs: dict[str, list[float]] = {f"{clock}_{how}": [] for clock in clocks for how in ("without", "with")}
    for number in range(rounds):
        cache = folder / f"pair-{number}"
        for how, where in (("without", ""), ("with", cache)):
            done = in_a_process(prompts, tokens, where)
            for clock in clocks:
                runs[f"{clock}_{how}"].append(round(done[f"{clock}_s"] / done["completions"] * 1e6, 2))
        cache.unlink()
    found: dict[str, Any] = {"tokens_each": tokens, "completions_each_run": prompts * SAMPLES, "us_each": runs}
    for clock in clocks:
        without, written = runs[f"{clock}_without"], runs[f"{clock}_with"]
        found[f"{clock}_us"] = round(min(written) - min(without), 2)
        found[f"{clock}_us_median"] = round(statistics.median(written) - statistics.median(without), 2)
        found[f"{clock}_share_at_2000_a_second"] = round(found[f"{clock}_us"] * PER_SECOND / 1e6, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000, help="of the large runs; 8 samples each")
    parser.add_argument("--tokens", type=int, default=100, help="of each completion of the large runs")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs, for each length")
    parser.add_argument("--pair-prompts", type=int, default=1000, help="of each run of a pair; 8 samples each")
    parser.add_argument("--folder", type=Path, default=None, help="where the caches lie while it runs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--one-run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_run:
        prompts, tokens, cache = args.one_run
        print(json.dumps(one_run(int(prompts), int(tokens), cache)))
        return
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        report["whole"] = large = whole(args.prompts, args.tokens, folder)
        report["writing"] = [pairs(args.rounds, args.pair_prompts, tokens, folder) for tokens in (args.tokens, 500)]
    print(f"{large['prompts']:,} prompts x {SAMPLES} samples of {large['tokens_each']} tokens")
    for name in ("without_cache", "into_empty_cache", "from_full_cache"):
        run = large[name]
        print(f"  {name:<17} {run['wall_s']:7.1f} s, {run['cpu_s']:7.1f} CPU-s, peak {run['peak_mb']:.0f} MiB")
    print(f"  on disk {large['size_mb']:,.0f} MB, {large['bytes_each']:.0f} bytes each")
    print(f"  opening {large['opening_s_per_million']:.2f} CPU-s a million")
    bars = {}
    for each in report["writing"]:
        for clock in ("cpu", "own_wall"):
            print(
                f"writing, {each['tokens_each']} tokens, {clock}: {each[f'{clock}_us']:.1f} us a completion (least; "
                f"{each[f'{clock}_us_median']:.1f} between medians of {args.rounds}), "
                f"{each[f'{clock}_share_at_2000_a_second']:.1%} at 2,000 a second"
            )
            name = f"writing {each['tokens_each']} tokens, {clock}, under {MOST_SHARE:.0%}"
            bars[name] = each[f"{clock}_share_at_2000_a_second"] < MOST_SHARE
    at_8_million = large["memory_mb"] / large["completions"] * MEMORY_AT
    report["memory_mb_at_8_million"] = round(at_8_million, 1)
    print(f"memory for the cache {large['memory_mb']:.1f} MiB, so {at_8_million:.0f} MiB at 8 million completions")
    bars["memory at 8 million"] = at_8_million < MOST_MB
    report["bars"] = bars
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, met in bars.items():
        print(f"{'met' if met else 'MISSED'}: {name}")
    sys.exit(0 if all(bars.values()) else 1)


if __name__ == "__main__":
    main()
