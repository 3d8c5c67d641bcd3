"""What the pipeline promises: skip what is unchanged, survive any kill, write over nothing, say what is wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from align.cli import main
from align.core.errors import AlignError, DataError, RunError
from align.core.manifest import Manifest
from align.core.store import Table
from align.fingerprints import step_seed
from align.folders import prepare
from align.lock import holder, locked
from align.pipeline import plan, run
from align.plan import Recipe
from align.recipe import load_recipe, load_stage
from tests import forked

ROOT = Path(__file__).parents[1]
RECIPE = """\
name: t
seed: 3
engines:
  s: {{kind: "tests.fakes:SCRIPTED", model: m, log: {log}, delay_s: {delay}}}
steps:
  make: {{stage: "tests.fakes:MAKE", with: {{count: 20}}}}
  tag: {{stage: "tests.fakes:TAG", in: {{prompts: make}}}}
  sample: {{stage: "tests.fakes:SAMPLE", in: {{prompts: tag}}, engines: {{sampler: s}}, with: {{samples: 3}}}}
  train: {{stage: "tests.fakes:TRAIN", in: {{completions: sample}}, with: {{steps: 8, step_s: {step}, log: {steps}}}}}
  aside: {{stage: "tests.fakes:MAKE", with: {{count: 2}}}}
"""


def write(folder: Path, delay: float = 0.0, step: float = 0.0) -> Path:
    file = folder / "t.yaml"
    file.write_text(RECIPE.format(log=folder / "log", delay=delay, step=step, steps=folder / "steps"))
    return file


def states(file: Path, out: Path, *arguments: str) -> list[str]:
    """The steps that there are to do."""
    return [planned.step.name for planned in plan(load_recipe(file, arguments, out)) if planned.done is None]


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(Table.open(folder).rows())


def sampled(folder: Path) -> Counter[str]:
    """How often each (prompt, sample index) was asked of the engine."""
    return Counter((folder / "log").read_text().splitlines())


def start(file: Path, out: Path, *arguments: str) -> forked.Forked:
    return forked.start("run", file, "--out", out, *arguments, cwd=ROOT)


def wait_for(condition: Callable[[], bool], process: forked.Forked | subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def finish(file: Path, out: Path, *arguments: str) -> None:
    run(load_recipe(file, arguments, out))


def test_a_run_leaves_a_folder_for_each_step_with_a_manifest(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    manifests = run(load_recipe(file, (), out))
    assert [manifest.step for manifest in manifests] == ["make", "tag", "sample", "train", "aside"]
    sample = Manifest.read(out / "sample")
    assert sample is not None
    assert (sample.stage, sample.rows, sample.seed) == ("sample", 60, step_seed(3, "sample"))
    assert sample.inputs["prompts"].step == "tag" and sample.engines["sampler"].name == "m"
    assert sample.summary == {"marker": "sampled"} and sample.seconds > 0
    assert sample.model_dump()["rows_in"] == {"prompts": 20}
    assert rows(out / "sample")[0]["tags"] == ["t"]
    assert sorted(path.name for path in (out / "sample").iterdir() if not path.name.startswith(".")) == [
        "README.md", "data", "manifest.json",
    ]  # fmt: skip
    assert (out / "train" / "model" / "config.json").exists() and holder(out) is None


def test_a_models_card_says_what_made_it_from_what_and_how(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    _, header, page = (out / "train" / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["align", "model", "train"],
    }  # fmt: skip
    for line in (
        "# t: train",
        "made by the stage `train`",
        "- completions: sample",
        "| steps | 8 |",
        "learning_rate: 0.001",
        "python ",
    ):
        assert line in page, line


def test_the_curves_of_a_killed_step_are_kept_for_the_attempt_that_goes_on_and_for_no_other(tmp_path: Path) -> None:
    (tmp_path / "work" / "print").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    prepare(tmp_path, "print")
    assert (tmp_path / "metrics.jsonl").exists(), "its checkpoint is at some step of these curves"
    prepare(tmp_path, "other settings")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_steps_seed_is_its_own_and_the_same_everywhere() -> None:
    assert step_seed(3, "sample") == step_seed(3, "sample")
    assert len({step_seed(seed, name) for seed in range(20) for name in ("sample", "train")}) == 40
    assert all(0 <= step_seed(seed, "x") < 2**31 for seed in range(100))
    assert step_seed(17, "prompts") == 1503929316, "a change here changes every result"


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert states(file, out) == []
    finish(file, out)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert changed <= {"run.json"} and before.keys() == after.keys()
    assert max(sampled(tmp_path).values()) == 1


@pytest.mark.parametrize(
    ("argument", "again"),
    [
        ("steps.make.with.count=21", ["make", "tag", "sample", "train"]),
        ("steps.tag.with.word=u", ["tag", "sample", "train"]),
        ("steps.sample.with.samples=4", ["sample", "train"]),
        ("engines.s.model=other", ["sample", "train"]),
        ("engines.s.suffix=!", ["sample", "train"]),
        ("steps.train.with.steps=9", ["train"]),
        ("steps.aside.with.count=3", ["aside"]),
        ("seed=4", ["make", "tag", "sample", "train", "aside"]),
        ("engines.s.delay_s=0.001", []),
        ("steps.train.speed.device=cpu", []),
        ("steps.train.speed.micro_batch_size=2", []),
        ("name=other", []),
    ],
)
def test_only_what_follows_from_a_change_is_done_again(tmp_path: Path, argument: str, again: list[str]) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    assert states(file, out, argument) == again


def test_a_change_back_is_a_change_and_gives_the_first_result_again(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    first = rows(out / "sample")
    finish(file, out, "steps.make.with.count=3")
    assert len(rows(out / "sample")) == 9
    assert states(file, out) == ["make", "tag", "sample", "train"]
    finish(file, out)
    assert rows(out / "sample") == first


def test_a_raised_stage_version_runs_the_step_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tests import fakes

    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    monkeypatch.setattr(fakes, "TAG", replace(fakes.TAG, version=2))
    assert states(file, out) == ["tag", "sample", "train"]


def test_the_content_of_a_file_counts_and_not_its_date(tmp_path: Path) -> None:
    data, out = tmp_path / "p.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "one"}\n')
    file = tmp_path / "t.yaml"
    file.write_text(
        f'steps:\n  tag: {{stage: "tests.fakes:TAG", in: {{prompts: {data}}}}}\n'
        f'  make: {{stage: "tests.fakes:MAKE", with: {{source: {data}}}}}\n'
    )
    finish(file, out)
    assert [row["prompt"][0]["content"] for row in rows(out / "tag")] == ["one"]
    os.utime(data, (1, 1))
    assert states(file, out) == []
    data.write_text('{"prompt": "two"}\n')
    assert states(file, out) == ["tag", "make"]
    finish(file, out)
    assert [row["prompt"][0]["content"] for row in rows(out / "tag")] == ["two"]


def test_a_models_content_counts(tmp_path: Path) -> None:
    model, out = tmp_path / "m", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({}, model / "model.safetensors", {"version": "1"})
    file = tmp_path / "t.yaml"
    file.write_text(f'steps: {{train: {{stage: "tests.fakes:TRAIN", in: {{model: {model}}}}}}}')
    finish(file, out)
    assert states(file, out) == []
    save_file({}, model / "model.safetensors", {"version": "2"})
    assert states(file, out) == ["train"]


def test_a_folder_without_a_manifest_or_without_its_result_is_unfinished(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out)
    (out / "sample" / "manifest.json").unlink()
    (out / "train" / "model").rename(tmp_path / "elsewhere")
    assert states(file, out) == ["sample", "train"]


def test_a_list_of_steps_and_parts_of_a_step_become_one_input(tmp_path: Path) -> None:
    file, out = tmp_path / "t.yaml", tmp_path / "run"
    file.write_text(
        'steps:\n  a: {stage: "tests.fakes:MAKE", with: {count: 4}}\n'
        '  b: {stage: "tests.fakes:MAKE", with: {count: 3}}\n'
        '  both: {stage: "tests.fakes:TAG", in: {prompts: [a, b]}}\n'
        '  part: {stage: "tests.fakes:TAG", in: {prompts: [{step: a, count: 2}, b]}}\n'
    )
    finish(file, out)
    ids = [row["prompt_id"] for row in rows(out / "both")]
    assert ids == ["p0", "p1", "p2", "p3", "p0", "p1", "p2"]
    assert len(rows(out / "part")) == 5
    manifest = Manifest.read(out / "both")
    assert manifest is not None and [origin.step for origin in manifest.inputs.values()] == ["a", "b"]
    assert states(file, out, "steps.b.with.count=5") == ["b", "both", "part"]


def test_an_engine_on_a_step_makes_that_step_an_input(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        'steps:\n  make: {stage: "tests.fakes:MAKE"}\n'
        '  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: "step:train"}}\n'
        '  train: {stage: "tests.fakes:TRAIN"}\n'
    )
    recipe = load_recipe(file, (), tmp_path / "run")
    assert list(recipe.steps) == ["make", "train", "sample"]
    first = {planned.step.name: planned.fingerprint for planned in plan(recipe)}
    second = {
        p.step.name: p.fingerprint for p in plan(load_recipe(file, ["steps.train.with.steps=5"], tmp_path / "run"))
    }
    assert [name for name in first if first[name] != second[name]] == ["train", "sample"]


@pytest.mark.parametrize("after", [1, 31, 60])
def test_a_killed_sampling_goes_on_and_repeats_no_finished_sample(tmp_path: Path, after: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(write(whole), whole / "run")
    file, out = write(killed, delay=0.005), killed / "run"
    process = start(file, out)
    wait_for(lambda: lines(killed / "log") >= after, process)
    process.kill()
    process.wait()
    assert not (out / "sample" / "manifest.json").exists()
    finish(file, out)
    asked = sampled(killed)
    assert len(asked) == 60
    # The sample that was being made at the kill is the only one that may be asked for twice.
    assert sum(asked.values()) <= 61
    sampler = (Manifest.read(out / "sample") or pytest.fail()).engines["sampler"].model_dump()
    assert sampler["sampled"] + sampler["reused"] == 60 and sampler["reused"] >= after - 1
    assert rows(out / "sample") == rows(whole / "run" / "sample")
    assert not (out / "sample" / "work").exists()


def test_a_killed_training_goes_on_from_its_work_folder(tmp_path: Path) -> None:
    file, out = write(tmp_path, step=0.05), tmp_path / "run"
    process = start(file, out)
    wait_for(lambda: lines(tmp_path / "steps") >= 4, process)
    process.kill()
    process.wait()
    finish(file, out)
    assert len((tmp_path / "steps").read_text().splitlines()) <= 9
    with safe_open(out / "train" / "model" / "model.safetensors", "numpy") as weights:
        assert weights.metadata() == {"trained": "0.001 8"}


def test_a_run_killed_again_and_again_ends_with_the_same_result(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(write(whole), whole / "run")
    file, out = write(killed, delay=0.01, step=0.02), killed / "run"
    kills, wait = 0, 0.1
    while True:
        process = start(file, out)
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills, wait = kills + 1, wait + 0.1
            continue
        break
    assert kills >= 3 and states(file, out) == []
    for step in ("make", "tag", "sample", "aside"):
        assert rows(out / step) == rows(whole / "run" / step)
    asked = sampled(killed)
    assert len(asked) == 60 and sum(asked.values()) <= 60 + kills


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    file, out = write(tmp_path, delay=0.01), tmp_path / "run"
    process = start(file, out)
    wait_for(lambda: lines(tmp_path / "log") >= 10, process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors and f"align run {file} --out {out}` goes on from here" in errors
    finish(file, out)
    assert sum(sampled(tmp_path).values()) <= 61


def test_two_runs_on_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    file, out = write(tmp_path, delay=0.05), tmp_path / "run"
    process = start(file, out)
    wait_for(lambda: lines(tmp_path / "log") >= 1, process)
    with pytest.raises(RunError, match=rf"another run is writing here \(process {process.pid}\)"):
        finish(file, out)
    assert holder(out) == str(process.pid)
    process.kill()
    process.wait()
    finish(file, out, "engines.s.delay_s=0.0")
    assert states(file, out) == []


HOLDER = """\
import os, sys, time
from pathlib import Path
from align.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        print("ready", flush=True)
        sys.stdin.read()
        print("let go", flush=True)
        os._exit(0)
    time.sleep(60)
"""


def test_a_forked_child_that_outlives_a_killed_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdin and process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    process.stdin.close()
    assert process.stdout.read() == "let go\n", "the child lived until here"
    process.stdout.close()


def test_a_full_disk_is_told_plainly_and_the_run_goes_on_after(tmp_path: Path) -> None:
    """The file system's limit is put by RLIMIT_FSIZE: past 60 kB every write fails as on a full disk."""
    file, out = write(tmp_path), tmp_path / "run"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        sys.argv = ["align", "run", str(file), "--out", str(out), "steps.make.with.count=30000"]
        main()

    process = forked.Forked(small, ROOT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors and "no space left" in errors and "make" in errors
    assert Manifest.read(out / "make") is None
    finish(file, out)
    assert states(file, out) == []


def test_a_full_disk_met_by_a_stage_is_told_with_the_step(tmp_path: Path) -> None:
    recipe = load_stage("tests.fakes:FILL", [f"out={tmp_path / 'o'}"])
    with pytest.raises(RunError, match=r"fill: .*no space left on the disk"):
        run(recipe)


def test_an_error_of_a_stage_names_the_step_and_keeps_its_kind(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    with pytest.raises(DataError, match="sample: it was told to fail; set fail to false"):
        finish(file, out, "steps.sample.with.fail=true")
    assert states(file, out) == ["sample", "train", "aside"]


def alone(tmp_path: Path, *arguments: str) -> Recipe:
    return load_stage("tests.fakes:MAKE", [f"out={tmp_path / 'out'}", *arguments])


def test_a_run_is_refused_in_the_folder_of_a_stage_that_was_run_alone(tmp_path: Path) -> None:
    run(alone(tmp_path, "count=4"))
    with pytest.raises(RunError, match="holds the result of a stage run alone; give the run another folder"):
        run(load_recipe(write(tmp_path), out=tmp_path / "out"))


def test_a_stage_alone_writes_its_result_into_out(tmp_path: Path) -> None:
    run(alone(tmp_path, "count=4"))
    assert len(rows(tmp_path / "out")) == 4
    assert plan(alone(tmp_path, "count=4"))[0].done is not None
    from datasets import load_dataset

    assert load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))["train"].num_rows == 4


def test_another_result_in_out_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    run(alone(tmp_path, "count=4"))
    with pytest.raises(RunError, match="overwrite=true"):
        run(alone(tmp_path, "count=5"))
    assert len(rows(tmp_path / "out")) == 4
    run(alone(tmp_path, "count=5"), overwrite=True)
    assert len(rows(tmp_path / "out")) == 5


def test_a_folder_with_other_peoples_files_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex, which no step of align made"):
        run(alone(tmp_path), overwrite=True)
    file = write(tmp_path)
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "train" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex, which no step of align made"):
        finish(file, tmp_path / "run")
    assert not (tmp_path / "run" / "make").exists(), "nothing ran before the refusal"
    assert (tmp_path / "out" / "thesis.tex").exists() and (tmp_path / "run" / "train" / "thesis.tex").exists()


def test_the_processes_beside_the_first_run_the_stage_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_stage("tests.fakes:TRAIN", [f"out={tmp_path / 'out'}", f"log={tmp_path / 'steps'}"])
    (manifest,) = run(recipe, rank=1)
    assert manifest.summary["world"] == "2" and lines(tmp_path / "steps") == 3
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_a_step_trains_in_several_processes(tmp_path: Path) -> None:
    log = tmp_path / "steps"
    arguments = [f"out={tmp_path / 'out'}", f"log={log}", "processes=2"]
    (manifest,) = run(load_stage("tests.fakes:TRAIN", arguments))
    assert manifest.summary == {"steps": 3, "world": "2"}
    assert sorted(log.read_text().splitlines()) == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    # How many processes is how fast, not what.
    assert plan(load_stage("tests.fakes:TRAIN", arguments[:-1]))[0].done is not None


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_ends_early_leaves_no_trainers_behind(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    file, log = tmp_path / "t.yaml", tmp_path / "steps"
    file.write_text(
        f'steps: {{train: {{stage: "tests.fakes:TRAIN", with: {{steps: 600, step_s: 0.1, log: {log}}}, processes: 2}}}}'
    )
    process = start(file, tmp_path / "run")
    wait_for(lambda: lines(log) >= 4, process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in errors
    time.sleep(1)
    before = lines(log)
    time.sleep(0.5)
    assert lines(log) == before


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_told_as_if_there_were_one(tmp_path: Path) -> None:
    recipe = load_stage("tests.fakes:REFUSE", [f"out={tmp_path / 'out'}", "processes=2"])
    with pytest.raises(AlignError, match="refuse: it won't"):
        run(recipe)


def test_the_run_folder_says_what_the_run_is_made_of(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    finish(file, out, "steps.make.with.count=2")
    about = json.loads((out / "run.json").read_text())
    assert [step["step"] for step in about["steps"]] == ["make", "tag", "sample", "train", "aside"]
    assert about["recipe"]["steps"]["make"]["with"] == {"count": 2}
