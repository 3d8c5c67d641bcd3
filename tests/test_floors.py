"""The architecture's rules: imports only go down, help is quick, every setting is read, shipped recipes are sound."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from align.recipe import load_recipe
from align.settings import stage_keys
from align.shipped import shipped
from align.stages import TABLE, load

ROOT = Path(__file__).parents[1]
PACKAGES = ("align", "data_synthesis", "reward")

FLOORS: list[tuple[str, ...]] = [
    ("align.core",),
    ("align.tiny.world", "align.tiny.corpus"),
    ("reward",),
    ("data_synthesis", "align.train", "align.evaluate"),
    ("align.stages", "align.yamlfile", "align.progress"),
    ("align.tiny.make", "align.tiny.chores", "align.tiny.solve", "align.tiny.habit", "align.tiny.writer"),
    ("align.backends", "align.plan", "align.tiny.rater"),
    ("align.settings", "align.outside", "align.reader", "align.fit", "align.recipe"),
    ("align.fingerprints", "align.lock", "align.folders", "align.inputs", "align.launch", "align.pipeline"),
    ("align.report", "align.forecast", "align.overview", "align.ladder", "align.helptext", "align.shipped"),
    ("align.annotate", "align.doctor", "align.chat", "align.export", "align.replay"),
    ("align.cli",),
]
"""From the ground up. A module may import from its own floor and from those below it."""


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def floor_of(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


@cache
def said_in(path: Path) -> tuple[list[str], set[str]]:
    """What a file imports, and the names of the attributes that it reads."""
    imported, attributes = list[str](), set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            imported += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
    return imported, attributes


def test_every_module_has_its_floor() -> None:
    bare = {"align", "align.recipes", "align.tiny", "align.tiny.base"}
    assert [name for name, _ in modules() if floor_of(name) is None and name not in bare] == []


def test_imports_only_go_down() -> None:
    wrong = []
    for name, path in modules():
        floor = floor_of(name)
        for target in said_in(path)[0]:
            other = floor_of(target) if target.split(".")[0] in PACKAGES else None
            if floor is not None and other is not None and other > floor:
                wrong.append(f"{name} (floor {floor}) imports {target} (floor {other})")
    assert wrong == []


def test_the_packages_themselves_are_empty() -> None:
    parts = ("align/train", "align/evaluate", "align/report", "align/annotate", "align/tiny")
    for package in ("align", "data_synthesis", "reward", *parts):
        assert ast.parse((ROOT / package / "__init__.py").read_text()).body[1:] == [], package


def loaded_by(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_command_line_is_imported_without_torch_and_other_heavy_things() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "trl", "scipy", "sklearn", "matplotlib"}
    assert loaded_by("import align.cli") & heavy == set()


def test_checking_a_recipe_and_the_help_of_any_stage_load_no_torch() -> None:
    names = ", ".join(repr(verb) for verb in TABLE)
    statement = f"import align.recipe, align.pipeline, align.stages\nfor verb in [{names}]: align.stages.load(verb)"
    assert loaded_by(statement) & {"torch", "transformers", "trl"} == set()


def test_help_takes_little_more_than_the_libraries_it_stands_on() -> None:
    """Of processor time, best of several, in turn with the bare libraries: a slow or busy machine slows both.

    A help that imports one of our heavy libraries takes ten times as long as these.
    """

    def cpu_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = "import typer, pydantic, rich.console, rich.table, rich.panel, rich.markdown"
    times = [(cpu_s("-m", "align.cli", "--help"), cpu_s("-c", libraries)) for _ in range(5)]
    helps, bare = zip(*times, strict=True)
    assert min(helps) < 3 * min(bare)


@pytest.mark.parametrize("verb", TABLE)
def test_the_table_tells_of_a_stage_what_the_stage_tells_itself(verb: str) -> None:
    stage = load(verb)
    assert (stage.name, stage.summary) == (verb, TABLE[verb][1])


@pytest.mark.parametrize("verb", TABLE)
def test_the_keys_of_a_stage_do_not_collide(verb: str) -> None:
    stage = load(verb)
    keys = [*stage.needs, *stage.engines, *stage.config.model_fields]
    assert len(keys) == len(set(keys))
    assert set(stage_keys(stage)).isdisjoint({"out", "seed", "processes", "overwrite"})
    assert set(stage_keys(stage)) - set(keys) <= {
        "device",
        "precision",
        "micro_batch_size",
        "gradient_checkpointing",
        "save_every",
        "report_to",
    }
    assert set(stage.reads) <= set(stage.config.model_fields) and set(stage.optional_engines) <= set(stage.engines)


@pytest.mark.parametrize("verb", TABLE)
def test_every_setting_has_a_meaning_and_is_read_somewhere(verb: str) -> None:
    """Read: the stage's module, or one of ours that it imports, has an attribute access of that name (`config.x`)."""
    files = dict(modules())
    waiting, read = [TABLE[verb][0].split(":")[0]], set[str]()
    while waiting:
        path = files.pop(waiting.pop(), None)
        if path is not None:
            imported, attributes = said_in(path)
            read |= attributes
            waiting += imported
    for name, field in load(verb).config.model_fields.items():
        assert field.description, f"{verb}: {name} has no description"
        assert name in read, f"{verb}: nothing reads {name}"


RECIPES = list(shipped())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_sound_and_begins_with_what_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_recipe(path)
    assert path.read_text().startswith("# ")
