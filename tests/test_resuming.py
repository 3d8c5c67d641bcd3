"""A run that is stopped or whose engine fails: it ends cleanly, tells how to go on, and goes on from there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.completion_file import kept_in
from align.core.manifest import Manifest
from tests import forked
from tests.e2e.command import jsonl
from tests.test_pipeline import ROOT, lines, sampled, wait_for, write
from tests.train.tiny import save_model

SIGNALS = pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def start(*arguments: object) -> subprocess.Popen[str]:
    """`align ARGUMENTS` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "align.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    )


def align(*arguments: object, status: int = 0) -> str:
    done = forked.align(*arguments, cwd=ROOT, COLUMNS="200")
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def descendants(pid: int) -> set[int]:
    """The processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def stop(process: subprocess.Popen[str], sent: signal.Signals, within_s: float) -> tuple[int, str]:
    """Signals the whole group, as a terminal does on Ctrl-C; nothing may be left. Gives the status and the words."""
    children = descendants(process.pid)
    began = time.monotonic()
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < within_s
    until = time.monotonic() + 5
    while left := [pid for pid in children if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < until, f"processes left behind: {left}"
        time.sleep(0.01)
    assert "Traceback" not in errors and "Exception ignored" not in errors
    return process.returncode, errors


def told(errors: str) -> list[str]:
    """The arguments of the command that goes on, as it was told."""
    found = re.search(r"stopped; what is finished is kept, and `align (.*)` goes on from here", errors)
    assert found, errors
    return shlex.split(found[1])


@SIGNALS
def test_a_sampling_that_is_stopped_goes_on_with_what_was_kept_shown(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    file, out = write(tmp_path, delay=0.02), tmp_path / "run"
    process = start("run", file, "--out", out)
    wait_for(lambda: lines(tmp_path / "log") >= 25, process)
    ended, errors = stop(process, sent, within_s=8)
    assert ended == status
    kept = kept_in(out / "sample" / "work" / "completions-sampler")[0]
    assert f"begun, {kept} completions kept" in " ".join(align("status", out).split())
    again = align(*told(errors))
    assert "sample: 60 rows in" in again and f"; {60 - kept} completions sampled, {kept} from the cache" in again
    assert sum(sampled(tmp_path).values()) <= 61


def threaded(tmp_path: Path, model: str) -> Path:
    file = tmp_path / "t.yaml"
    file.write_text(
        'steps:\n  make: {stage: "tests.fakes:MAKE"}\n  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, '
        f'engines: {{sampler: {{kind: "tests.fakes:THREADED", model: {model}}}}}}}\n'
    )
    return file


def test_an_engine_whose_threads_wait_for_answers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Its threads sleep for a minute, and Python would wait for them."""
    out = tmp_path / "run"
    process = start("run", threaded(tmp_path, "lets-go"), "--out", out)
    wait_for(lambda: kept_in(out / "sample" / "work" / "completions-sampler")[0] == 8, process)
    ended, errors = stop(process, signal.SIGINT, within_s=8)
    assert ended == 130 and told(errors)[0] == "run"


def test_an_engine_that_does_not_let_go_is_ended_by_a_second_ctrl_c(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("run", threaded(tmp_path, "waits"), "--out", out)
    wait_for(lambda: kept_in(out / "sample" / "work" / "completions-sampler")[0] == 8, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    ended, errors = stop(process, signal.SIGINT, within_s=2)
    assert ended == 130 and told(errors)[0] == "run"
    assert kept_in(out / "sample" / "work" / "completions-sampler")[0] == 8


REJECT = """\
steps:
  prompts: {{stage: prompts, with: {{source: {source}, task: math}}}}
  reject:
    stage: reject
    in: {{prompts: prompts}}
    engines: {{sampler: {{kind: "tests.fakes:SCRIPTED", model: m, log: {log}, down: {down}}}}}
    with: {{samples: 6, distinct: text, max_error_share: 0.1}}
"""


def rejecting(tmp_path: Path) -> Path:
    asked = [{"question": f"Is it {n}?", "answer": f"#### {n}", "split": "train"} for n in range(40)]
    file = tmp_path / "r.yaml"
    source = jsonl(tmp_path / "q.jsonl", asked)
    file.write_text(REJECT.format(source=source, log=tmp_path / "log", down=tmp_path / "down"))
    return file


def test_failed_samples_are_never_kept_and_are_the_only_ones_asked_again(tmp_path: Path) -> None:
    """Of each prompt's 6 samples index 2 and 5 fail as long as the server is down. After 200 answers, within the 34th
    prompt, there are 66 errors, too many; all 34 x 6 = 204 were asked for, and 34 x 4 = 136 came."""
    file, out = rejecting(tmp_path), tmp_path / "run"
    (tmp_path / "down").touch()
    failed = align("run", file, "--out", out, status=2)
    assert "reject: 66 of 200 answers are errors" in failed and "the server is down" in failed
    assert kept_in(out / "reject" / "work" / "completions-sampler")[0] == 136
    assert sampled(tmp_path).total() == 204
    (tmp_path / "down").unlink()
    again = align("run", file, "--out", out)
    assert "; 104 completions sampled, 136 from the cache" in again and "failed to be sampled" not in again
    assert Counter(sampled(tmp_path).values()) == {1: 240 - 68, 2: 68}, "the failed ones were asked twice"
    assert engine(out)["failed"] == 0


def test_failures_within_the_limit_are_counted_and_shown(tmp_path: Path) -> None:
    file, out = rejecting(tmp_path), tmp_path / "run"
    (tmp_path / "down").touch()
    done = align("run", file, "--out", out, "steps.reject.with.max_error_share=0.5")
    assert "; 80 failed to be sampled" in done
    assert {key: engine(out)[key] for key in ("sampled", "reused", "failed")} == {
        "sampled": 160, "reused": 0, "failed": 80,
    }  # fmt: skip


def test_what_the_disk_has_spoilt_is_sampled_again_and_told(tmp_path: Path) -> None:
    file, out = rejecting(tmp_path), tmp_path / "run"
    (tmp_path / "down").touch()
    align("run", file, "--out", out, status=2)
    (tmp_path / "down").unlink()
    cache = out / "reject" / "work" / "completions-sampler"
    content = bytearray(cache.read_bytes())
    content[-1] ^= 1  # in the body of the last of 136 records
    cache.write_bytes(content)
    again = align("run", file, "--out", out)
    assert "; 105 completions sampled, 135 from the cache, 1 in the cache damaged" in again
    assert engine(out)["damaged"] == 1


def engine(out: Path) -> dict[str, Any]:
    manifest = Manifest.read(out / "reject")
    assert manifest is not None
    return manifest.engines["sampler"].model_dump()


ENDLESS = """steps:
  prompts: {{stage: prompts, with: {{source: {source}, task: code}}}}
  execute:
    stage: execute
    in: {{prompts: prompts}}
    engines: {{sampler: {{kind: "tests.fakes:SCRIPTED", model: m, log: {log}}}}}
    with: {{samples: 4, cpu_s: 60, accept: unsafe}}
"""


def test_a_stop_while_programs_run_in_the_sandbox_leaves_none_of_them_behind(tmp_path: Path) -> None:
    """The model answers with its prompt, which is a program that never ends."""
    asked = [
        {"prompt": "while True: pass", "task": "code", "reference": '{"tests": ["assert f() == 1"]}', "split": "train"}
        for _ in range(3)
    ]
    file, out = tmp_path / "e.yaml", tmp_path / "run"
    file.write_text(ENDLESS.format(source=jsonl(tmp_path / "q.jsonl", asked), log=tmp_path / "log"))
    process = start("run", file, "--out", out)
    wait_for(lambda: lines(tmp_path / "log") >= 4 and len(descendants(process.pid)) >= 2, process)
    time.sleep(0.5)
    ended, errors = stop(process, signal.SIGINT, within_s=8)
    assert ended == 130 and told(errors)[:2] == ["run", str(file)]


@pytest.mark.slow
def test_a_training_that_is_stopped_ends_cleanly_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    """That it goes on from there to the same weights is tried in tests/train."""
    save_model(tmp_path / "base", "llama")
    jsonl(tmp_path / "d.jsonl", [{"instruction": f"What is {n}?", "output": str(n)} for n in range(4000)])
    settings = (f"model={tmp_path / 'base'}", f"demonstrations={tmp_path / 'd.jsonl'}", "global_batch_size=8")
    out = tmp_path / "out"
    process = start("sft", *settings, "save_every=20", f"out={out}")
    wait_for(lambda: any(out.glob("work/*/checkpoints/*/done")), process)
    ended, errors = stop(process, signal.SIGINT, within_s=10)
    assert ended == 130 and told(errors) == ["sft", *settings, "save_every=20", f"out={out}"]
    assert not (out / "manifest.json").exists() and any(out.glob("work/*/checkpoints/*/done"))
