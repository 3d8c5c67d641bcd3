"""A role that takes several engines: how a recipe names them, what they cost, and what a stage sees."""

from __future__ import annotations

from pathlib import Path

from align.core.manifest import Manifest
from align.core.store import Table
from align.forecast import forecasts
from align.pipeline import plan, run
from align.recipe import load_recipe, load_stage
from tests.test_recipe import problems

HEAD = """\
engines:
  small: {kind: "tests.fakes:SCRIPTED", model: small}
  j: {kind: "tests.fakes:SCRIPTED", model: j}
steps:
  make: {stage: "tests.fakes:MAKE", with: {count: 4}}
"""
LARGE = '{kind: "tests.fakes:SCRIPTED", model: large, suffix: "!"}'
SAMPLE = '  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: %s, judge: %s}}\n'


def test_each_engine_of_a_list_samples_with_a_cache_and_an_origin_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(HEAD + SAMPLE % (f"[small, {LARGE}]", "j"))
    recipe = load_recipe(file, (), tmp_path / "run")
    asked = {each.role: (each.model, each.completions) for each in forecasts(recipe, plan(recipe))}
    # 4 prompts, 2 samples of each engine; the judge reads those of both
    assert asked == {"sampler": ("small", 8), "sampler-2": ("large", 8), "judge": ("j", 16)}
    run(recipe)
    rows = list(Table.open(tmp_path / "run" / "sample").rows())
    assert [row["generator"] for row in rows] == ["small"] * 8 + ["large"] * 8
    assert rows[8]["completion"][0]["content"].endswith("#0!")
    manifest = Manifest.read(tmp_path / "run" / "sample")
    assert manifest is not None
    counts = {key: (origin.name, origin.model_dump().get("sampled")) for key, origin in manifest.engines.items()}
    assert counts == {"sampler": ("small", 8), "sampler-2": ("large", 8), "judge": ("j", None)}


def test_a_list_on_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    run(load_stage("tests.fakes:MAKE", [f"out={folder}"]))
    engines = f"sampler=[{LARGE}, {LARGE}]"
    recipe = load_stage("tests.fakes:SAMPLE", [f"prompts={folder}", engines, f"out={tmp_path / 'out'}"])
    assert list(recipe.steps["sample"].engines) == ["sampler", "sampler-2"]


def test_a_list_where_one_engine_is_wanted_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    told = problems(tmp_path, HEAD + SAMPLE % ("[]", "[j, small]"))
    assert "tiny.yaml: steps.sample.engines.sampler: the list is empty (line 6)" in told
    assert "tiny.yaml: steps.sample.engines.judge: one engine was expected, found a list (line 6)" in told
    (problem,) = problems(tmp_path, HEAD + SAMPLE % ("[small, smal]", "j"))
    assert "steps.sample.engines.sampler" in problem and "did you mean 'small'?" in problem
