"""What does a request to a server cost this machine, in CPU time?

Compares the engine of kind openai with the official client alone, which asks for the same samples at the same
concurrency and does no more. The server is a process of its own on loopback, whose time does not count; the ways take
turns within one run, so that a busy machine slows them all.

    python benchmarks/openai_requests.py [--requests 1000] [--rounds 5] [--concurrency 32] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
from machine import machine

from align.core.engines.base import SamplingParams
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.openai_settings import OpenAISettings
from align.core.records import Messages

ROOT = Path(__file__).parents[1]
SERVER = """
import sys
from tests.core.engines.failing_server import FailingServer
with FailingServer() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def prompts(count: int) -> list[Messages]:
    return [[{"role": "user", "content": f"question {number} " + "word " * 200}] for number in range(count)]


def engine_way(url: str, count: int, concurrency: int) -> None:
    engine = OpenAIEngine(OpenAISettings(model="m", base_url=url, concurrency=concurrency))
    found = sum(1 for _ in engine.sample(prompts(count), 1, SamplingParams(max_tokens=16)))
    engine.close()
    assert found == count


def client_way(url: str, count: int, concurrency: int) -> None:
    async def run() -> None:
        room = asyncio.Semaphore(concurrency)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(messages: Any) -> str:
                async with room:
                    answer = await client.chat.completions.create(
                        model="m", messages=messages, max_tokens=16, temperature=1.0, top_p=1.0, seed=1
                    )
                    return answer.choices[0].message.content or ""

            found = await asyncio.gather(*(ask(messages) for messages in prompts(count)))
        assert all(found)

    asyncio.run(run())


WAYS = {"engine": engine_way, "official client alone": client_way}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout and server.stdin
    url = server.stdout.readline().strip()
    cpu_ms: dict[str, list[float]] = {name: [] for name in WAYS}
    for way in WAYS.values():  # imports and the like
        way(url, 32, args.concurrency)
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            began = time.process_time()
            way(url, args.requests, args.concurrency)
            cpu_ms[name].append((time.process_time() - began) / args.requests * 1000)
    server.stdin.close()
    server.wait()
    figures = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"openai": openai.__version__},
        "requests": args.requests,
        "rounds": args.rounds,
        "concurrency": args.concurrency,
        "cpu_ms_per_request": {
            name: {"median": round(statistics.median(values), 2), "least": round(min(values), 2)}
            for name, values in cpu_ms.items()
        },
    }
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
