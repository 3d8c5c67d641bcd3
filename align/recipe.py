"""Recipes: what a user wrote, read and checked whole before anything runs.

    name: tiny
    seed: 17
    engines:
      policy: step:sft                       # or a folder, a Hub id, `tiny`, or {kind: …, model: …, settings}
    steps:
      prompts: {stage: prompts, with: {source: data/math.jsonl}}
      reject:  {stage: reject, in: {prompts: prompts}, engines: {sampler: policy}, with: {samples: 8}}

An input is the name of a step, a path, a Hub id, a mapping with one of these under `step` or `path` and how to read it,
or a list of such; where a model is wanted, also the name of an engine, for the model that it samples from. A step's
name comes first, then an engine's: write `./data` for a folder that is called like a step. A path is looked for from
the current folder, then from the recipe's own.
All problems are told at once (`RecipeError.problems`), each as `file: where: what; remedy (line N)`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align import yamlfile
from align.core.errors import RecipeError
from align.fit import fit
from align.outside import check_outside
from align.plan import Recipe
from align.reader import Reader
from align.settings import found, mapping, scalar, stage_keys
from align.stages import load, nearest
from align.yamlfile import Problems

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_KEYS = ("name", "description", "seed", "out", "engines", "steps")


def load_recipe(path: Path, arguments: Sequence[str] = (), out: Path | None = None) -> Recipe:
    """Reads a recipe, applies `key.path=value` arguments and checks it.

    Raises:
        RecipeError: with every problem that was found.
    """
    document = yamlfile.read(path)
    data = document.data
    if not isinstance(data, dict):
        raise RecipeError(f"{path.name}: a mapping with `steps` was expected, found {found(data)}")
    problems = Problems(path.name, document)
    for argument in arguments:
        try:
            keys, value = yamlfile.split_argument(argument)
        except RecipeError as problem:
            problems.add((), str(problem))
            continue
        named = data.get(keys[0]) if keys[0] in ("steps", "engines") else None
        if len(keys) > 1 and isinstance(named, dict) and keys[1] not in named:
            problems.add(keys[:2], f"there is no such {keys[0][:-1]}; {nearest(keys[1], list(named))}")
            continue
        _open_short(data, keys, data.get("steps") or ())
        yamlfile.put(data, keys, value)
    data.setdefault("name", path.stem)
    return _check(data, problems, out, path.parent)


def load_stage(verb: str, arguments: Sequence[str], file: Path | None = None) -> Recipe:
    """One stage run alone, as a recipe of one step; `out` is the step's own folder.

    Raises:
        RecipeError: with every problem that was found.
    """
    stage = load(verb)
    document = yamlfile.read(file) if file else yamlfile.Document({})
    if not isinstance(document.data, dict):
        raise RecipeError(f"{file}: a mapping of settings was expected, found {found(document.data)}")
    problems = Problems(file.name if file else f"align {verb}", document, hidden=3)
    step: dict[str, Any] = {"stage": verb, "in": {}, "with": {}, "engines": {}, "speed": {}}
    data: dict[str, Any] = {"name": stage.name, "steps": {stage.name: step}}
    places = stage_keys(stage)
    given: list[tuple[tuple[str, ...], Any]] = [((key,), value) for key, value in document.data.items()]
    for argument in arguments:
        try:
            given.append(yamlfile.split_argument(argument))
        except RecipeError as problem:
            problems.add((), str(problem))
    for keys, value in given:
        if keys[0] in ("out", "seed"):
            yamlfile.put(data, keys, value)
        elif keys[0] == "processes":
            yamlfile.put(step, keys, value)
        elif keys[0] in places:
            _open_short(step, (places[keys[0]], *keys), ())
            yamlfile.put(step[places[keys[0]]], keys, value)
        else:
            hint = nearest(keys[0], [*places, "out", "seed", "processes"])
            problems.add(("", "", "", keys[0]), f"unknown key; {hint}")
    if not data.get("out"):
        problems.add((), f"out is missing: the folder for the result, such as out=runs/{stage.name}")
    return _check(data, problems, None, file.parent if file else None, alone=True)


def _open_short(data: dict[str, Any], keys: tuple[str, ...], steps: Collection[str]) -> None:
    """Makes `policy: tiny` or `prompts: p.jsonl` a mapping where an argument such as `policy.slots=8` goes into it."""
    for above, key in zip(("", *keys), keys[:-1], strict=False):
        if isinstance(short := data.get(key), str) and above in ("engines", "in"):
            data[key] = {"model" if above == "engines" else "step" if short in steps else "path": short}
        if not isinstance(data.get(key), dict):
            return
        data = data[key]


def _check(
    data: Mapping[str, Any], problems: Problems, out: Path | None, beside: Path | None, alone: bool = False
) -> Recipe:
    """Turns what was written into a recipe, or tells all that is wrong with it."""
    for key in data:
        if key not in _KEYS:
            problems.add((key,), f"unknown key; {nearest(key, _KEYS)}")
    name = scalar(data, ("name",), str, "recipe", problems)
    seed = scalar(data, ("seed",), int, 0, problems)
    folder = out or Path(scalar(data, ("out",), str, f"runs/{name}", problems)).expanduser()
    engines, raw_steps = mapping(data, ("engines",), problems), mapping(data, ("steps",), problems)
    if not raw_steps:
        problems.add(("steps",), "missing; a recipe has at least one step")
    reader = Reader(raw_steps, engines, problems, beside)
    steps = {}
    for step_name, raw in raw_steps.items():
        if not _NAME.fullmatch(step_name):
            problems.add(("steps", step_name), "a name of letters, digits, - and _ was expected; it is a folder's too")
        if step := reader.step(step_name, raw):
            steps[step_name] = step
    for engine_name in engines:
        if engine_name not in reader.used:
            reader.engine(engines[engine_name], ("engines", engine_name))
            problems.add(("engines", engine_name), "no step uses it; remove it, or name it under a step's engines")
    by_case = sorted(raw_steps, key=str.lower)
    for one, other in itertools.pairwise(by_case):
        if one.lower() == other.lower():
            problems.add(("steps", other), f"differs from '{one}' only in case; many file systems don't see that")
    ordered = fit(steps, problems)
    for step in {**steps, **ordered}.values():
        check_outside(step, problems)
    problems.stop()
    return Recipe(name, seed, folder, ordered, data, alone)
