"""The trainer of online DPO: kills, splits of a batch, the reference's two places, samples made ahead, replay.

The policy says 3 or 4, whatever it is asked, about as often; 3 is right. So most prompts give a pair.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import DataError, EngineError, RecipeError, RunError
from align.core.manifest import Manifest, Origin
from align.core.store import ModelRef, Table
from align.train import online_trainer, stale
from align.train.border import Borders
from align.train.episode_file import pairs_of, read_rows
from align.train.episodes import Prompts
from align.train.online_dpo import STAGE
from align.train.online_settings import Config
from align.train.replay import STAGE as REPLAY
from align.train.replay import settings_of
from align.train.scoring import Scorer
from align.train.sft import STAGE as SFT
from tests.train import steps
from tests.train.kills import in_fork
from tests.train.ranks import assert_same_gradient, first_gradient, in_ranks
from tests.train.tiny import save_model

SETTINGS: dict[str, Any] = {
    "scorer": "verifier",
    "episodes": 3,
    "prompts_per_episode": 6,
    "samples_per_prompt": 4,
    "max_tokens": 6,
    "max_length": 128,
    "learning_rate": 1e-3,
    "epochs": 2.0,
    "global_batch_size": 2,
    "probe_prompts": 2,
    "max_score_drop": 101.0,
    "max_family_drop": 101.0,
}
KILLED = (True, signal.SIGKILL)


def asked(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"What is {number} plus {'hello ' * (number % 4)}world?"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table | ModelRef]:
    folder = tmp_path_factory.mktemp("start")
    save_model(folder / "base")
    shown = [
        {"prompt_id": f"p{i}", "split": "train", "prompt": asked(i)}
        | {"completion": [{"role": "assistant", "content": f"{3 + i % 2}"}]}
        for i in range(16)
    ]
    given = {"model": steps.policy(folder / "base"), "demonstrations": steps.table(folder / "shown.parquet", shown)}
    settings = {"learning_rate": 1e-2, "epochs": 15.0, "global_batch_size": 8, "max_length": 128, "weight_decay": 0.0}
    steps.run(SFT, folder / "sft", given, settings)
    rows = [
        {"prompt_id": f"q{i}", "prompt": asked(i), "split": "train" if i < 18 else "dev", "source": "test"}
        | {"task": "exact", "family": "sums", "reference": json.dumps({"answer": "3"})}
        for i in range(20)
    ]
    return {"policy": steps.policy(folder / "sft" / "model"), "prompts": steps.table(folder / "prompts.parquet", rows)}


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Table | ModelRef], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing broke, with its manifest."""
    folder = tmp_path_factory.mktemp("whole") / "online"
    summary, _ = steps.run(STAGE, folder, inputs, SETTINGS)
    assert min(record["steps"] for record in summary["episodes"]) >= 2, "a kill must find a step to come"
    assert [record["rolled_back"] for record in summary["episodes"]] == [[], [], []]
    Manifest(
        step="online",
        stage="online-dpo",
        version=3,
        fingerprint="f",
        settings=Config(**SETTINGS).model_dump(mode="json"),
        seed=3,
        inputs={"policy": Origin(name="sft", fingerprint="0")},
        summary=summary,
    ).write(folder)
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    """Weights and samples bit by bit, and every line of the curves once; but for the times.

    Of a sample that was drawn in another batch the log-probability that the engine tells may end in other digits.
    """
    first, second = steps.weights(one), steps.weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = sorted(path.name for path in (one / "episodes").iterdir())
    assert files == sorted(path.name for path in (other / "episodes").iterdir())
    for name in files:
        ours, theirs = (read_rows(run / "episodes" / name) for run in (one, other))
        told, again = ([logp for row in rows for logp in row.pop("sampler_logps")] for rows in (ours, theirs))
        assert again == pytest.approx(told, abs=1e-5)
        assert theirs == ours
    lines, repeated = (
        [{name: value for name, value in line.items() if "second" not in name} for line in steps.curves(run)]
        for run in (one, other)
    )
    assert repeated == lines


class Deadly(steps.Silent):
    """Kills its process at the n-th count of a unit, such as the 5th of `samples, episode 2/3`."""

    def __init__(self, unit: str = "", at: int = 0) -> None:
        super().__init__()
        self.deadly, self.at, self.unit, self.count = unit, at, "", 0

    def start(self, total: int | None, unit: str) -> None:
        self.unit, self.count = unit, 0

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        self.count += by
        if self.unit == self.deadly and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, inputs: Any, settings: dict[str, Any], progress: Deadly, save_every: int = 500) -> Any:
    """One run in a fork, which notes each sample that it draws: `done`, or whether it was killed, and by what."""
    log = folder.with_suffix(".sampled").open("a", buffering=1)
    sample = TransformersEngine.sample

    def noting(self: Any, prompts: Any, n: int, params: Any, first_index: int = 0) -> Iterator[Any]:
        prompts = list(prompts)
        for number, index, completion in sample(self, prompts, n, params, first_index):
            log.write(f"{params.seed} {params.temperature} {index} {list(prompts[number])}\n")
            yield number, index, completion

    def run() -> None:
        TransformersEngine.sample = noting  # type: ignore[method-assign]
        steps.run(STAGE, folder, inputs, settings, {"save_every": save_every}, progress=progress)

    status = in_fork(run, folder)
    return (os.WIFSIGNALED(status), os.WTERMSIG(status)) if status else "done"


def test_a_run_killed_in_sampling_scoring_training_and_looking_ends_in_the_same_weights_and_samples_nothing_twice(
    inputs: dict[str, Table | ModelRef], whole: Path, tmp_path: Path
) -> None:
    """All kills are in the second episode, whose samples (of seed 3 + 1) must each be drawn once over all attempts."""
    folder = tmp_path / "killed"
    states = Borders(folder / "work" / "border")
    assert attempt(folder, inputs, SETTINGS, Deadly("samples, episode 2/3", 7)) == KILLED
    first = len(steps.curves(whole)) and states.newest()
    with pytest.MonkeyPatch.context() as patch:
        score = Scorer.score
        calls: list[int] = []
        patch.setattr(Scorer, "score", lambda self, groups: calls.append(1) or score(self, groups[:2]) or die())
        assert attempt(folder, inputs, SETTINGS, Deadly()) == KILLED
    assert states.newest() == first
    # Killed after the first step's line and before its state; then after the second's, going on from the first's state.
    assert attempt(folder, inputs, SETTINGS, Deadly("steps, episode 2/3", 1), save_every=1) == KILLED
    assert states.newest() == first
    assert attempt(folder, inputs, SETTINGS, Deadly("steps, episode 2/3", 2), save_every=1) == KILLED
    assert states.newest() == first + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_trainer, "look", die)
        assert attempt(folder, inputs, SETTINGS, Deadly()) == KILLED
    assert states.newest() > first + 1
    assert not (folder / "model").exists()
    assert attempt(folder, inputs, SETTINGS, Deadly()) == "done", folder.with_suffix(".out").read_text()[-3000:]
    assert_same_run(whole, folder)
    drawn = [line for line in folder.with_suffix(".sampled").read_text().splitlines() if line.startswith("4 ")]
    assert len(drawn) == len(set(drawn)) == 6 * 4


def test_no_split_of_a_global_batch_and_no_number_of_processes_changes_the_gradient(
    inputs: dict[str, Table | ModelRef], tmp_path: Path
) -> None:
    """TRL's experimental trainer adds up the gradients of its micro batches: four give one of four times the length."""
    settings = SETTINGS | {"max_grad_norm": 0.0, "nll_weight": 1.0, "global_batch_size": 4, "epochs": 4.0}

    def gradient(micro: int, name: str) -> list[torch.Tensor]:
        speed = {"micro_batch_size": micro}
        return first_gradient(lambda: steps.run(STAGE, tmp_path / name, inputs, settings, speed))

    whole, split = gradient(4, "whole"), gradient(1, "split")
    assert_same_gradient(split, whole)
    for ranked in in_ranks(lambda: gradient(1, "ranks"), tmp_path / "ranks"):
        assert_same_gradient(ranked, whole)


def test_with_the_reference_at_each_episode_the_margins_are_zero_at_each_episode_s_first_step(
    inputs: dict[str, Table | ModelRef], whole: Path, tmp_path: Path
) -> None:
    steps.run(STAGE, tmp_path / "online", inputs, SETTINGS | {"reference_at": "episode", "episodes": 2})

    def first_margins(folder: Path) -> list[float]:
        lines = [line for line in steps.curves(folder) if "loss" in line]
        firsts = [min(line["step"] for line in lines if line["episode"] == number) for number in (1, 2)]
        return [line["rewards/margins"] for line in lines if line["step"] in firsts]

    assert first_margins(tmp_path / "online") == pytest.approx([0, 0], abs=1e-6)
    assert first_margins(whole)[0] == pytest.approx(0, abs=1e-6)
    assert abs(first_margins(whole)[1]) > 1e-4


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process as a fork: it need not import everything anew."""
    monkeypatch.setattr(stale, "START", "fork")


def test_samples_made_ahead_are_one_episode_stale_and_a_kill_changes_nothing(
    inputs: dict[str, Table | ModelRef], tmp_path: Path, forked: None
) -> None:
    settings = SETTINGS | {"asynchronous": True}
    summary, _ = steps.run(STAGE, tmp_path / "whole", inputs, settings)
    done = [record["steps"] for record in summary["episodes"]]
    stale_steps = [{row["policy_step"] for row in read_rows(path)} for path in episode_files(tmp_path / "whole")]
    assert stale_steps == [{0}, {0}, {done[0]}]
    # The second process samples for the third episode and is slow; its parent is killed in the second's training.
    killed, pid = tmp_path / "killed", tmp_path / "pid"
    with pytest.MonkeyPatch.context() as patch:
        rows = stale.Share.rows

        def slow(self: Any, engine: Any, episode: int, step: int) -> Any:
            pid.write_text(str(os.getpid()))
            if episode == 2:
                time.sleep(60)
            return rows(self, engine, episode, step)

        patch.setattr(stale.Share, "rows", slow)
        assert attempt(killed, inputs, settings, Deadly("steps, episode 2/3", 1)) == KILLED
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text()}").exists() or " Z " in Path(f"/proc/{pid.read_text()}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the second process outlived its parent")
    assert not (killed / "work" / "ahead" / "episode-002-0.parquet").exists()
    assert attempt(killed, inputs, settings, Deadly()) == "done", killed.with_suffix(".out").read_text()[-3000:]
    assert_same_run(tmp_path / "whole", killed)


def episode_files(folder: Path) -> list[Path]:
    return sorted((folder / "episodes").glob("*.parquet"))


def test_a_second_process_that_dies_is_told_about_and_so_is_what_it_could_not_do(
    inputs: dict[str, Table | ModelRef], tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"asynchronous": True, "probe_prompts": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stale.Share, "rows", die)
        with pytest.raises(RunError, match=r"samples ahead is gone: it ended with status -9 \(killed from outside"):
            steps.run(STAGE, tmp_path / "dies", inputs, settings)
    long = SETTINGS | {"asynchronous": True, "max_length": 8, "too_long": "error"}
    with pytest.raises(DataError, match=r"its pair has \d+ tokens, max_length is 8"):
        steps.run(STAGE, tmp_path / "long", inputs, long)


def replay(whole: Path, folder: Path, inputs: Any, changes: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
    given = {"policy": inputs["policy"]}
    return steps.run(REPLAY, folder, given, {"run": str(whole), "changes": changes or {}}, seed=99)


def test_a_replay_ends_in_the_run_s_weights_and_with_other_settings_in_others(
    inputs: dict[str, Table | ModelRef], whole: Path, tmp_path: Path
) -> None:
    summary, progress = replay(whole, tmp_path / "same", inputs)
    one, other = steps.weights(whole), steps.weights(tmp_path / "same")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert summary["same_weights"] is True
    assert "the weights are the run's, bit by bit" in progress.said
    losses, again = (
        [line["loss"] for line in steps.curves(run) if "loss" in line] for run in (whole, tmp_path / "same")
    )
    assert again == losses
    summary, _ = replay(whole, tmp_path / "other", inputs, {"beta": 0.5, "losses": ["ipo"]})
    other = steps.weights(tmp_path / "other")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert "same_weights" not in summary
    assert summary["replayed"]["changes"] == {"beta": 0.5, "losses": ["ipo"]}
    assert summary["pairs"] == sum(len(pairs_of(read_rows(path))) for path in episode_files(whole))


def test_a_run_whose_guards_were_off_can_be_replayed(whole: Path) -> None:
    """JSON has no infinity, so a manifest holds null for it; a setting that may be empty stays so."""
    found = Manifest.read(whole)
    assert found is not None
    found.settings.update(max_kl=None, max_length_ratio=None, loss_weights=None)
    settings = settings_of(found, {"beta": 0.3})
    assert (settings.max_kl, settings.max_length_ratio, settings.loss_weights) == (math.inf, math.inf, None)


def test_rows_that_processes_shared_otherwise_are_refused(inputs: dict[str, Table | ModelRef], tmp_path: Path) -> None:
    table = inputs["prompts"]
    assert isinstance(table, Table)
    config = STAGE.config(**SETTINGS)
    share: Any = stale.Share(config, Prompts(table, config, 0), None, 0, None, steps.Silent(), tmp_path)  # type: ignore[arg-type]
    rows = [{"prompt_id": row["prompt_id"]} for row in share.prompts.of_episode(0)]
    assert len(share.in_order(rows, 0)) == len(rows)
    with pytest.raises(RunError, match="shared them otherwise than now"):
        share.in_order(rows[1:], 0)
    lost = {"finish_reasons": ["stop"] * 8 + ["error"] * 2, "details": [""] * 9 + ["not sampled; status 503"]}
    with pytest.raises(EngineError, match=r"2 of 10 completions .* could not be sampled.*the last: .*status 503"):
        share._check_errors([lost])


def test_a_replay_undoes_what_was_undone(inputs: dict[str, Table | ModelRef], whole: Path, tmp_path: Path) -> None:
    """With the second episode rolled back the first and third alone are trained on, by their own places' rates."""
    found = Manifest.read(whole)
    assert found is not None
    folder = tmp_path / "online"
    (folder / "episodes").mkdir(parents=True)
    for path in episode_files(whole):
        (folder / "episodes" / path.name).write_bytes(path.read_bytes())
    found.summary["episodes"][1]["rolled_back"] = ["the length"]
    found.write(folder)
    summary, _ = replay(folder, tmp_path / "again", inputs)
    lines = [line for line in steps.curves(tmp_path / "again") if "loss" in line]
    assert {line["episode"] for line in lines} == {1, 3}
    rates = {line["learning_rate"] for line in steps.curves(whole) if "loss" in line and line["episode"] != 2}
    assert {line["learning_rate"] for line in lines} == rates
    assert [bool(record["rolled_back"]) for record in summary["episodes"]] == [False, True, False]


def test_a_replay_refuses_what_needs_new_samples_other_models_and_folders_without_episodes(
    inputs: dict[str, Table | ModelRef], whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"samples_per_prompt would need new samples.*may change .*learning_rate"):
        REPLAY.config(run=str(whole), changes={"samples_per_prompt": 2})
    with pytest.raises(ValueError, match="online-dpo has no setting betta; did you mean 'beta'"):
        REPLAY.config(run=str(whole), changes={"betta": 1.0})
    with pytest.raises(ValueError, match=r"beta: found -1.0; input should be greater than 0"):
        REPLAY.config(run=str(whole), changes={"beta": -1.0})
    with pytest.raises(RecipeError, match=r"changes: Value error, label_smoothing has no effect|changes: label_smooth"):
        replay(whole, tmp_path / "a", inputs, {"losses": ["ipo"], "label_smoothing": 0.1})
    with pytest.raises(DataError, match=r"in.reference: the run had none, and the replay was given"):
        replay_of = {"policy": inputs["policy"], "reference": inputs["policy"]}
        steps.run(REPLAY, tmp_path / "r", replay_of, {"run": str(whole)})
    with pytest.raises(DataError, match=r"in.policy: base is not the model that the run had \(sft"):
        other = ModelRef(inputs["policy"].path, inputs["policy"].kind, "base", "1")
        replay(whole, tmp_path / "b", {"policy": other})
    with pytest.raises(RunError, match="holds no finished step"):
        replay(tmp_path, tmp_path / "c", inputs)
