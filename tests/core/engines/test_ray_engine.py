"""Sampling on a local Ray cluster: a real one, with worker processes that are killed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.engines import Engine, Prompt, SamplingParams
from align.core.engines.build import RaySettings
from align.core.engines.ray_engine import RayEngine
from align.core.errors import EngineError, RecipeError
from align.core.store import Table
from align.pipeline import run
from align.recipe import load_recipe
from tests.core.engines import test_contract as contract
from tests.core.engines.ray_parts import Settings, make

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
BASE = ROOT / "align" / "tiny" / "base"
PARAMS = SamplingParams(max_tokens=12, seed=3)
LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on these Ray stays on the loopback address
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # in the environment, or Ray writes one into the home folder
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


CLUSTER = """
import ray, sys
ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=80_000_000,
    _temp_dir=sys.argv[1],
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
_process: subprocess.Popen[str] | None = None


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a running cluster on the loopback, with room for two workers; it ends with us."""
    global _process
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray isn't installed")
    folder = tempfile.mkdtemp(prefix="align-ray-")  # short: Ray puts sockets there
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOCAL.items():
            patch.setenv(name, value)
        _process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert _process.stdout
        address = _process.stdout.readline().strip()
        assert address.startswith("127.0.0.1:")
        yield address
        _process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _engine(address: str, what: str = "words", **settings: Any) -> RayEngine:
    cluster = RaySettings(**{"address": address, "workers": 2, "block": 4, **settings})
    return RayEngine(make, Settings(what=what), cluster, "words")


@pytest.fixture(scope="module")
def words(cluster: str) -> Iterator[RayEngine]:
    made = _engine(cluster, cpus=0)
    yield made
    made.close()


@pytest.fixture
def engine(words: RayEngine) -> RayEngine:
    return words


# The contract, through two workers with scripted engines.
for _name, _test in vars(contract).items():
    if _name.startswith("test_"):
        globals()[_name] = _test


def _all(engine: Engine, prompts: Any, n: int, params: SamplingParams, first: int = 0) -> Any:
    results = list(engine.sample(iter(prompts), n, params, first))
    table = {(number, index): done for number, index, done in results}
    assert len(table) == len(results), "a sample came twice"
    return table


def _samplers(at: str = "") -> set[int]:
    """The processes of the cluster's workers; `at` a method, those that run it now."""
    import psutil

    found = psutil.Process(_process.pid if _process else None).children(recursive=True)
    return {
        child.pid
        for child in found
        if child.is_running()
        and child.status() != psutil.STATUS_ZOMBIE
        and f"_Sampler{at}" in " ".join(child.cmdline()[:1])
    }


def test_a_killed_workers_samples_are_made_again_and_another_takes_its_place(cluster: str) -> None:
    """60 prompts × 2 at 50 ms each; when a sixth has come, one of two workers is killed. Each sample comes once,
    and the pool samples on with two."""
    prompts: list[Prompt] = [f"prompt {i}" for i in range(60)]
    want = _all(make(Settings()), prompts, 2, PARAMS)
    before = _samplers()
    engine = _engine(cluster, "slow")
    try:
        got = {}
        killed = 0
        for number, index, done in engine.sample(iter(prompts), 2, PARAMS):
            assert (number, index) not in got
            got[number, index] = done
            if not killed and len(got) >= 20 and len(own := _samplers(".sample") - before) == 2:
                killed = min(own)
                os.kill(killed, signal.SIGKILL)
                assert len(got) < 100
        assert killed and got == want
        assert _all(engine, prompts[:20], 2, PARAMS) == {key: done for key, done in want.items() if key[0] < 20}
        assert len(_samplers() - before - {killed}) == 2
    finally:
        engine.close()


def test_workers_are_kept_between_calls_and_a_call_that_is_left_early_stops(engine: RayEngine) -> None:
    deadline = time.monotonic() + 60
    while len(before := _samplers()) != 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # an earlier test's workers are still ending
    slow = engine.sample((f"prompt {i}" for i in range(10**6)), 2, PARAMS)
    next(slow)
    slow.close()
    began = time.monotonic()
    assert len(_all(engine, ["one", "two"], 2, PARAMS)) == 4
    assert time.monotonic() - began < 20
    assert len(before) == 2 and _samplers() == before


def test_two_calls_may_be_open_at_once_and_each_gets_its_own(engine: RayEngine) -> None:
    prompts: list[Prompt] = [f"prompt {i}" for i in range(20)]
    alone = _all(engine, prompts, 2, PARAMS)
    got = {}
    for number, index, done in engine.sample(iter(prompts), 2, PARAMS):
        got[number, index] = done
        if len(got) in (5, 20):
            assert _all(engine, [prompts[number]], 1, PARAMS, index)[0, index] == done
    assert got == alone


def test_a_prompt_that_kills_every_worker_ends_in_an_error_and_not_in_a_loop(cluster: str) -> None:
    engine = _engine(cluster, "dies", workers=1, cpus=0)
    try:
        with pytest.raises(EngineError, match=r"3 workers died one after the other.*run the same command again"):
            _all(engine, ["one", "poison", "two"], 1, PARAMS)
    finally:
        engine.close()


def test_a_head_that_no_longer_answers_is_an_error_before_ray_ends_this_process(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine looks at a port where nothing listens. A head that is really killed would take this process along."""
    monkeypatch.setattr("align.core.engines.ray_engine._LOOK_EVERY_S", 0.1)
    monkeypatch.setattr("align.core.engines.ray_engine._SILENT_S", 0.5)
    engine = _engine(cluster, "slow", workers=1, cpus=0)
    try:
        engine._head = "127.0.0.1:9"
        with pytest.raises(EngineError, match=r"head of the Ray cluster \(127.0.0.1:9\) hasn't answered for 0\.5 s"):
            _all(engine, [f"prompt {i}" for i in range(400)], 1, PARAMS)
    finally:
        engine._silent = None  # so that its worker is ended, which a lost cluster's is not
        engine.close()


def test_what_a_worker_refuses_is_told_with_what_the_cluster_needs(cluster: str) -> None:
    engine = _engine(cluster, "missing", workers=1, cpus=0)
    try:
        with pytest.raises(EngineError, match=r"worker of the Ray cluster: words: no such model folder.*same path"):
            _all(engine, ["one"], 1, PARAMS)
    finally:
        engine.close()


def test_what_is_not_installed_on_a_workers_machine_is_told_at_once(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def make(settings): raise AssertionError('never called')")
    monkeypatch.syspath_prepend(tmp_path)
    missing = importlib.import_module("only_here").make
    engine = RayEngine(missing, Settings(), RaySettings(address=cluster, workers=1, cpus=0), "words")
    try:
        with pytest.raises(EngineError, match=r"No module named 'only_here'; `align` and what its engine needs"):
            _all(engine, ["one"], 1, PARAMS)
    finally:
        engine.close()


def test_a_cluster_without_room_is_an_error_after_the_given_time(cluster: str) -> None:
    engine = _engine(cluster, cpus=64, start_timeout_s=0.5)
    try:
        with pytest.raises(EngineError, match=r"no worker was ready after 0\.5 s.*64 CPU and 0 GPU, the cluster has 2"):
            _all(engine, ["one"], 1, PARAMS)
    finally:
        engine.close()


def test_another_version_of_align_on_a_worker_is_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(cluster, workers=1, cpus=0)
    engine._made_of = (*engine._made_of[:2], "0.0.1")
    try:
        with pytest.raises(EngineError, match=r"here it is 0\.0\.1; install the same on every machine"):
            _all(engine, ["one"], 1, PARAMS)
    finally:
        engine.close()


RECIPE = """
name: small
seed: 4
engines:
  base: {kind: transformers, model: BASE, device: cpu}
steps:
  prompts:
    stage: prompts
    with: {source: {tiny: {families: {math: 60}, seed: 11}}}
  samples:
    stage: reject
    in: {prompts: prompts}
    engines: {sampler: base}
    with: {samples: 2, temperature: 1.0, max_tokens: 96, splits: [train, dev, test]}
"""


def test_a_run_with_a_worker_killed_gives_the_rows_of_one_machine_and_counts_as_the_same_run(
    cluster: str, tmp_path: Path
) -> None:
    """The tiny model, 60 prompts × 2: here, and by `align run` in a process of its own on the running cluster's two
    workers, of which one that samples is killed as soon as the first samples are in the cache."""
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("BASE", str(BASE)))
    run(load_recipe(path, out=tmp_path / "here"))
    before = _samplers()
    on_ray = f"engines.base.ray={json.dumps({'address': cluster, 'workers': 2, 'block': 4})}"
    command = [sys.executable, "-m", "align.cli", "run", str(path), f"out={tmp_path / 'there'}", on_ray]
    there = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cache = tmp_path / "there" / "samples" / "work" / "completions-sampler"
    killed = 0
    while not killed and there.poll() is None:
        time.sleep(0.02)
        if cache.exists() and cache.stat().st_size > 100 and (own := _samplers(".sample") - before):
            killed = min(own)
            os.kill(killed, signal.SIGKILL)
    told, _ = there.communicate()
    assert there.returncode == 0, told
    assert killed, "it was over before a worker could be killed"
    rows = [list(Table.open(tmp_path / out / "samples").rows()) for out in ("here", "there")]
    assert len(rows[0]) == 120 and rows[0] == rows[1]
    one, two = (json.loads((tmp_path / out / "samples" / "manifest.json").read_text()) for out in ("here", "there"))
    assert one["fingerprint"] == two["fingerprint"] and one["engines"] == two["engines"]


def test_settings_are_checked_where_a_recipe_is(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.replace("BASE", str(BASE)))
    for written, words in (
        ("{worker: 2}", "ray.worker: unknown key; did you mean 'workers'"),
        ("{workers: 0}", "ray.workers: expected greater than or equal to 1, found 0"),
        ("{address: 'ray://10.0.0.1:10001'}", "ray.address"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(recipe, [f"engines.base.ray={written}"])


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9"])
def test_where_no_cluster_answers_the_error_says_how_to_start_one(address: str) -> None:
    """In a process of its own, which no test has connected before; RAY_ADDRESS is what `auto` goes by first."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray isn't installed")
    script = (
        "import sys; from align.core.engines.build import RaySettings; from align.core.engines.ray_engine import *\n"
        "from align.core.errors import EngineError\nfrom tests.core.engines.ray_parts import Settings, make\n"
        "try: RayEngine(make, Settings(), RaySettings(address=sys.argv[1]), 'words')\n"
        "except EngineError as problem: print(problem)"
    )
    environment = {**os.environ, **LOCAL, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, address], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert f"ray: no cluster can be reached at '{address}'" in done.stdout, done.stdout + done.stderr
    assert "ray start --head" in done.stdout


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"align-toolkit\[ray\].*on every machine"):
        _engine("auto")


def test_an_address_that_is_none_is_refused_in_plain_words() -> None:
    for address in ("auto", "head:6379", "10.0.0.5:6379", "[::1]:6379"):
        assert RaySettings(address=address).address == address
    for address in ("nowhere", "head:", "http://head:6379", ""):
        with pytest.raises(ValidationError, match="expected auto or host:port"):
            RaySettings(address=address)
