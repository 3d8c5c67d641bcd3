"""Recipes are checked whole before anything runs, and each message says where, what, and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.fingerprints import fingerprints
from align.recipe import load_recipe, load_stage

GOOD = """\
name: t
seed: 3
engines:
  s: {kind: "tests.fakes:SCRIPTED", model: m}
steps:
  make: {stage: "tests.fakes:MAKE", with: {count: 5}}
  tag: {stage: "tests.fakes:TAG", in: {prompts: make}}
  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: tag}, engines: {sampler: s}}
  train: {stage: "tests.fakes:TRAIN", in: {completions: sample}}
"""


def problems(tmp_path: Path, text: str, *arguments: str) -> list[str]:
    file = tmp_path / "tiny.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, arguments)
    return caught.value.problems


def step(rest: str) -> str:
    return f'steps:\n  sample: {{stage: "tests.fakes:SAMPLE", {rest}}}\n'


SAMPLED = 'in: {prompts: make}, engines: {sampler: {kind: "tests.fakes:SCRIPTED", model: m}}'
MAKE = '  make: {stage: "tests.fakes:MAKE"}\n'


def test_a_good_recipe_becomes_steps_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    lines = GOOD.splitlines()
    (tmp_path / "t.yaml").write_text("\n".join([*lines[:5], *reversed(lines[5:])]))
    recipe = load_recipe(tmp_path / "t.yaml")
    assert list(recipe.steps) == ["make", "tag", "sample", "train"]
    assert (recipe.name, recipe.seed, recipe.out) == ("t", 3, Path("runs/t"))
    assert recipe.steps["sample"].needs_steps() == ["tag"]


def test_a_steps_rows_fit_another_kind_when_their_columns_are_renamed_to_it(tmp_path: Path) -> None:
    text = """\
steps:
  prompts: {stage: prompts, with: {source: {tiny: {families: {math: 9}}}}}
  samples: {stage: reject, in: {prompts: prompts}, engines: {sampler: tiny}}
  pairs: {stage: pair, in: {completions: samples}}
  sft: {stage: sft, in: {model: tiny, demonstrations: {step: pairs, columns: {chosen: completion}}}}
"""
    (tmp_path / "tiny.yaml").write_text(text)
    assert load_recipe(tmp_path / "tiny.yaml").steps["sft"].needs_steps() == ["pairs"]
    assert problems(tmp_path, text.replace("chosen: completion", "margin: completions")) == [
        "tiny.yaml: steps.sft.in.demonstrations: 'pairs' gives PREFERENCES, DEMONSTRATIONS was expected (line 5)"
    ]


def test_an_unknown_setting_is_told_with_the_nearest_name_and_its_line(tmp_path: Path) -> None:
    text = f"""\
steps:
{MAKE}  sample:
    stage: "tests.fakes:SAMPLE"
    in: {{prompts: make}}
    engines: {{sampler: {{kind: "tests.fakes:SCRIPTED", model: m}}}}
    with:
      sample: 3
"""
    assert problems(tmp_path, text) == [
        "tiny.yaml: steps.sample.with.sample: unknown key; did you mean 'samples'? (line 8)"
    ]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = """\
nam: x
seed: 1.5
engines:
  unused: tiny
  s: {kind: transformer, model: tiny}
steps:
  make: {stage: "tests.fakes:MAKE", with: {count: 0, rate: "fast"}, wiht: {}}
  tag: {stage: tagg}
  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: mak, prompt: make}, engines: {sampler: s, juge: s}}
  "a/b": {stage: "tests.fakes:MAKE"}
"""
    told = "\n".join(problems(tmp_path, text))
    for expected in (
        "tiny.yaml: nam: unknown key; did you mean 'name'? (line 1)",
        "tiny.yaml: seed: a whole number was expected, found 1.5 (line 2)",
        "tiny.yaml: engines.unused: no step uses it; remove it",
        "tiny.yaml: engines.s.kind: 'transformer': unknown kind of engine; did you mean 'transformers'? (line 5)",
        "steps.make.with.count: expected greater than or equal to 1, found 0 (line 7)",
        'steps.make.with.rate: expected a number, found "fast" (line 7)',
        "steps.make.wiht: unknown key; did you mean 'with'?",
        "steps.tag.stage: 'tagg': unknown stage; did you mean 'tag'?",
        "steps.sample.in.prompts: 'mak': no step and no file of that name; did you mean 'make'?",
        "steps.sample.in.prompt: sample has no such input; did you mean 'prompts'?",
        "steps.sample.engines.juge: sample has no such engine; did you mean 'judge'?",
        "steps.a/b: a name of letters, digits, - and _ was expected",
    ):
        assert expected in told, expected


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("count: 3.0", "expected a whole number, found 3.0"),
        ("count: true", "expected a whole number, found true"),
        ('count: "3"', 'expected a whole number, found "3"'),
        ("shards: [a, 1]", "steps.make.with.shards[1]: expected text, found 1"),
        ("rate: -1.0", "expected greater than 0, found -1.0"),
        ("rate: yes", 'expected a number, found "yes"'),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_not_rounded(tmp_path: Path, written: str, problem: str) -> None:
    (told,) = problems(tmp_path, f'steps: {{make: {{stage: "tests.fakes:MAKE", with: {{{written}}}}}}}')
    assert problem in told


def test_numbers_and_lists_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        'steps: {make: {stage: "tests.fakes:MAKE", with: {rate: 1e-5, count: 010, shards: [a, no, 2024-01-01]}}}'
    )
    config = load_recipe(tmp_path / "t.yaml").steps["make"].config
    assert config.model_dump() == {"rate": 1e-5, "count": 10, "shards": ("a", "no", "2024-01-01"), "source": None}


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    told = problems(tmp_path, "seed: 1\nseed: 2\n" + GOOD.replace("seed: 3\n", ""))
    assert told == ["tiny.yaml: seed: given again in line 2 (line 2)"]


@pytest.mark.parametrize(
    "text", ["steps: [", "steps: {a: b: c}", "- a\n- b", "", "just text", "steps: !!python/object:x y"]
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (told,) = problems(tmp_path, text)
    assert told.startswith(("tiny.yaml", str(tmp_path)))


def test_a_missing_recipe_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_reward_model_given_for_a_policy_is_refused(tmp_path: Path) -> None:
    text = """\
steps:
  rm: {stage: "tests.fakes:REWARD"}
  train: {stage: "tests.fakes:TRAIN", in: {model: rm}}
  make: {stage: "tests.fakes:MAKE"}
  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: "step:rm"}}
"""
    assert problems(tmp_path, text) == [
        "tiny.yaml: steps.train.in.model: 'rm' gives REWARD_MODEL, a MODEL was expected (line 3)",
        "tiny.yaml: steps.sample.engines.sampler: 'rm' gives REWARD_MODEL, a MODEL was expected (line 5)",
    ]


def test_rows_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    text = f'steps:\n{MAKE}  train: {{stage: "tests.fakes:TRAIN", in: {{completions: make, model: make}}}}\n'
    assert problems(tmp_path, text) == [
        "tiny.yaml: steps.train.in.model: 'make' gives PROMPTS, a MODEL was expected (line 3)",
        "tiny.yaml: steps.train.in.completions: 'make' gives PROMPTS, COMPLETIONS was expected (line 3)",
    ]


def test_a_column_that_no_step_before_adds_is_missed_before_anything_runs(tmp_path: Path) -> None:
    text = f"""\
steps:
{MAKE}  tagged: {{stage: "tests.fakes:TAGGED", in: {{prompts: make}}}}
"""
    (told,) = problems(tmp_path, text)
    assert "steps.tagged.in.prompts: 'make' gives no column 'tags'; a `tag` or" in told
    (tmp_path / "t.yaml").write_text(
        f'steps:\n{MAKE}  tag: {{stage: "tests.fakes:TAG", in: {{prompts: make}}}}\n'
        '  tagged: {stage: "tests.fakes:TAGGED", in: {prompts: [tag]}}\n'
    )
    assert list(load_recipe(tmp_path / "t.yaml").steps) == ["make", "tag", "tagged"]


def test_a_column_that_a_local_file_lacks_is_missed_before_anything_runs(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"prompt": "hello"}) + "\n")
    text = f'steps: {{tagged: {{stage: "tests.fakes:TAGGED", in: {{prompts: {data}}}}}}}'
    (told,) = problems(tmp_path, text)
    assert f"steps.tagged.in.prompts: {data}: has no column 'tags'; it has prompt_id, prompt" in told


def test_steps_that_wait_for_each_other_are_named_in_a_loop(tmp_path: Path) -> None:
    text = """\
steps:
  a: {stage: "tests.fakes:TAG", in: {prompts: c}}
  b: {stage: "tests.fakes:TAG", in: {prompts: a}}
  c: {stage: "tests.fakes:TAG", in: {prompts: b}}
"""
    (told,) = problems(tmp_path, text)
    assert told == "tiny.yaml: steps.a: these steps wait for each other: a → c → b → a (line 2)"


def test_a_model_that_its_own_step_samples_from_is_a_loop(tmp_path: Path) -> None:
    text = f"""\
steps:
{MAKE}  sample: {{stage: "tests.fakes:SAMPLE", in: {{prompts: make}}, engines: {{sampler: "step:train"}}}}
  train: {{stage: "tests.fakes:TRAIN", in: {{completions: sample}}}}
"""
    (told,) = problems(tmp_path, text)
    assert "sample → train → sample" in told


@pytest.mark.parametrize("path", ["data/nowhere.jsonl", "./nowhere", "nowhere.parquet", "/nowhere/at/all"])
def test_a_file_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, path: str) -> None:
    (told,) = problems(tmp_path, f'steps: {{tag: {{stage: "tests.fakes:TAG", in: {{prompts: {path}}}}}}}')
    assert f"steps.tag.in.prompts: '{path}': there is no such file or folder" in told
    (told,) = problems(tmp_path, f'steps: {{make: {{stage: "tests.fakes:MAKE", with: {{source: {path}}}}}}}')
    assert f"steps.make.with.source: '{path}': there is no such file or folder" in told


def test_a_file_beside_the_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "p.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "mine" / "t.yaml").write_text(
        'steps:\n  tag: {stage: "tests.fakes:TAG", in: {prompts: p.jsonl}}\n'
        '  make: {stage: "tests.fakes:MAKE", with: {source: p.jsonl}}\n'
    )
    found = []
    for folder, name in ((tmp_path, "mine/t.yaml"), (tmp_path / "mine", "t.yaml")):
        monkeypatch.chdir(folder)
        recipe = load_recipe(Path(name))
        found.append((recipe.steps["tag"].inputs["prompts"][0].spec, fingerprints(recipe)))
    assert [spec for spec, _ in found] == ["mine/p.jsonl", "p.jsonl"]
    assert found[0][1] == found[1][1], "where a file lies is no part of the fingerprint"


def test_a_file_that_is_no_data_is_told_before_anything_runs(tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"prompt": "hello"\n')
    (told,) = problems(tmp_path, f'steps: {{tag: {{stage: "tests.fakes:TAG", in: {{prompts: {data}}}}}}}')
    assert "broken.jsonl, line 1" in told and "no JSON" in told


def test_an_input_can_be_a_hub_id_a_mapping_or_a_list(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    file = tmp_path / "t.yaml"
    inputs = f"[make, {{step: make, count: 2}}, {{path: {data}, weight: 1.0}}, openai/gsm8k]"
    file.write_text(f'steps:\n{MAKE}  tag: {{stage: "tests.fakes:TAG", in: {{prompts: {inputs}}}}}\n')
    sources = load_recipe(file).steps["tag"].inputs["prompts"]
    assert [source.step for source in sources] == ["make", "make", None, None]
    assert [source.spec for source in sources] == [
        None,
        {"count": 2},
        {"path": str(data), "weight": 1.0},
        "openai/gsm8k",
    ]


def test_a_misspelled_key_of_a_source_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    inputs = f"{{path: {data}, wieght: 1.0}}"
    (told,) = problems(tmp_path, f'steps: {{tag: {{stage: "tests.fakes:TAG", in: {{prompts: {inputs}}}}}}}')
    assert "steps.tag.in.prompts" in told and "did you mean 'weight'" in told


def test_a_missing_input_and_a_missing_engine_are_told_with_what_they_are_for(tmp_path: Path) -> None:
    assert problems(tmp_path, step("in: {}")) == [
        "tiny.yaml: steps.sample.in.prompts: missing: prompts (line 2)",
        "tiny.yaml: steps.sample.engines.sampler: missing: what samples (line 2)",
    ]


def test_a_key_in_the_wrong_place_is_told_its_place(tmp_path: Path) -> None:
    told = problems(tmp_path, "steps:\n" + MAKE + f'  sample: {{stage: "tests.fakes:SAMPLE", samples: 3, {SAMPLED}}}\n')
    assert told == ["tiny.yaml: steps.sample.samples: unknown key; write it under `with` (line 3)"]


def test_a_step_where_an_engine_was_meant_is_told_how_to_write_it(tmp_path: Path) -> None:
    text = f"""\
steps:
{MAKE}  train: {{stage: "tests.fakes:TRAIN"}}
  sample: {{stage: "tests.fakes:SAMPLE", in: {{prompts: make}}, engines: {{sampler: train}}}}
"""
    (told,) = problems(tmp_path, text)
    assert "'train' is a step and no engine; write step:train for the model that it makes" in told


def test_only_a_stage_that_trains_may_ask_for_processes(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, 'steps: {make: {stage: "tests.fakes:MAKE", processes: 2}}')
    assert "steps.make.processes: make runs in one process only, found 2" in told


def test_arguments_change_a_recipe_and_are_checked_like_it(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(GOOD)
    arguments = ["steps.make.with.count=7", "steps.make.with.rate=1e-5", "seed=9", "engines.s.suffix=!", "out=there"]
    recipe = load_recipe(file, arguments)
    assert recipe.steps["make"].config.model_dump() == {"count": 7, "rate": 1e-5, "shards": (), "source": None}
    assert (recipe.seed, recipe.out) == (9, Path("there"))
    assert recipe.steps["sample"].engines["sampler"].settings.model_dump()["suffix"] == "!"


def test_arguments_that_lead_nowhere_are_refused_with_the_nearest(tmp_path: Path) -> None:
    arguments = ["steps.mak.with.count=7", "steps.make.with.cout=7", "sed=1", "count", "engines.p.model=tiny"]
    assert problems(tmp_path, GOOD, *arguments) == [
        "tiny.yaml: steps.mak: there is no such step; did you mean 'make'? (line 5)",
        "tiny.yaml: 'count': settings are given as key=value; write count=…",
        "tiny.yaml: engines.p: there is no such engine; known: s (line 3)",
        "tiny.yaml: sed: unknown key; did you mean 'seed'?",
        "tiny.yaml: steps.make.with.cout: unknown key; did you mean 'count'? (line 6)",
    ]


def test_an_argument_goes_into_an_engine_that_is_written_short(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        f'engines: {{e: "step:train"}}\nsteps:\n{MAKE}  train: {{stage: "tests.fakes:TRAIN"}}\n'
        '  sample: {stage: "tests.fakes:SAMPLE", in: {prompts: make}, engines: {sampler: e}}\n'
    )
    spec = load_recipe(file, ["engines.e.slots=4"]).steps["sample"].engines["sampler"]
    assert (spec.kind, spec.model.step, spec.settings.model_dump()["slots"]) == ("transformers", "train", 4)


def test_an_argument_goes_into_an_input_that_is_written_short(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f'steps:\n{MAKE}  tag: {{stage: "tests.fakes:TAG", in: {{prompts: make}}}}\n')
    (source,) = load_recipe(file, ["steps.tag.in.prompts.fraction=0.5"]).steps["tag"].inputs["prompts"]
    assert (source.step, source.spec) == ("make", {"fraction": 0.5})
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    arguments = [f"prompts={data}", "prompts.count=1", "out=o"]
    (source,) = load_stage("tests.fakes:TAG", arguments).steps["tag"].inputs["prompts"]
    assert source.spec == {"path": str(data), "count": 1}


def test_a_stage_alone_takes_inputs_engines_and_settings_as_flat_keys(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    file = tmp_path / "settings.yaml"
    file.write_text(f"prompts: {data}\nsamples: 3\n")
    arguments = ["samples=4", "sampler={kind: 'tests.fakes:SCRIPTED', model: m}", "sampler.suffix=x", "out=o", "seed=5"]
    recipe = load_stage("tests.fakes:SAMPLE", arguments, file)
    (only,) = recipe.steps.values()
    assert only.config.model_dump()["samples"] == 4
    assert only.engines["sampler"].settings.model_dump()["suffix"] == "x"
    assert (recipe.seed, recipe.out, recipe.folder("sample")) == (5, Path("o"), Path("o"))


def test_a_stage_alone_tells_its_problems_by_the_keys_that_were_written() -> None:
    with pytest.raises(RecipeError) as caught:
        load_stage("tests.fakes:SAMPLE", ["sampels=4", "max_tokens=many", "prompts=nowhere.jsonl"])
    assert caught.value.problems == [
        "align tests.fakes:SAMPLE: sampels: unknown key; did you mean 'samples'?",
        "align tests.fakes:SAMPLE: out is missing: the folder for the result, such as out=runs/sample",
        'align tests.fakes:SAMPLE: max_tokens: expected a whole number, found "many"',
        "align tests.fakes:SAMPLE: prompts: 'nowhere.jsonl': there is no such file or folder",
        "align tests.fakes:SAMPLE: sampler: missing: what samples",
    ]
