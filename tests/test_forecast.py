"""What `align check` tells of the sampling steps before a run, and after one that was interrupted."""

from __future__ import annotations

from pathlib import Path

from align.forecast import Forecast, forecasts
from align.pipeline import plan
from align.recipe import load_recipe
from tests.e2e.command import align, refused
from tests.test_pipeline import write
from tests.test_resuming import rejecting

TWICE = """\
engines:
  s: {kind: "tests.fakes:SCRIPTED", model: m}
  j: {kind: "tests.fakes:SCRIPTED", model: j, prompt_price: 1000000}
steps:
  make: {stage: "tests.fakes:MAKE", with: {count: 20}}
  first: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: s}, with: {samples: 3}}
  second: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: s, judge: j}, with: {samples: 3}}
"""


def of(file: Path, out: Path, *arguments: str) -> list[Forecast]:
    recipe = load_recipe(file, arguments, out)
    return list(forecasts(recipe, plan(recipe)))


def words(text: str) -> str:
    return " ".join(text.split())


def test_before_a_run_the_limits_are_told(tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    assert of(file, out) == [
        Forecast(
            step="sample", role="sampler", model="m", prompts=20, samples=3, completions=60, kept=0, to_sample=60,
            tokens_each=16, told_by="", cost=None,
        )
    ]  # fmt: skip
    said = words(align("check", file, "--out", out))
    assert "sample sampler: m ≤ 20 × 3 ≤ 960 ≤ 16 " in said
    assert "up to 60 completions, 960 tokens" in said and not out.exists()


def test_what_an_interrupted_run_left_is_told_and_makes_the_expectation(tmp_path: Path) -> None:
    """34 prompts x 4 samples were kept: 136 of 40 x 6 = 240; 104 are to come, of the 4 words `Is it 3? #0`: 416 tokens.

    A million tokens of completions cost 1,000 USD, of prompts 10,000. 104 / 6 prompts are to come; 10 of 40 have 8
    characters and 30 have 9, so 8.75 / 4 tokens: 416 / 1000 + 104 / 6 * 8.75 / 4 / 100 = 0.7952 USD.
    """
    file, out = rejecting(tmp_path), tmp_path / "run"
    (tmp_path / "down").touch()
    refused("run", file, "--out", out)
    prices = [
        f"steps.reject.engines.sampler.{name}_price={usd}" for name, usd in (("completion", 1e3), ("prompt", 1e4))
    ]
    (told,) = of(file, out, *prices)
    assert (told.prompts, told.samples, told.kept, told.to_sample) == (40, 6, 136, 104)
    assert (told.tokens_each, told.told_by) == (4, "as those kept") and f"{told.cost:.4f}" == "0.7952"
    said = words(align("check", file, "--out", out, *prices))
    assert "reject reject prompts begun" in said
    assert "reject sampler: m ≤ 40 × 6 136 about 416 0.80 about 4, as those kept" in said
    assert "up to 104 completions, 416 tokens, 0.80 USD, besides 136 completions kept from before" in said
    (other,) = of(file, out, "steps.reject.with.samples=7")
    assert other.kept is None and other.to_sample == 280, "whether they fit other settings isn't known before a run"
    assert "≤ 40 × 7 of other settings about 1,120" in words(
        align("check", file, "--out", out, "steps.reject.with.samples=7")
    )


def test_a_finished_step_of_the_same_model_tells_what_to_expect_of_another(tmp_path: Path) -> None:
    """Completions of the first step have the 4 words `say 0 5 #0`. Of the judge nothing is known but its limit of 4.

    At 1 USD a token it reads 60 times a prompt (7 or 8 characters, so 7.5 / 4 tokens) and a completion (4): 352.50 USD.
    """
    file, out = tmp_path / "t.yaml", tmp_path / "run"
    file.write_text(TWICE)
    assert [(each.step, each.told_by, each.cost) for each in of(file, out)] == [
        ("first", "", None), ("second", "", None), ("second", "", None),
    ]  # fmt: skip
    refused("run", file, "--out", out, "steps.second.with.fail=true")
    sampler, judge = of(file, out)
    assert (sampler.tokens_each, sampler.told_by, sampler.to_sample) == (4, "as in first", 60)
    assert (judge.role, judge.model, judge.tokens_each, judge.told_by, judge.cost) == ("judge", "j", 4, "", 352.5)
