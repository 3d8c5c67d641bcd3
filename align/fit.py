"""Do the steps of a recipe fit together? Kinds, columns and order, from the stages' contracts alone.

Only a stage that gives back the kind that comes in has to look at data from outside, at their first row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from align.core.errors import AlignError
from align.core.records import COLUMNS, Kind
from align.core.sources import kind_of_source
from align.core.stage import Need
from align.plan import Source, Step
from align.stages import TABLE, load
from align.yamlfile import Problems


def fit(steps: Mapping[str, Step], problems: Problems) -> dict[str, Step]:
    """Notes what doesn't fit, and gives the steps in an order in which each comes after those that it needs."""
    ordered = _order(steps, problems)
    columns: dict[str, set[str]] = {}
    for name in list(ordered):
        step = ordered[name] = _as_what_comes_in(ordered[name], ordered)
        for input_name, sources in step.inputs.items():
            for source in sources:
                if source.step in ordered:
                    gives = ordered[source.step].stage.gives
                    _check(source, gives, columns.get(source.step), step.stage.needs[input_name], problems)
        for engine in step.engines.values():
            if engine.model.step in ordered:
                gives = ordered[engine.model.step].stage.gives
                _check(engine.model, gives, None, Need(Kind.MODEL, "the model to sample from"), problems)
        columns[name] = _given_columns(step, columns)
    return ordered


def _as_what_comes_in(step: Step, steps: Mapping[str, Step]) -> Step:
    """The step with its stage made one of a single kind, where it gives back the kind that comes in (`gives_as`)."""
    stage = step.stage
    need = stage.needs[stage.gives_as] if stage.gives_as else None
    sources = step.inputs.get(stage.gives_as, ())
    if need is None or not isinstance(need.kind, tuple) or not sources:
        return step
    kind = stage.gives
    first = sources[0]
    try:
        kind = kind_of_source(first.spec) if first.step is None else steps[first.step].stage.gives
    except (AlignError, KeyError):
        return step  # data that can't be read, or a step in a loop: both are told elsewhere
    if kind not in need.kind:
        return step  # `_check` tells what was expected
    needs = {**stage.needs, stage.gives_as: replace(need, kind=kind)}
    return replace(step, stage=replace(stage, gives=kind, needs=needs))


def _check(source: Source, gives: Kind, columns: Collection[str] | None, need: Need, problems: Problems) -> None:
    kinds = need.kind if isinstance(need.kind, tuple) else (need.kind,)
    renamed = source.spec.get("columns") if isinstance(source.spec, Mapping) else None
    if (
        renamed and columns is not None
    ):  # rows of another kind, made fit by new names: preferences' chosen as completion
        columns = {renamed.get(column, column) for column in columns}
        fits = any(kind is not None and set(COLUMNS.get(kind, "?")) <= columns for kind in kinds)
    else:
        fits = gives in kinds
    if not fits and not (None in kinds and gives.is_dataset):
        expected = " or ".join("rows" if kind is None else kind.name for kind in kinds)
        article = "a " if expected in ("MODEL", "REWARD_MODEL") else ""
        problems.add(source.at, f"'{source.step}' gives {gives.name}, {article}{expected} was expected")
        return
    for column in need.columns:
        if columns is not None and column not in columns:
            makers = " or ".join(f"`{verb}`" for verb in TABLE if column in load(verb).adds)
            remedy = f"; a {makers} step adds it" if makers else ""
            problems.add(source.at, f"'{source.step}' gives no column '{column}'{remedy}")


def _given_columns(step: Step, columns: Mapping[str, set[str]]) -> set[str]:
    """The columns that a step's rows will have, as far as contracts say. What comes in travels on where it can."""
    gives = step.stage.gives
    given = {*COLUMNS.get(gives, ()), *step.stage.adds}
    for name, sources in step.inputs.items():
        need = step.stage.needs[name]
        kinds = need.kind if isinstance(need.kind, tuple) else (need.kind,)
        if any(kind is None or (kind.is_dataset and set(COLUMNS[kind]) <= given) for kind in kinds):
            for source in sources:
                given |= columns.get(source.step or "", set())
    return given


def _order(steps: Mapping[str, Step], problems: Problems) -> dict[str, Step]:
    """The steps in the recipe's order as far as their inputs allow; those of a loop are noted and left out."""
    ordered: dict[str, Step] = {}
    looped: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in looped or name not in steps:
            return
        if name in above:
            loop = (*above[above.index(name) :], name)
            problems.add(("steps", name), f"these steps wait for each other: {' → '.join(loop)}")
            looped.update(loop)
            return
        for needed in steps[name].needs_steps():
            visit(needed, (*above, name))
        if name not in looped:
            ordered[name] = steps[name]

    for name in steps:
        visit(name, ())
    return ordered
