from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.core.engines import Completion, Prompt, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError

PARAMS = SamplingParams(max_tokens=16)
PROMPTS: list[Prompt] = [f"prompt {i}" for i in range(10)]


def _answer(prompt: Prompt, index: int) -> str:
    return f"answer {index} to {prompt}"


def _all(engine: CachedEngine, prompts: Any, n: int, params: SamplingParams = PARAMS, first: int = 0) -> Any:
    results = list(engine.sample(iter(prompts), n, params, first))
    table = {(number, index): completion for number, index, completion in results}
    assert len(table) == len(results)
    return table


def test_a_second_run_asks_the_engine_for_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = CachedEngine(ScriptedEngine(_answer), tmp_path / "cache")
    one = _all(first, PROMPTS, 3)
    first.close()
    inner = ScriptedEngine(_answer)
    second = CachedEngine(inner, tmp_path / "cache")
    assert _all(second, PROMPTS, 3) == one
    assert (first.hits, first.misses, second.hits, second.misses, inner.calls) == (0, 30, 30, 0, 0)


def test_only_what_lacks_is_asked_for_whatever_the_pattern(tmp_path: Path) -> None:
    inner = ScriptedEngine(_answer, ahead=4)
    engine = CachedEngine(inner, tmp_path / "cache")
    _all(engine, PROMPTS[::2], 2, first=1)  # indices 1 and 2 of every second prompt
    _all(engine, PROMPTS[::4], 1, first=4)
    assert inner.calls == 10 + 3
    got = _all(engine, PROMPTS, 6)
    assert inner.calls == 60  # each of 10 x 6 samples was made once
    assert got == {
        (p, i): ScriptedEngine(_answer)._complete(PROMPTS[p], i, PARAMS) for p in range(10) for i in range(6)
    }


def test_engine_prompt_parameters_and_index_all_belong_to_the_key(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    engine = CachedEngine(ScriptedEngine(_answer, fingerprint="one"), path)
    chat: Prompt = [{"role": "user", "content": "x"}]
    for prompts, params, first in (
        (["x"], PARAMS, 0),
        ([chat], PARAMS, 0),
        ([[120]], PARAMS, 0),
        (["x"], PARAMS, 1),
        (["x"], SamplingParams(max_tokens=15), 0),
        (["x"], SamplingParams(max_tokens=16, seed=1), 0),
        (["x"], SamplingParams(max_tokens=16, temperature=0.5), 0),
        (["x"], SamplingParams(max_tokens=16, stop=("y",)), 0),
        (["x"], SamplingParams(max_tokens=16, logprobs=True), 0),
    ):
        _all(engine, prompts, 1, params, first)
    assert (engine.hits, engine.misses) == (0, 9)
    engine.close()
    other = CachedEngine(ScriptedEngine(_answer, fingerprint="two"), path)
    _all(other, ["x"], 1)
    assert (other.hits, other.misses) == (0, 1)


def test_failures_are_passed_on_and_never_kept(tmp_path: Path) -> None:
    failing = True

    def answer(prompt: Prompt, index: int) -> str | Completion:
        return Completion("", (), "error", error="busy") if failing and index == 1 else _answer(prompt, index)

    engine = CachedEngine(ScriptedEngine(answer), tmp_path / "cache")
    first = _all(engine, PROMPTS, 3)
    assert sum(c.finish_reason == "error" for c in first.values()) == 10
    failing = False
    second = _all(engine, PROMPTS, 3)
    assert all(c.finish_reason == "stop" for c in second.values())
    assert (engine.hits, engine.misses, engine.failures) == (20, 40, 10)


def test_what_came_before_an_engines_death_is_kept(tmp_path: Path) -> None:
    def dies(prompt: Prompt, index: int) -> str:
        if prompt == "prompt 6":
            raise EngineError("the engine is gone")
        return _answer(prompt, index)

    engine = CachedEngine(ScriptedEngine(dies, fingerprint="x"), tmp_path / "cache")
    with pytest.raises(EngineError, match="gone"):
        _all(engine, PROMPTS, 2)
    engine.close()
    again = CachedEngine(ScriptedEngine(_answer, fingerprint="x"), tmp_path / "cache")
    _all(again, PROMPTS, 2)
    assert (again.hits, again.misses) == (12, 8)


def test_what_is_known_of_the_first_prompts_comes_before_the_engine_is_asked(tmp_path: Path) -> None:
    """Counts go with what was given, so that whoever counts both knows which of the first prompts cost nothing."""
    engine = CachedEngine(ScriptedEngine(_answer), tmp_path / "cache")
    _all(engine, PROMPTS[:6], 2)
    engine.close()
    inner = ScriptedEngine(_answer, ahead=3)
    engine = CachedEngine(inner, tmp_path / "cache")
    seen = []
    for number, _, completion in engine.sample(PROMPTS, 2, PARAMS):
        seen.append((number, engine.hits, engine.misses, inner.calls > 0))
        assert engine.tokens == 5 * len(seen) and len(completion.token_ids) == 5  # "answer 0 to prompt 0"
    assert seen[:12] == [(i // 2, i + 1, 0, False) for i in range(12)]
    assert [(hits, misses) for _, hits, misses, _ in seen[12:]] == [(12, i + 1) for i in range(8)]
    assert engine.sampled_tokens == 8 * 5


def test_hits_are_not_gathered_without_bound_and_order_of_reading_stays_lazy(tmp_path: Path) -> None:
    """20,000 hits of 1 kB each are 20 MB as text; what is in flight at a time is a fraction of that."""
    engine = CachedEngine(ScriptedEngine(lambda prompt, index: "x" * 1000, fingerprint="x"), tmp_path / "cache")
    prompts = [f"{i}" for i in range(2_500)]
    for _ in engine.sample(prompts, 8, PARAMS):
        pass
    tracemalloc.start()
    read = 0

    def counted() -> Iterator[Prompt]:
        nonlocal read
        for prompt in prompts:
            read += 1
            yield prompt

    stream = engine.sample(counted(), 8, PARAMS)
    next(stream)
    assert read < 1000
    assert sum(1 for _ in stream) == 19_999
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert engine.hits == 20_000


_CHILD = """
import os, signal, sys
from align.core.engines import SamplingParams
from align.core.engines.cache import CachedEngine, in_order
from align.core.engines.scripted import ScriptedEngine

path, log, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
made = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def answer(prompt, index):
    if engine.misses == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(made, f"{prompt}/{index}\\n".encode())
    return f"answer {index} to {prompt}"

engine = CachedEngine(ScriptedEngine(answer, ahead=5, fingerprint="x"), path)
for prompt, completions in in_order(engine, (f"prompt {i}" for i in range(40)), 4, SamplingParams()):
    print(prompt, [c.text for c in completions])
engine.close()
"""


def _child(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _CHILD, *map(str, arguments)]
    root = Path(__file__).parents[3]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_after_kill_9_no_finished_sample_is_made_again_and_the_result_is_the_same(tmp_path: Path) -> None:
    """Killed three times while sampling. A sample is finished when the cache has passed it on; the engine may have
    made no other, since a scripted engine makes one at a time: so all that it ever made are the 160, once each."""
    whole = _child(tmp_path / "whole", tmp_path / "whole.log", -1)
    assert whole.returncode == 0, whole.stderr
    for die_at in (7, 50, 33):
        assert _child(tmp_path / "cache", tmp_path / "log", die_at).returncode == -signal.SIGKILL
    last = _child(tmp_path / "cache", tmp_path / "log", -1)
    assert last.stdout == whole.stdout
    made = (tmp_path / "log").read_text().splitlines()
    assert len(made) == len(set(made)) == 160
