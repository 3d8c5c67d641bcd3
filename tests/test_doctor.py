"""`align doctor` as a stranger uses it: what would begin, what waits, what is refused, and a run's folder untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from typer.testing import CliRunner, Result

from align import cli
from align.core.errors import DataError
from align.core.records import Kind
from align.core.stage import Need, Stage, StageConfig, Tools
from align.core.stage import Result as Outcome
from align.core.store import ModelRef, Table
from tests.train.tiny import save_model


class Config(StageConfig):
    fault: str = Field("", description="what it is refused for")
    parameters: int = Field(1000, ge=1, description="weights")
    tells: bool = Field(True, description="its start")


def train(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Outcome:
    """Prepares, tells its start, and would leave a mark in the folder if it trained."""
    if config.fault:
        raise DataError(config.fault)
    rows = inputs["demonstrations"]
    assert isinstance(rows, Table)
    (tools.work / "tokens").write_text("prepared")
    tools.progress.say(f"{len(rows)} rows \x1b[32m⟦learned⟧\x1b[0m")
    if not tools.rehearse:
        raise AssertionError("the training began")
    start = {"parameters": config.parameters, "trained": config.parameters, "warnings": []}
    return Outcome(summary={"start": start} if config.tells else {})


NEEDS = {"demonstrations": Need(Kind.DEMONSTRATIONS, "rows"), "model": Need(Kind.MODEL, "a model", optional=True)}
STAGE = Stage("train", "trains", Config, NEEDS, Kind.MODEL, train, trains=True)
HERE = "tests.test_doctor:STAGE"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a person sits, with a file of rows."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(9)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def recipe(folder: Path, **steps: dict[str, Any]) -> str:
    given = {name: {"stage": HERE, "in": {"demonstrations": "rows.jsonl"}} | step for name, step in steps.items()}
    (folder / "r.yaml").write_text(json.dumps({"name": "r", "steps": given}))
    return "r.yaml"


def test_a_training_is_rehearsed_up_to_its_first_step_and_leaves_nothing_behind(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = doctor(recipe(folder, one={}))
    assert found.exit_code == 0, found.stderr
    assert "  one: 9 rows ⟦learned⟧\none: would begin; rehearsed in " in found.stdout
    assert found.stdout.endswith("r: 1 rehearsed, no fault found\n")
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "r.yaml"])


def test_one_whose_inputs_are_not_there_says_which_step_must_run_first(folder: Path) -> None:
    found = doctor(recipe(folder, one={}, two={"in": {"demonstrations": "rows.jsonl", "model": "one"}}))
    assert found.exit_code == 0, found.stderr
    assert "two: waits for one; run the recipe up to there, then ask again" in found.stdout
    assert "r: 1 rehearsed, 1 waiting for other steps, no fault found" in found.stdout


def test_the_faults_of_all_steps_are_told_at_once_with_status_2(folder: Path) -> None:
    found = doctor(recipe(folder, one={"with": {"fault": "two BOS"}}, two={}, three={"with": {"fault": "no token"}}))
    assert found.exit_code == 2
    assert found.stderr.splitlines() == ["one: two BOS", "three: no token"]
    assert "r: 1 rehearsed, 2 at fault:" in found.stdout


def test_a_disk_too_small_for_the_checkpoints_is_a_warning(folder: Path) -> None:
    """10¹⁵ weights take 20 · 10¹⁵ bytes: 16 for each trained one and 4 for the model."""
    found = doctor(recipe(folder, one={"with": {"parameters": 10**15}}))
    assert found.exit_code == 0
    assert f"warning: checkpoints and model take about {round(20 * 10**15 / 2**30)} GiB" in found.stdout
    assert "1 warning, no fault found" in found.stdout


def test_a_stage_that_tells_no_start_is_told_of(folder: Path) -> None:
    found = doctor(recipe(folder, one={"with": {"tells": False}}))
    assert found.exit_code == 2
    assert "trains, but tells no start when it is rehearsed" in found.stderr


def test_a_stage_alone_needs_no_folder_for_its_result(folder: Path) -> None:
    found = doctor(HERE, "demonstrations=rows.jsonl")
    assert found.exit_code == 0, found.stderr
    assert "train: 1 rehearsed, no fault found" in found.stdout
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no.yaml"], "no.yaml: there is no such file"),
        (["stf", "model=tiny"], "did you mean 'sft'?"),
        (
            [HERE, "demonstrations=rows.jsonl", "report_to=[wandv]"],
            "there is no tracker 'wandv'; did you mean 'wandb'?",
        ),
        ([HERE, "demonstrations=rows.jsonl", "report_to=[mlflow]"], "pip install 'align-toolkit[mlflow]'"),
        ([HERE, "demonstrations=rows.jsonl", "faults=x"], "unknown key; did you mean 'fault'?"),
        ([HERE, "demonstrations=gone.jsonl"], "there is no such file or folder"),
    ],
)
def test_wrong_input_is_told_before_anything_is_rehearsed(folder: Path, arguments: list[str], told: str) -> None:
    found = doctor(*arguments)
    assert found.exit_code == 2
    assert told in found.stderr
    assert "rehearsing" not in found.stdout


def test_a_recipe_without_a_training_is_for_check(folder: Path) -> None:
    (folder / "r.yaml").write_text('name: r\nsteps: {pool: {stage: "tests.fakes:MAKE"}}\n')
    assert "no step of it trains; `align check` looks at the others" in doctor("r.yaml").stdout


class TestTheStagesThemselves:
    """What `pitfalls.md` refuses, on a random model of two layers."""

    def sft(self, folder: Path, *more: str) -> Result:
        model = folder / "model"
        if not model.exists():
            save_model(model)
        given = ["demonstrations=rows.jsonl", f"model={model}", "device=cpu", "global_batch_size=4", "max_length=256"]
        return doctor("sft", *given, *more)

    def test_sft_would_begin_and_shows_its_first_row(self, folder: Path) -> None:
        found = self.sft(folder)
        assert found.exit_code == 0, found.stderr
        assert "⟦0<|im_end|>⟧" in found.stdout
        assert "9 to train on" in found.stdout

    def test_a_template_with_two_bos_is_refused(self, folder: Path) -> None:
        save_model(folder / "model", "llama")
        template = folder / "model" / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())
        found = self.sft(folder)
        assert found.exit_code == 2
        assert "its chat template gives two BOS tokens" in found.stderr

    def test_a_turn_without_an_end_token_is_refused(self, folder: Path) -> None:
        save_model(folder / "model")
        template = folder / "model" / "chat_template.jinja"
        roles = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        template.write_text(roles + "{% if add_generation_prompt %}assistant: {% endif %}")
        found = self.sft(folder)
        assert found.exit_code == 2
        assert "a model would never learn to stop" in found.stderr

    def test_online_dpo_tells_its_episodes_and_samples_nothing(self, folder: Path) -> None:
        """9 prompts, none set aside (a tenth is under one): 2 episodes of 4 prompts, each a step and one more."""
        save_model(folder / "model")
        given = [f"policy={folder / 'model'}", "prompts=rows.jsonl", "device=cpu", "scorer=verifier", "max_tokens=8"]
        episodes = ["episodes=2", "prompts_per_episode=4", "global_batch_size=4", "probe_prompts=0"]
        found = doctor("online-dpo", *given, *episodes)
        assert found.exit_code == 0, found.stderr
        shown = " ".join(found.stdout.split())  # however it is broken into lines
        assert "2, each of 4 prompts × 8 completions of at most 8 tokens; scored by the verifiers" in shown
        assert "at most 4 of 4 prompts" in found.stdout

    def test_rows_that_are_all_too_long_or_empty_are_refused(self, folder: Path) -> None:
        found = self.sft(folder, "max_length=8")
        assert found.exit_code == 2
        assert "no demonstration to train on: 9 too_long; raise max_length" in found.stderr


def test_a_name_of_both_a_stage_and_a_shipped_recipe_is_the_stage_where_its_settings_are_given(folder: Path) -> None:
    """`sft` is both. With steps.… it is the recipe, whose model is then the one that isn't there."""
    found = doctor("sft", "demonstrations=rows.jsonl")
    assert found.exit_code == 2
    assert "align sft: model: missing" in found.output
    of_the_recipe = doctor("sft", "steps.sft.in.demonstrations=rows.jsonl", "steps.sft.in.model=./nowhere")
    assert of_the_recipe.exit_code == 2
    assert "nowhere" in of_the_recipe.output
