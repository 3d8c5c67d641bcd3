"""Several reward models as one: how scores are combined, gated, stored and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import ModelError, RecipeError
from align.core.records import Kind
from align.core.store import ModelRef
from align.inputs import open_inputs
from align.recipe import load_stage
from reward.ensemble import STAGE
from reward.members import Ensemble, EnsembleCard, Member, load_judge, on_one_scale
from reward.model import Gate, load_reward_model
from tests.reward.test_model import ITEMS, save_scalar
from tests.reward.test_train import completions
from tests.train.steps import run, table


def card(combine: Any = "mean", k: float = 1.0, **more: Any) -> EnsembleCard:
    return EnsembleCard((Member("a", "a"), Member("b", "b")), combine, k, **more)


def test_scores_are_combined_as_mean_as_mean_less_disagreement_or_as_the_lowest() -> None:
    """Scores 1 and 3 of the first completion: mean 2, standard deviation 1. Of the second 4 and 4."""
    by_member = [[1.0, 4.0], [3.0, 4.0]]
    assert Ensemble([], card("mean")).combined(by_member) == [2.0, 4.0]
    assert Ensemble([], card("mean_minus_std", 0.5)).combined(by_member) == [1.5, 4.0]
    assert Ensemble([], card("min")).combined(by_member) == [1.0, 4.0]


def test_members_on_one_scale_have_mean_0_and_standard_deviation_1() -> None:
    """100 and 300 become −1 and 1, as 2 and 4 do; a third, 500, becomes 3."""
    scaled = on_one_scale(card("min"), [[100.0, 300.0], [2.0, 4.0]])
    assert [(m.shift, m.scale) for m in scaled.members] == [(200.0, 100.0), (3.0, 1.0)]
    assert Ensemble([], scaled).combined([[500.0], [3.0]]) == [0.0]
    assert Ensemble([], scaled).combined([[500.0], [7.0]]) == [3.0]
    with pytest.raises(ModelError, match="the same score"):
        on_one_scale(card(), [[1.0, 1.0], [1.0, 2.0]])


def test_an_ensemble_is_heard_through_its_own_gates() -> None:
    judge = Ensemble([], card(gates={"math": Gate(1.0, 0.0, 0.5)}))
    assert judge.judge_group("math", [2.0, -1.0]) == (0, 1)
    assert judge.judge_group("math", [0.5, -1.0]) is None
    assert (judge.n_judged["math"], judge.n_abstain["math"]) == (2, 1)
    assert judge.accepts("math", 1.0) and not judge.accepts("code", 9.0)


def make(folder: Path, settings: dict[str, Any], *members: Path, labelled: bool = False) -> dict[str, Any]:
    """Runs the stage on models in folders."""
    folder.mkdir()
    inputs: dict[str, Any] = {}
    for number, member in enumerate(members, start=1):
        ref = ModelRef.open(member, Kind.REWARD_MODEL)
        inputs["reward_model" if number == 1 else f"reward_model-{number}"] = ref
    if labelled:
        inputs["completions"] = table(folder / "rows.parquet", completions())
    return run(STAGE, folder, inputs, settings)[0]


def test_members_with_other_templates_render_for_themselves(tmp_path: Path) -> None:
    one, other = save_scalar(tmp_path / "one", "qwen2"), save_scalar(tmp_path / "two", "llama")
    make(tmp_path / "both", {}, one, other)
    judge = load_judge(ModelRef.open(tmp_path / "both", Kind.REWARD_MODEL))
    alone = [load_reward_model(member).score_many(ITEMS) for member in (one, other)]
    expected = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
    assert judge.score_many(ITEMS) == pytest.approx(expected, abs=1e-5)
    assert judge.score_fitting(ITEMS) == pytest.approx(expected, abs=1e-5)
    assert not judge.reads_ids_of(load_reward_model(one).tokenizer)


def test_labelled_completions_put_members_on_one_scale_and_give_gates_and_figures(tmp_path: Path) -> None:
    one, other = save_scalar(tmp_path / "one", "qwen2"), save_scalar(tmp_path / "two", "llama")
    summary = make(tmp_path / "both", {"combine": "min"}, one, other, labelled=True)
    found = EnsembleCard.read(tmp_path / "both" / "model" / "reward_model.json")
    assert found is not None and found.gates is not None and set(found.gates) == {"sums"}
    assert all(member.scale != 1.0 for member in found.members)
    assert summary["held_out_prompts"] == 21
    assert set(summary["alone"]) == {"rm (0)", "rm (1)"}
    assert 0 <= summary["overall"]["best_of_n"] <= 1
    assert json.dumps(summary)


def test_what_is_no_ensemble_or_has_lost_a_member_is_refused(tmp_path: Path) -> None:
    one, other = save_scalar(tmp_path / "one"), save_scalar(tmp_path / "two")
    with pytest.raises(RecipeError, match="one model alone is no ensemble"):
        make(tmp_path / "alone", {}, one)
    make(tmp_path / "both", {}, one, other)
    with pytest.raises(ModelError, match="is a reward model, a policy was expected"):
        ModelRef.open(tmp_path / "both", Kind.MODEL)
    whole = ModelRef.open(tmp_path / "both", Kind.REWARD_MODEL)
    (other / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes()[:-8] + bytes(8))
    assert ModelRef.open(tmp_path / "both", Kind.REWARD_MODEL).fingerprint != whole.fingerprint
    shutil.rmtree(other)
    with pytest.raises(ModelError, match="is an ensemble that lacks a member"):
        ModelRef.open(tmp_path / "both", Kind.REWARD_MODEL)


def test_an_ensemble_of_ensembles_and_a_policy_among_the_members_are_refused(tmp_path: Path) -> None:
    one, other = save_scalar(tmp_path / "one"), save_scalar(tmp_path / "two")
    make(tmp_path / "both", {}, one, other)
    with pytest.raises(ModelError, match="is an ensemble itself"):
        make(tmp_path / "nested", {}, tmp_path / "both", one)
    problems = load_problems(f"reward_model=[{one}, {tmp_path / 'one' / 'policy'}]", tmp_path)
    assert "is a policy, a reward model was expected" in problems


def load_problems(argument: str, folder: Path) -> str:
    with pytest.raises(RecipeError) as refused:
        load_stage("ensemble", [argument, f"out={folder / 'out'}"])
    return "\n".join(refused.value.problems)


def test_a_list_of_models_is_opened_one_by_one_and_only_where_several_are_taken(tmp_path: Path) -> None:
    one, other = save_scalar(tmp_path / "one"), save_scalar(tmp_path / "two")
    recipe = load_stage("ensemble", [f"reward_model=[{one}, {other}]", f"out={tmp_path / 'out'}"])
    opened = open_inputs(recipe, recipe.steps["ensemble"], tmp_path)
    assert {name: ref.path for name, ref in opened.items() if isinstance(ref, ModelRef)} == {
        "reward_model": str(one), "reward_model-2": str(other),
    }  # fmt: skip
    with pytest.raises(RecipeError, match="one model was expected, found a list"):
        load_stage("score", [f"reward_model=[{one}, {other}]", f"completions={one}", f"out={tmp_path / 'out'}"])
