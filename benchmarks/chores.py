"""How well the tiny writer does its chores: the share of answers that are exactly the right one, greedy, by chore.

    python benchmarks/chores.py --model tiny-writer --save benchmarks/results/chores.json

Chores whose right answer is one of many (another instruction, a test, a phrasing) can't be counted so: for them the
share is a lower bound, and the samples that are printed (`--show 2`) say more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from pathlib import Path

from machine import machine

from align.core.engines.base import SamplingParams
from align.core.engines.build import EngineSettings, build_engine
from align.core.engines.cache import in_order
from align.core.records import Kind
from align.core.store import ModelRef
from align.tiny.chores import load_chores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-writer")
    parser.add_argument("--count", type=int, default=50, help="of each chore")
    parser.add_argument("--show", type=int, default=0, help="wrong answers of each chore to print")
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    model = ModelRef.open(options.model, Kind.MODEL)
    engine = build_engine(EngineSettings(model=model.path), generator=options.model)
    shares = {}
    for name, make in load_chores().items():
        rng = random.Random(f"chores/{name}")  # no seed of the training's
        asked = [make(rng) for _ in range(options.count)]
        params = SamplingParams(max_tokens=200, temperature=0.0, seed=0)
        right = shown = 0
        for (messages, answer), (_, (said,)) in zip(
            asked, in_order(engine, (messages for messages, _ in asked), 1, params), strict=True
        ):
            right += said.text == answer
            if said.text != answer and shown < options.show:
                shown += 1
                print(f"--- {name}\n{messages[-1]['content']}\nsaid: {said.text}\nright: {answer}")
        shares[name] = round(100 * right / options.count, 1)
        print(f"{name:<28} {shares[name]:5.1f}%")
    if options.save:
        figures = {
            "what": f"answers that are exactly the right one, in %, of {options.count} of each chore, greedy",
            "model": options.model, "date": datetime.date.today().isoformat(), "machine": machine(), "shares": shares,
        }  # fmt: skip
        options.save.write_text(json.dumps(figures, indent=2, default=vars) + "\n")


if __name__ == "__main__":
    main()
