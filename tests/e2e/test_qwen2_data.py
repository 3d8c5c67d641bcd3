"""The report's whole synthesis, recipes/qwen2_data.yaml, with the tiny world in the place of models and sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.core.records import COLUMNS, Kind
from align.core.store import SHIPPED
from tests.e2e.command import align, jsonl, manifest, rows

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen2_data.yaml"
TAGS = "Tag this instruction: {instruction}"


def tiny(seed: int, **families: int) -> str:
    return json.dumps({"tiny": {"families": families, "seed": seed}})


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED["tiny-writer"].is_dir(), reason="the checkpoint of the package is not there")
def test_a_whole_d_and_p_come_of_every_method_of_the_report(tmp_path: Path) -> None:
    """Every method must have its share in D; each setting here is one that the tiny models need."""
    passages = [{"text": "Monday, Tuesday, Wednesday"}, {"text": "one, two, three, four"}, {"text": "a, b, c"}]
    heldout = jsonl(tmp_path / "heldout.jsonl", [{"prompt": "Copy these words: sun, sea."}])
    judged = {"judge_template": "tiny_judge", "judge_max_tokens": 96, "max_error_share": 1.0}
    curated = {"judge_template": "tiny/curate", "judge_max_tokens": 24, "judge_highest": 5.0, "judge_threshold": 4.5}
    asked = {"templates": "tiny", "max_tokens": 96}
    settings = {
        "general": {"source": tiny(31, math=6, format=8), "deduplicate": "exact"},
        "clean": {"against": [str(heldout)]},
        "tagged": {"template": TAGS, "max_tokens": 64},
        "ontology": {"min_count": 1, "min_support": 2},
        "selected": {"count": 8, **judged},
        "evolved": {**asked, "rounds": 1, "nodes": [1], "min_growth": 1, "max_words": 40, "tag_template": TAGS,
                    "judge_max_tokens": 32},
        "ranked": {"samples": 1, "max_tokens": 64, "judging": "scores", "judge_threshold": 1.0, **judged},
        "math": {"source": tiny(32, math=8), "reference_from": None},
        "rejected": {"samples": 2, "max_tokens": 96, **judged},
        "code": {"source": tiny(33, code=6), "reference_from": None},
        "executed": {"samples": 2, "max_tokens": 96},
        "constraints": {"templates": "tiny", "seeds": ["Use upper case.", "End with DONE."], "new": 1, "shown": 1,
                        "verifiers": 2, "max_tokens": 200},
        "constrained": {"per_constraint": 3},
        "followed": {"samples": 2, "max_tokens": 48, "judge_template": "follow_tiny", "judge_max_tokens": 16,
                     "judge_threshold": 0.0},
        "repurposed": {**asked, **curated, "text": "text", "whole": True, "min_words": 2, "dev": 0.0, "test": 0.0,
                       "judge_threshold": 1.0, "max_error_share": 1.0},
        "played": {**asked, **curated, "judge_template": "tiny/role", "judge_threshold": 1.0, "max_error_share": 1.0,
                   "dev": 0.0, "test": 0.0},
        "requests": {"source": tiny(34, benign=3, harmful=3)},
        "alike": {"templates": "tiny", "seeds": "none", "max_tokens": 32},
        "principled": {
            "templates": "tiny", "constitution": "tiny", "max_tokens": 48, "max_error_share": 1.0,
            "judge_template": "Score 1 to 10 by: {principle}\nQuestion: {instruction}\nAnswer: {completion}",
        },
        "D": {"against": [str(heldout)]},
        "P": {"against": [str(heldout)]},
    }  # fmt: skip
    overrides = [
        f"steps.{step}.with.{key}={value if isinstance(value, str) and value.startswith('{') else json.dumps(value)}"
        for step, with_ in settings.items()
        for key, value in with_.items()
    ]
    models = {"policy": "tiny-writer", "small": "tiny", "writer": "tiny-writer", "judge": "tiny-writer"}
    overrides += [f"engines.{name}.model={model}" for name, model in models.items()]
    characters = [
        {"name": name, "facts": f"{name} has 3 {pet}. {name} has 5 {other}."}
        for name, pet, other in (("Ann", "cats", "dogs"), ("Tom", "pigs", "hens"))
    ]
    overrides += [
        f"steps.repurposed.in.passages={jsonl(tmp_path / 'passages.jsonl', passages)}",
        f"steps.played.in.profiles={jsonl(tmp_path / 'profiles.jsonl', characters)}",
    ]
    align("run", RECIPE, *overrides, "--out", tmp_path / "run")
    d, p = rows(tmp_path / "run" / "D"), rows(tmp_path / "run" / "P")
    assert d and set(COLUMNS[Kind.DEMONSTRATIONS]) <= set(d[0])
    assert p and set(COLUMNS[Kind.PREFERENCES]) <= set(p[0])
    for step in ("rejected", "executed", "followed", "repurposed", "played", "principled"):
        made = {row["prompt_id"] for row in rows(tmp_path / "run" / step) if row["kept"]}
        assert made & {row["prompt_id"] for row in d}, f"{step} has no part in D"
    assert manifest(tmp_path / "run" / "D").rows == len(d)
