"""Stage `ensemble`: several reward models as one, for every stage that takes a reward model.

A policy trained against one reward model finds what that model gets wrong; models of other seeds, data or families
rarely err alike, so what they agree on is safer, and where they differ the completion is worth less (Coste and others,
arXiv:2310.02743). The folder that comes of it holds no weights: it names its members, which must stay where they are.

With labelled completions the members' scores are put on one scale (a log-prob head's and a scalar head's are far
apart), and a gate is found for every family as the stage `reward` does it. Without them scores are combined as they
are.

Differs from the paper: the report says nothing of ensembles; this is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from align.core.errors import DataError, RecipeError
from align.core.records import Kind, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools, role_of
from align.core.store import ModelRef, Table
from reward.loading import device_of
from reward.scoring import item_of

if TYPE_CHECKING:  # they import torch
    from reward.comparisons import Group
    from reward.figures import Judged
    from reward.members import Ensemble


class Config(StageConfig):
    """Settings of `ensemble`."""

    combine: Literal["mean", "mean_minus_std", "min"] = Field(
        "mean", description="the members' mean score, the mean less k standard deviations over them, or the lowest"
    )
    k: float = Field(1.0, ge=0, description="standard deviations taken from the mean (mean_minus_std)")
    output: int | None = Field(
        None, ge=0, description="which output is the score, of members that have several; counted from 0"
    )
    held_out_share: float = Field(
        0.1, gt=0, le=1, description="of the completions' prompts, where none is of the split dev; 1 takes them all"
    )
    gate_precision: float = Field(0.9, gt=0, le=1, description="share right among completions scored above best_above")
    gate_wrong: float = Field(0.7, gt=0, le=1, description="share wrong among completions scored below worst_below")
    gate_gap: float = Field(0.5, ge=0, description="least difference between the scores of best and worst")


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Loads every member, measures them and the whole on labelled completions, and writes down who they are."""
    from reward.figures import report
    from reward.gate import gates_of
    from reward.members import EnsembleCard, Member, load_ensemble, on_one_scale

    refs = [ref for key, ref in inputs.items() if role_of(key) == "reward_model" and isinstance(ref, ModelRef)]
    members = tuple(Member(_lasting(ref.path), ref.name, ref.revision, config.output) for ref in refs)
    if len(members) == 1 and config.output is None:
        raise RecipeError(
            "in.reward_model: one model alone is no ensemble; give a list (or `output`, for one with several)"
        )
    ensemble = load_ensemble(EnsembleCard(members, config.combine, config.k), "ensemble", device_of(tools.speed))
    summary: dict[str, Any] = {"members": [member.name for member in members], "combine": config.combine}
    table = inputs.get("completions")
    if isinstance(table, Table):
        counts: Counter[str] = Counter()
        groups = _held_out(config, table, tools, counts)
        by_member = [_scores(model, groups) for model in ensemble.models]
        ensemble.card = on_one_scale(ensemble.card, by_member)
        judged = _judged(groups, ensemble.combined(by_member))
        labelled = [one for one, group in zip(judged, groups, strict=True) if group.absolute]
        gates = gates_of(labelled, config.gate_precision, config.gate_wrong, config.gate_gap) if labelled else None
        ensemble.card = replace(ensemble.card, gates=gates)
        summary |= {"held_out_prompts": len(groups), "left_out": dict(counts), **report(judged, gates)}
        summary["alone"] = _alone(ensemble, groups, by_member)
    ensemble.card.write(tools.out / "model")
    return Result(summary=summary)


def _lasting(path: str) -> str:
    """A folder's path so that it is found from anywhere; a Hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _held_out(config: Config, table: Table, tools: Tools, counts: Counter[str]) -> list[Group]:
    """The labelled groups that the members were not trained on, where `reward` trained them on the same completions."""
    from reward.comparisons import read_groups

    found = [g for g in read_groups(table, tools.work, config.held_out_share, False, counts) if g.held_out]
    if not found:
        raise DataError(
            f"{table.name}: no prompt of it is held out (split dev, or {config.held_out_share:g} of the prompts); give "
            "more completions, or a larger held_out_share"
        )
    return found


def _scores(model: Any, groups: list[Group]) -> list[float]:
    items = [item_of(group.prompt, completion, group.tools) for group in groups for completion in group.completions]
    scores: list[float] = model.score_many(items)
    return scores


def _judged(groups: list[Group], scores: list[float]) -> list[Judged]:
    """Groups with their scores; lengths are in characters, since members count tokens differently."""
    from reward.figures import Judged

    following = iter(scores)
    return [
        Judged(
            group.family, group.values, group.counts, [next(following) for _ in group.values],
            [len(message_text(completion)) for completion in group.completions],
        )
        for group in groups
    ]  # fmt: skip


def _alone(ensemble: Ensemble, groups: list[Group], by_member: list[list[float]]) -> dict[str, float]:
    """Best-of-n of every member by itself, to hold the ensemble's against."""
    from reward.figures import best_of_n

    names = [member.name for member in ensemble.card.members]
    return {
        name if names.count(name) == 1 else f"{name} ({number})": best_of_n(_judged(groups, scores))
        for number, (name, scores) in enumerate(zip(names, by_member, strict=True))
    }


STAGE = Stage(
    name="ensemble",
    summary="several reward models as one: their mean, the mean less their disagreement, or the lowest",
    config=Config,
    needs={
        "reward_model": Need(Kind.REWARD_MODEL, "a list of reward models", several=True),
        "completions": Need(
            (Kind.COMPLETIONS, Kind.PREFERENCES), "labelled, to bring the scores on one scale and gate them",
            optional=True,
        ),
    },
    gives=Kind.REWARD_MODEL,
    run=run,
)  # fmt: skip
