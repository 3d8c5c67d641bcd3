"""What lies outside a recipe: models, data and files, looked at before anything runs, as far as that is quick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.backends import backend
from align.core.errors import AlignError, ModelError, RecipeError
from align.core.fingerprint import content_fingerprint
from align.core.readers import SUFFIXES
from align.core.records import Kind
from align.core.source_spec import parse_sources
from align.core.sources import read_rows, source_fingerprint
from align.core.stage import Need
from align.core.store import ModelRef
from align.core.trackers import missing
from align.plan import Source, Step
from align.settings import wants_model
from align.yamlfile import Problems


def check_outside(step: Step, problems: Problems) -> None:
    """Notes models of the wrong kind, data that can't be read as is needed, missing files and trackers' packages."""
    for name, sources in step.inputs.items():
        need = step.stage.needs[name]
        for source in sources:
            if wants_model(need):
                _check_model(source, need.kind, problems)
            else:
                _check_data(source, need, problems)
    for engine in step.engines.values():
        if backend(engine.kind).local:
            _check_model(engine.model, Kind.MODEL, problems)
    for role, name in step.stage.served.items():
        if role in step.engines and name in step.inputs:
            _check_served(step, role, name, problems)
    for name in step.speed.get("report_to", ()):
        if problem := missing(name):
            problems.add(("steps", step.name, "speed", "report_to"), f"{name}: {problem}")
    for key in step.stage.reads:
        for text in _texts(getattr(step.config, key, None)):
            if key not in step.stage.made_later and _names_missing_file(text):
                problems.add(("steps", step.name, "with", key), f"'{text}': there is no such file or folder")


def _check_model(source: Source, kind: Kind | tuple[Kind | None, ...] | None, problems: Problems) -> None:
    if source.step is None:
        try:
            open_model(source.spec, kind)
        except ModelError as problem:
            problems.add(source.at, str(problem))


def _check_served(step: Step, role: str, name: str, problems: Problems) -> None:
    """Notes an engine that was to take the weights of an input's model, and holds another one."""
    engine, sources = step.engines[role], step.inputs[name]
    if not backend(engine.kind).local or not sources:
        return  # what a server holds can't be seen here
    own, held = sources[0], engine.model
    same = own.step == held.step
    if same and own.step is None:
        try:
            same = open_model(own.spec, Kind.MODEL).fingerprint == open_model(held.spec, Kind.MODEL).fingerprint
        except ModelError:
            return  # told elsewhere
    if not same:
        problems.add(
            ("steps", step.name, "engines", role),
            f"its engine holds {held.step or held.spec}, and is to take the weights of the {name} "
            f"{own.step or own.spec}; give it that model",
        )


def _check_data(source: Source, need: Need, problems: Problems) -> None:
    """Reads the first row: whether its shape is known, and whether it has the columns that the stage reads."""
    try:
        if source.step is not None:
            parse_sources({"path": source.step, **(source.spec or {})})
            return
        (found,) = parse_sources(source.spec)
        if not Path(found.source).expanduser().exists():
            return  # a glob or a Hub id: told when it is opened
        kind = need.kind[0] if isinstance(need.kind, tuple) else need.kind
        whole = found.model_copy(update={"fraction": None, "count": None, "weight": None})
        first = next(iter(read_rows([whole], kind)), {})
        for column in need.columns:
            if column not in first:
                problems.add(source.at, f"{found.source}: has no column '{column}'; it has {', '.join(first)}")
    except RecipeError as problem:
        for each in problem.problems:
            problems.add(source.at, each)
    except AlignError as problem:
        problems.add(source.at, str(problem))


def open_model(spec: str, kind: Kind | tuple[Kind | None, ...] | None) -> ModelRef:
    """A model from outside the recipe, of the kind that is wanted, or of the first of several that it is.

    Raises:
        ModelError: there is no such model, or it is of no kind that is wanted.
    """
    kinds = [each for each in (kind if isinstance(kind, tuple) else (kind,)) if each is not None]
    for each in kinds[:-1]:
        try:
            return ModelRef.open(spec, each)
        except ModelError:
            continue  # the last kind's error is the one that is told
    return ModelRef.open(spec, kinds[-1])


def content(value: Any) -> Any:
    """What the files that a setting names hold; text that names none counts as it is.

    Args:
        value: of a setting in `Stage.reads`: a path, a text, a mapping with `source` or `path`, or a list of those.
    """
    if isinstance(value, (list, tuple)):
        return [content(item) for item in value]
    if isinstance(value, Mapping):
        paths = {key: content(value[key]) for key in ("source", "path") if key in value}
        return {**value, **paths}
    if isinstance(value, (str, Path)) and is_there(str(value)):
        path = Path(value).expanduser()
        return [path.name, content_fingerprint(path) if path.exists() else source_fingerprint(value)]
    return str(value)


def is_there(text: str) -> bool:
    """Whether a text names a file or folder; a pattern of data files counts."""
    try:
        path = Path(text).expanduser()
        return path.exists() or (path.suffix in SUFFIXES and any(sign in text for sign in "*?["))
    except (OSError, ValueError, RuntimeError):  # a long text is no path
        return False


def _texts(value: Any) -> Iterator[str]:
    """The texts in a setting that may name files."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key in ("source", "path"):
            yield from _texts(value.get(key))


def _names_missing_file(text: str) -> bool:
    """Whether a text can only be the name of a file, and there is none; an inline template or a Hub id is no name."""
    if any(sign in text for sign in "\n{*?[ ") or is_there(text):
        return False
    return text.startswith((".", "/", "~")) or Path(text).suffix in (*SUFFIXES, ".txt", ".yaml", ".yml", ".md")
