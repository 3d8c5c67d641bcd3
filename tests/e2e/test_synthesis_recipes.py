"""Every recipe of `recipes/synthesis` as shipped, on the tiny world: what it gives, and that its figures add up."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.core.records import COLUMNS, Kind
from align.core.store import SHIPPED
from align.recipe import load_recipe
from tests.e2e.command import align, manifest, rows

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "synthesis").glob("*.yaml"))
BY_NAME = pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
ENDS = {"demonstrations": Kind.DEMONSTRATIONS, "preferences": Kind.PREFERENCES}


def commands(recipe: Path) -> list[list[str]]:
    """The `align run` commands of a recipe's head, as words; a backslash carries a line on."""
    head = re.match(r"(#.*\n)+", recipe.read_text(encoding="utf-8"))
    assert head is not None
    text = re.sub(r"\\\n#\s*", " ", head[0])
    return [
        shlex.split(line.lstrip("# "), comments=True) for line in text.splitlines() if re.match(r"#\s+align run", line)
    ]


@BY_NAME
@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED["tiny-writer"].is_dir(), reason="the checkpoint of the package is not there")
def test_a_synthesis_recipe_gives_something_to_train_on_and_says_what_became_of_the_rest(
    recipe: Path, tmp_path: Path
) -> None:
    align("run", recipe, "--out", tmp_path / "run")
    steps = load_recipe(recipe).steps
    ends = [name for name in ENDS if name in steps]
    assert ends or steps[list(steps)[-1]].stage.name == "select", (
        "a recipe of this folder gives D, P, both, or a selection"
    )
    for name in ends:
        found = rows(tmp_path / "run" / name)
        assert found and set(COLUMNS[ENDS[name]]) <= set(found[0])
        assert {row["split"] for row in found} == {"train"}
        for row in found:
            assert row["prompt"][-1]["role"] == "user" and row["prompt"][-1]["content"].strip()
    for name, step in steps.items():
        done = manifest(tmp_path / "run" / name)
        if step.stage.engines and step.stage.gives.is_dataset:
            counts = list(done.summary["yield"].values())
            assert counts and all(isinstance(count, int) and count >= 0 for count in counts), name
            assert "## Yield" in (tmp_path / "run" / name / "README.md").read_text()


@BY_NAME
def test_the_commands_in_a_recipes_head_name_settings_that_it_has(recipe: Path) -> None:
    found = commands(recipe)
    assert found and all(words[2] == f"synthesis/{recipe.stem}" for words in found)
    for words in found:
        try:
            assert load_recipe(recipe, words[3:]).steps
        except RecipeError as wrong:  # files of the user's own can't be there; all else must be right
            assert all("there is no such file" in problem for problem in wrong.problems), wrong
