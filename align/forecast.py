"""What the sampling steps of a recipe will ask for: completions, tokens, cost; and what is there already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from align.core.engines.completion_file import kept_in
from align.core.manifest import Manifest
from align.core.records import Kind
from align.core.stage import Asks, role_of
from align.core.store import Table
from align.pipeline import Planned
from align.plan import Recipe, Source, Step

ENOUGH = 20
"""Completions from which on their mean length tells something of the others'."""

CHARACTERS_A_TOKEN = 4
"""Of English text, roughly; for prompts whose tokens nobody has counted yet."""

_PROMPTS_READ = 200


@dataclass(frozen=True)
class Forecast:
    """What one step will ask of one role.

    Attributes:
        model: what samples.
        prompts: at most how many; None where nothing tells it yet.
        samples: completions of each at most.
        completions: of all prompts.
        kept: completions that an interrupted attempt left, and that will not be sampled again; None where it was
            interrupted before the recipe changed, so that some or none of them will do.
        to_sample: those of the completions that are still to come.
        tokens_each: expected tokens of a completion; the most where nothing tells more.
        told_by: what the expectation rests on; empty for the most.
        cost: USD for what is still to be sampled; None where no price is given, or the prompts are not known.
    """

    step: str
    role: str
    model: str
    prompts: int | None
    samples: int
    completions: int | None
    kept: int | None
    to_sample: int | None
    tokens_each: float
    told_by: str
    cost: float | None


def forecasts(recipe: Recipe, planned: Sequence[Planned]) -> Iterator[Forecast]:
    """Yields what each step that is to be done will ask for, by role."""
    done = {p.step.name: p.done for p in planned if p.done is not None}
    for p in planned:
        if p.done is None and p.step.stage.asks is not None:
            asks = p.step.stage.asks(p.step.config)
            by_key = {key: asks[role_of(key)] for key in p.step.engines if role_of(key) in asks}
            own = {*asks} - {*p.step.stage.engines} | ({*p.step.stage.served} - {*p.step.engines})
            by_key |= {role: ask for role, ask in asks.items() if role in own}  # of what it trains
            engines = Counter(role_of(key) for key in by_key)
            by_key = {  # who reads a role's completions reads those of every engine in it
                key: replace(ask, samples=ask.samples * max(engines[str(ask.reads)], 1)) for key, ask in by_key.items()
            }
            kept = {key: kept_in(p.folder / "work" / f"completions-{key}") for key in by_key}
            lengths = {key: _expected(recipe, p, key, ask, kept[key], done) for key, ask in by_key.items()}
            for key, ask in by_key.items():
                yield _forecast(recipe, p, key, ask, kept[key][0], lengths, done)


def _forecast(
    recipe: Recipe,
    planned: Planned,
    role: str,
    asks: Asks,
    kept: int | None,
    lengths: Mapping[str, tuple[float, str]],
    done: Mapping[str, Manifest],
) -> Forecast:
    step = planned.step
    rows_of = {name: manifest.rows for name, manifest in done.items()}
    counts = [_most_rows(recipe, source, rows_of) for source in _prompt_sources(step)]
    prompts = None if not counts or None in counts else sum(count for count in counts if count is not None)
    if prompts is not None and asks.prompts is not None:
        prompts = min(prompts, asks.prompts)
    if kept and not (planned.folder / "work" / planned.fingerprint).is_dir():
        kept = None  # of other settings or inputs
    completions = None if prompts is None else prompts * asks.samples
    to_sample = None if completions is None else max(0, completions - (kept or 0))
    tokens, told_by = lengths[role]
    reads = _prompt_tokens(recipe, step, done)
    if asks.reads is not None and reads is not None:
        reads += lengths[asks.reads][0]
    each = 1 if asks.reads is not None else asks.samples  # a server takes a prompt once for all its samples
    cost = None if to_sample is None else _cost(step, role, to_sample / each, reads, to_sample * tokens)
    return Forecast(
        step=step.name, role=role, model=_model(step, role), prompts=prompts, samples=asks.samples,
        completions=completions, kept=kept, to_sample=to_sample, tokens_each=tokens, told_by=told_by, cost=cost,
    )  # fmt: skip


def _model(step: Step, role: str) -> str:
    if role not in step.engines:
        return "what it trains"
    model = step.engines[role].model
    return f"step:{model.step}" if model.step else str(model.spec)


def _cost(step: Step, role: str, prompts: float, prompt_tokens: float | None, tokens: float) -> float | None:
    """USD, where the engine's settings have prices (USD for a million tokens) and all that they count is known."""
    settings = step.engines[role].settings if role in step.engines else None
    of_prompts = getattr(settings, "prompt_price", None)
    of_completions = getattr(settings, "completion_price", None)
    if (of_prompts is None and of_completions is None) or (of_prompts and prompt_tokens is None):
        return None
    return (prompts * (prompt_tokens or 0.0) * (of_prompts or 0.0) + tokens * (of_completions or 0.0)) / 1e6


def _expected(
    recipe: Recipe, planned: Planned, role: str, asks: Asks, kept: tuple[int, int], done: Mapping[str, Manifest]
) -> tuple[float, str]:
    """Tokens of a completion, and what tells it: an attempt of the step itself, else the finished step most like it.

    Alike are steps of the same stage, or with an engine of the same model.
    """
    completions, tokens = kept
    if completions >= ENOUGH:
        return min(asks.max_tokens, tokens / completions), "as those kept"
    before = Manifest.read(planned.folder) if planned.stale else None
    if before is not None and (mean := _mean(before, role)):
        return min(asks.max_tokens, mean), "as before the change"
    best: tuple[int, float, str] | None = None
    for name, manifest in done.items():
        other = recipe.steps[name]
        for other_role in other.engines:
            same_model = role in planned.step.engines and _same_model(planned.step, role, other, other_role)
            alike = 2 * (other.stage.name == planned.step.stage.name and other_role == role) + same_model
            mean = _mean(manifest, other_role)
            if alike and mean and (best is None or alike >= best[0]):
                best = (alike, mean, f"as in {name}")
    return (float(asks.max_tokens), "") if best is None else (min(asks.max_tokens, best[1]), best[2])


def _same_model(step: Step, role: str, other: Step, other_role: str) -> bool:
    one, two = step.engines[role], other.engines[other_role]
    return (one.kind, one.model.step, one.model.spec) == (two.kind, two.model.step, two.model.spec)


def _mean(manifest: Manifest, role: str) -> float | None:
    """Tokens of a completion in a step that is done."""
    counts = manifest.engines[role].model_dump() if role in manifest.engines else {}
    completions = counts.get("sampled", 0) + counts.get("reused", 0)
    return counts.get("tokens", 0) / completions if completions >= ENOUGH else None


def _prompt_tokens(recipe: Recipe, step: Step, done: Mapping[str, Manifest]) -> float | None:
    """About how many tokens a prompt has, by the first prompts that are there on their way to the step."""
    for source in _prompt_sources(step):
        if source.step in done:
            table = Table(sorted((recipe.folder(str(source.step)) / "data").glob("*.parquet")), "", "")
            rows = list(islice(table.rows(["prompt"]), _PROMPTS_READ))
            characters = sum(len(message["content"]) for row in rows for message in row["prompt"])
            return characters / len(rows) / CHARACTERS_A_TOKEN if rows else None
        if source.step is not None:
            return _prompt_tokens(recipe, recipe.steps[source.step], done)
    return None


def _prompt_sources(step: Step) -> list[Source]:
    return [
        source
        for name, sources in step.inputs.items()
        if step.stage.needs[name].kind is Kind.PROMPTS
        for source in sources
    ]


def _most_rows(recipe: Recipe, source: Source, rows_of: Mapping[str, int | None]) -> int | None:
    """The most rows that a source can have, where that is quickly told: prompts never become more on their way."""
    if source.step is None:
        return _rows_there(source.spec)
    if rows_of.get(source.step) is not None:
        return rows_of[source.step]
    step = recipe.steps[source.step]
    limit = getattr(step.config, "count", None)
    if step.inputs:
        counts = [_most_rows(recipe, each, rows_of) for each in step.inputs.get("prompts", ())]
    else:
        given = getattr(step.config, "source", None)
        counts = [_rows_there(each) for each in (given if isinstance(given, list) else [given])]
    most = None if None in counts or not counts else sum(count for count in counts if count is not None)
    return min((count for count in (most, limit) if isinstance(count, int)), default=None)


def _rows_there(spec: Any) -> int | None:
    """Rows of a local file or folder, or of the embedded world; None for anything else."""
    if isinstance(spec, Mapping) and isinstance(tiny := spec.get("tiny"), Mapping):
        return sum(count for count in dict(tiny.get("families", {})).values() if isinstance(count, int)) or None
    path = spec.get("path", spec.get("source")) if isinstance(spec, Mapping) else spec
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return None
    from align.core.locate import locate

    return sum(part.count() for part in locate(path, None, None, None))
