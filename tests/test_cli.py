"""The command line as a user meets it: in its own process, with its exit status and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from align.core.manifest import Manifest
from align.helptext import print_stage_help
from align.stages import TABLE, load
from tests import forked
from tests.test_pipeline import ROOT, write


def align(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `align` from a folder."""
    return forked.align(*arguments, cwd=cwd, COLUMNS="160", **environment)


def test_help_names_every_command_and_every_stage() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "align.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for word in ("run", "check", "status", "report", "trace", "recipes", "make-tiny", *TABLE):
        assert f" {word} " in shown, word


@pytest.mark.parametrize(("verb", "meant"), [("sfft", "sft"), ("online_dpo", "online-dpo"), ("rum", "run")])
def test_a_misspelled_command_gets_the_nearest_one(verb: str, meant: str) -> None:
    done = align(verb, "out=x")
    assert done.returncode == 2
    assert done.stderr == f"align {verb}: there is no such command; did you mean '{meant}'?\n"


def test_the_version_is_told() -> None:
    assert align("--version").stdout.split()[0].strip(",") == "align"


def test_a_wrong_recipe_ends_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("steps:\n  a: {stage: nope}\n  b: {stage: sft, with: {learning_rat: 1}}\n")
    for command in ("run", "check"):
        done = align(command, "tiny.yaml", cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "tiny.yaml: steps.a.stage: 'nope': unknown stage; known: prompts" in done.stderr
        assert (
            "tiny.yaml: steps.b.with.learning_rat: unknown key; did you mean 'learning_rate'? (line 3)" in done.stderr
        )
    assert not (tmp_path / "runs").exists()


def test_a_missing_recipe_is_told_with_the_shipped_ones() -> None:
    done = align("run", "quickstrat")
    assert done.returncode == 2
    assert done.stderr == (
        "quickstrat: no such file, and no recipe of that name is shipped; did you mean 'quickstart'?\n"
    )


def test_check_tells_the_plan_and_runs_nothing(tmp_path: Path) -> None:
    file = write(tmp_path)
    done = align("check", str(file), "--out", str(tmp_path / "run"))
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    assert "≤ 20 × 3" in done.stdout
    assert "up to 60 completions, 960 tokens" in done.stdout
    assert "t: no fault found; 5 of 5 steps to do" in done.stdout


def test_run_status_and_check_tell_how_far_a_run_is(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    failed = align("run", str(file), "--out", str(out), "steps.sample.with.fail=true")
    assert failed.returncode == 2 and failed.stderr == "sample: it was told to fail; set fail to false\n"
    told = " ".join(align("status", str(out)).stdout.split())
    assert "make make done 20" in told and "sample sample begun" in told and "train train to do" in told
    checked = align("check", str(file), "--out", str(out)).stdout
    assert "≤ 20 × 3" in checked and "3 of 5 steps to do" in checked
    done = align("run", str(file), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "[3/5] sample: 60 rows in" in done.stdout and "[1/5] make: done before" in done.stdout
    assert f"report: {out}" in done.stdout
    again = align("run", str(file), "--out", str(out)).stdout
    assert again.count("done before") == 5


def test_status_of_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    done = align("status", str(tmp_path))
    assert done.returncode == 2 and "is no run: it has no run.json" in done.stderr


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = align("run", str(write(tmp_path)), "--out", str(tmp_path / "run"))
    assert "  sample: 0 of 20 prompts (0%)" in done.stdout.splitlines()
    assert "\r" not in done.stdout and "\x1b" not in done.stdout


def test_a_stage_runs_alone_from_any_folder_without_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "world"}\n')
    arguments = ["prompts", "source=p.jsonl", "test=0.0", "dev=0.0", "out=made"]
    done = align(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "made")
    assert manifest is not None and (manifest.stage, manifest.rows) == ("prompts", 2)
    assert "done before" in align(*arguments, cwd=tmp_path).stdout
    other = align(*arguments, "task=math", cwd=tmp_path)
    assert other.returncode == 2 and "overwrite=true" in other.stderr
    assert align(*arguments, "task=math", "overwrite=true", cwd=tmp_path).returncode == 0
    wrong = align(*arguments, "overwrite=yes", cwd=tmp_path)
    assert wrong.returncode == 2 and "true or false was expected, found yes" in wrong.stderr


def test_a_stage_alone_reads_its_settings_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("count: 4\nout: made\n")
    done = align("tests.fakes:MAKE", "s.yaml", "count=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "made")
    assert manifest is not None and manifest.rows == 5


def test_options_in_the_place_of_settings_are_told_how_to_be_written(tmp_path: Path) -> None:
    done = align("sft", "--learning_rate", "1e-5", cwd=tmp_path)
    assert done.returncode == 2
    assert "'--learning_rate': settings are given as key=value; write learning_rate=…" in done.stderr


def test_the_help_of_a_stage_lists_every_input_and_setting_with_type_default_and_meaning() -> None:
    shown = " ".join(align("tests.fakes:SAMPLE", "--help").stdout.split())
    for line in (
        "prompts prompts required prompts",
        "sampler engine, or a list required what samples",
        "judge engine what judges",
        "samples int ≥ 1 2 samples of each prompt",
        "fail true | false false fails with an error",
        "out path required folder for the result",
    ):
        assert line in shown, line


@pytest.mark.parametrize("verb", TABLE)
def test_the_help_of_every_stage_names_all_that_it_takes(verb: str) -> None:
    stage, shown = load(verb), StringIO()
    print_stage_help(stage, Console(width=140, file=shown))
    first_words = {line.split()[0] for line in shown.getvalue().splitlines() if line.strip()}
    assert {*stage.needs, *stage.engines, *stage.config.model_fields, "out", "seed"} <= first_words
    assert f"Gives {stage.gives.value.replace('_', ' ')}" in shown.getvalue()
    assert all(need.help for need in stage.needs.values()) and all(stage.engines.values())


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    listed = align("recipes").stdout
    assert "quickstart " in listed
    done = align("recipes", "copy", "quickstart", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "quickstart.yaml").exists()
    assert align("check", "quickstart.yaml", cwd=tmp_path).returncode == 0, "the files that it reads came along"
    assert align("recipes", "copy", "quickstart", cwd=tmp_path).returncode == 2
    named = align("recipes", "copy", "quickstart", "mine/q.yaml", cwd=tmp_path)
    assert named.returncode == 0 and (tmp_path / "mine" / "q.yaml").exists()


def test_a_whole_recipe_is_not_started_by_torchrun_and_a_stage_that_does_not_train_neither(tmp_path: Path) -> None:
    done = align("run", str(write(tmp_path)), "--out", str(tmp_path / "run"), RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2 and "processes: N in the recipe" in done.stderr
    done = align("tests.fakes:MAKE", f"out={tmp_path / 'o'}", "count=2", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2 and "runs in one process" in done.stderr


def test_a_stage_started_by_accelerate_is_written_by_the_first_process_only(tmp_path: Path) -> None:
    arguments = ["tests.fakes:TRAIN", f"out={tmp_path / 'o'}", "steps=2"]
    second = align(*arguments, RANK="1", WORLD_SIZE="2")
    assert second.returncode == 0 and second.stdout == "" and not (tmp_path / "o" / "manifest.json").exists()
    first = align(*arguments, RANK="0", WORLD_SIZE="2")
    assert first.returncode == 0 and "[1/1] train: model in" in first.stdout
    manifest = Manifest.read(tmp_path / "o")
    assert manifest is not None and manifest.summary["world"] == "2"


def test_a_row_is_traced_back_through_the_steps(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    align("run", str(file), "--out", str(out))
    traced = align("trace", str(out), "p3")
    assert traced.returncode == 0, traced.stderr
    assert traced.stdout.index("sample  (stage sample") < traced.stdout.index("tag  (stage tag")
    missing = align("trace", str(out), "nothing")
    assert missing.returncode == 2 and "no row" in missing.stderr


def test_the_ladder_shows_each_evaluation_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    from align.ladder import print_ladder

    part = {"score": 50.0, "low": 40.04, "high": 59.96, "n": 100}
    whole = {"overall": {"score": 81.5, "low": 78.6, "high": 84.1, "n": 750}, "by_family": {"math": part}}
    scores = {"greedy": whole, "sampled": {"overall": part, "by_family": {}}}
    manifest = Manifest(step="eval", stage="evaluate", fingerprint="f", seconds=12.0, summary={"scores": scores})
    print_ladder([manifest], Console(width=120))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Verified score in %, greedy" in shown and "eval 81.5 50.0 750 12 s 78.6–84.1 40.0–60.0" in shown
    assert "Verified score in %, sampled" in shown and "eval 50.0 100 12 s 40.0–60.0" in shown


def test_no_environment_secret_is_printed_or_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = align(
        "run", str(write(tmp_path)), "--out", str(out), HF_TOKEN="hf_verysecret", OPENAI_API_KEY="sk-verysecret"
    )
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert "verysecret" not in done.stdout + done.stderr
    assert not any(b"verysecret" in content for content in written)
    assert json.loads((out / "run.json").read_text())["name"] == "t"


def test_make_tiny_refuses_what_it_does_not_know() -> None:
    done = align("make-tiny", "otu=x")
    assert done.returncode == 2 and "otu: unknown key; did you mean 'out'?" in done.stderr
    done = align("make-tiny")
    assert done.returncode == 2 and "out is missing" in done.stderr
