"""The documents are true where a program can tell: commands, settings and their defaults, paths, links."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.annotate import commands as annotation
from align.cli import app
from align.settings import stage_keys
from align.shipped import name_of, shipped
from align.stages import TABLE, load
from align.tiny.make import make
from align.train.replay import CHANGEABLE
from align.yamlfile import split_argument

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *([ROOT / "README.md"] if (ROOT / "README.md").exists() else [])]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

ALWAYS = {"out", "seed", "overwrite"}
"""Keys of every stage that is run alone."""


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `align …` line in code blocks, fenced or indented; lines that end with a backslash go on."""
    indented = re.findall(r"^    (align .*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    blocks = "\n".join([content for _, content in fenced(text)] + indented).replace("\\\n", " ")
    for line in blocks.splitlines():
        words = line.split()
        if words[:1] == ["align"] and not words[1].endswith(":"):  # "align sft: …" is what a command printed
            yield shlex.split(line, comments=True)


@cache
def recipes() -> dict[str, Any]:
    """Every recipe that the documents may name: the shipped ones, and those that a document shows; by name."""
    known = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped()}
    for page in PAGES:
        for language, content in fenced(page.read_text(encoding="utf-8")):
            found = yaml.safe_load(content) if language == "yaml" else None
            if isinstance(found, dict) and "steps" in found:
                known[found["name"]] = found
    return known


def problems_of_stage(verb: str, words: list[str]) -> list[str]:
    stage = load(verb)
    known = {*stage_keys(stage), *ALWAYS, *(["processes"] if stage.trains else [])}
    for option in annotation.SETTINGS.keys() & set(words) if verb == "rank" else ():
        known = set(annotation.SETTINGS[option].model_fields)  # another command under the same verb
    if verb == "replay" and "=" not in words[0]:
        known |= set(CHANGEABLE)  # `align replay FOLDER` takes them for changes
    arguments = [word for word in words if not word.startswith("-") and word not in ("…", "...")]
    if arguments and "=" not in arguments[0]:
        arguments = arguments[1:]  # FILE.yaml
    keys = [argument.partition("=")[0].split(".")[0] for argument in arguments]
    return [f"align {verb}: no key {key!r}" for key in keys if key not in known]


def problems_of_recipe(name: str, words: list[str]) -> list[str]:
    stem = Path(name).stem
    recipe = recipes().get(stem, recipes().get(stem.removeprefix("my_")))
    if recipe is None:
        return [] if name == "RECIPE" else [f"no recipe {name!r}"]
    wrong = []
    for path in (word.partition("=")[0].split(".") for word in words if "=" in word):
        if path[0] in ("name", "seed", "out"):
            continue
        entry = (recipe.get(path[0]) or {}).get(path[1])
        if entry is None:
            wrong.append(f"{name}: no {'.'.join(path[:2])}")
        elif path[0] == "steps" and len(path) > 3 and stage_keys(load(entry["stage"])).get(path[3]) != path[2]:
            wrong.append(f"{name}: no {'.'.join(path[:4])}")
    return wrong


def problems_of(words: list[str]) -> list[str]:
    verb, rest = words[1], words[2:]
    others = [command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands]
    if verb.startswith("-") or verb == "STAGE" or ":" in verb:
        return []
    if verb in TABLE:
        return problems_of_stage(verb, rest)
    if verb in ("run", "check"):
        return problems_of_recipe(rest[0], rest[1:])
    if verb == "make-tiny":
        known = inspect.signature(make).parameters
        return [f"make-tiny: no key {word!r}" for word in rest if "=" in word and word.partition("=")[0] not in known]
    if verb == "recipes":
        names = [name_of(path) for path in shipped()]
        return [] if not rest or (rest[0] == "copy" and rest[1] in [*names, "NAME"]) else [f"recipes: {rest}"]
    return [] if verb in others else [f"no command {verb!r}"]


@by_page
def test_every_command_and_every_key_in_a_code_block_exists(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    assert [problem for words in found for problem in problems_of(words)] == []


def test_wrong_commands_are_found() -> None:
    text = (
        "```\nalign sft model=tiny demonstration=x \\\n  out=y\nalign rejct\nalign run sft steps.sft.with.beta=1\n"
        "align run dpo steps.sft.with.epochs=1\nalign recipes copy nothing\n```\n\n    align make-tiny step=3  # it\n"
    )
    assert [problem for words in commands(text) for problem in problems_of(words)] == [
        "align sft: no key 'demonstration'",
        "no command 'rejct'",
        "sft: no steps.sft.with.beta",
        "dpo: no steps.sft",
        "recipes: ['copy', 'nothing']",
        "make-tiny: no key 'step=3'",
    ]


def test_the_steps_of_every_recipe_in_the_documents_have_known_stages_and_keys() -> None:
    for name, recipe in recipes().items():
        for step, written in recipe["steps"].items():
            places = stage_keys(load(written["stage"]))
            for place in ("in", "with", "engines", "speed"):
                for key in written.get(place, {}) if name != "wrong" else ():
                    assert places.get(key) == place, f"{name}: steps.{step}.{place}.{key}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@by_page
def test_every_file_of_ours_that_is_named_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:align|reward|data_synthesis|tests|benchmarks|recipes|docs)/[\w./-]*)`", page.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_architecture_names_every_module_of_align_and_its_core() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    above = [path.name for path in (ROOT / "align").glob("*.py") if path.name != "__init__.py"]
    core = [path.name for path in (ROOT / "align" / "core").glob("*.py") if path.name != "__init__.py"]
    engines = [path.name for path in (ROOT / "align" / "core" / "engines").glob("[!_]*.py")]
    assert [name for name in [*above, *core, *engines] if name not in text] == []


def section(verb: str) -> str:
    text = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(verb)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/stages.md has no section {verb!r}"
    return found[1]


@pytest.mark.parametrize("verb", TABLE)
def test_every_stage_has_its_section_with_a_command_that_runs_it(verb: str) -> None:
    every = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    assert section(verb)
    assert any(words[1] == verb and words[-1].startswith("out=") for words in commands(every))


@pytest.mark.parametrize("verb", TABLE)
def test_the_settings_that_a_section_names_exist_and_have_the_default_that_it_states(verb: str) -> None:
    """A setting stands there as `name` (default…): a number, true, false, none, or `text`."""
    fields = load(verb).config.model_fields
    stated = re.findall(
        r"`([a-z_]+)` \((`[^`]+`|[^;:,) ]+)", re.sub(r"^```.*?^```$", "", section(verb), flags=re.M | re.S)
    )
    for name, value in stated:
        assert name in stage_keys(load(verb)), f"{verb}: no setting {name}"
        if name not in fields:
            continue
        default: Any = fields[name].default
        if value in ("true", "false"):
            assert default is (value == "true"), f"{verb}: {name}"
        elif value in ("none", "all"):
            assert default is None, f"{verb}: {name}"
        elif re.fullmatch(r"[\d.e-]+", value):
            assert default == pytest.approx(float(value)), f"{verb}: {name}"
        elif value.startswith("`"):
            assert default == split_argument("value=" + value.strip("`"))[1], f"{verb}: {name}"
