"""Trains again on the episodes that an online DPO run has written: nothing is sampled, scored or looked at.

    for each episode of the run that was not rolled back:
        its pairs, and the reference's log-probabilities, from the file
        DPO steps on them, in the run's order and by its schedule

Without changes the weights are the run's, bit by bit on a CPU (same libraries, threads and micro batch), which the
summary says. With changes (another learning rate, beta, loss, ...) it is a study of the same pairs offline: what the
policy would have sampled under other settings, it doesn't tell. Episodes that the guards undid are left out: they have
left no trace in the run's weights either.

A stage, and not a mode of `online-dpo`: it takes other inputs (no prompts, no reward model, no engine), and a recipe
may have many of them after one run.
"""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from align.core.errors import DataError, RecipeError, RunError
from align.core.manifest import Manifest
from align.core.records import Kind
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.start import tell
from align.core.store import ModelRef, Table
from align.train.online_dpo import STAGE as ONLINE
from align.train.online_dpo import trl_of
from align.train.online_settings import Config as OnlineConfig
from align.train.settings import LOSS_OVER, MERGING_NEEDS, DPOSettings, Speed

CHANGEABLE = sorted({*DPOSettings.model_fields, "reference_at"} - {"max_length", "too_long"})
"""Settings of `online-dpo` that a replay may change: how the pairs are trained on, not how they came about."""


class Config(StageConfig):
    """Settings of `replay`."""

    run: str = Field(description="the folder of a finished online-dpo step, with its manifest and episodes")
    changes: dict[str, Any] = Field(
        {},
        description="settings of online-dpo that are to differ from the run's, such as {beta: 0.2}; of training only",
    )

    @field_validator("changes")
    @classmethod
    def _need_no_samples(cls, changes: dict[str, Any]) -> dict[str, Any]:
        may = f"a replay may change {', '.join(CHANGEABLE)}"
        for name in sorted(set(changes) - set(OnlineConfig.model_fields)):
            near = get_close_matches(name, CHANGEABLE, 1)
            raise ValueError(f"online-dpo has no setting {name}; " + (f"did you mean '{near[0]}'?" if near else may))
        if deaf := sorted(set(changes) - set(CHANGEABLE)):
            raise ValueError(
                f"{', '.join(deaf)} would need new samples, or is of the guards, which don't look here: run online-dpo "
                f"for that; {may}"
            )
        for name, value in changes.items():
            field: Any = OnlineConfig.model_fields[name]
            try:
                TypeAdapter(Annotated[field.annotation, field]).validate_python(value, strict=True)
            except ValidationError as invalid:
                said = invalid.errors(include_url=False)[0]["msg"]
                raise ValueError(f"{name}: found {value!r}; {said[0].lower()}{said[1:]}") from invalid
        return changes


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Trains a policy on written episodes and writes it to `tools.out / "model"`."""
    from align.train import adapters, models
    from align.train.online_start import replay_start_of
    from align.train.preference import dpo_arguments
    from align.train.replay_trainer import Replay
    from align.train.tau import merging_figures, tau_of

    recorded = recorded_in(Path(config.run).expanduser())
    settings = settings_of(recorded, config.changes)
    check_inputs(recorded, inputs, settings)
    tools = replace(tools, seed=recorded.seed)
    policy = inputs["policy"]
    reference = inputs.get("reference", policy)
    assert isinstance(policy, ModelRef) and isinstance(reference, ModelRef)
    adapters.check_stackable(policy, settings)
    tau = tau_of(settings, inputs, policy)
    speed = Speed.of(tools.speed)
    tokenizer = models.load_tokenizer(policy)
    arguments = dpo_arguments(settings, speed, tools)
    # The file has the start's log-probabilities; the policy's own at each episode are of the policy that trains now.
    anew = settings.reference_at == "episode" or recorded.settings["reference_at"] == "episode"
    same = reference.fingerprint == policy.fingerprint
    held = settings.reference_at == "start" and anew and not (settings.lora_rank and same)
    frozen = models.load_policy(reference, speed, settings) if held else None
    records = recorded.summary["episodes"]
    most_steps = sum(math.ceil(r["pairs"] * settings.epochs / settings.global_batch_size) + 1 for r in records)

    trl = trl_of(settings, policy, speed, arguments, tokenizer, most_steps)
    replayed = Replay(settings, tools, Path(config.run).expanduser() / "episodes", records, anew, frozen, **trl)
    replayed.starts_at_reference = same
    replayed.merge_with(tau)
    start = replay_start_of(settings, replayed, f"replay of {recorded.step}", most_steps, frozen is not None)
    tell(start, tools)
    if tools.rehearse:
        return Result(summary={"start": start.figures()})
    replayed.train()
    models.save_policy(replayed, tokenizer, tools.out / "model", settings, policy)
    about = adapters.lineage(policy, settings) | {"reference": reference.name, "loss_over": LOSS_OVER}
    about |= merging_figures(settings, replayed.merges) | {"start": start.figures()}
    about |= replayed.summary() | {
        "pairs": sum(record["pairs"] for record in replayed.records),
        "chosen_logp_change": replayed.chosen_change(),
        "episodes": replayed.records,
        "replayed": {"run": recorded.step, "fingerprint": recorded.fingerprint, "changes": dict(config.changes)},
    }
    if config.changes:
        what = ", ".join(f"{name}={value}" for name, value in config.changes.items())
        told = (
            f"an offline study of the run's own pairs, with {what}; under these settings it would have sampled others"
        )
    else:
        about["same_weights"] = same_weights(tools.out / "model", Path(config.run).expanduser() / "model")
        told = "the weights are the run's, bit by bit"
        if not about["same_weights"]:
            told = "the weights differ from the run's: by another machine, number of threads, precision or micro batch"
    tools.progress.say(told)
    return Result(summary=about)


def recorded_in(folder: Path) -> Manifest:
    """What an online DPO step wrote about itself.

    Raises:
        RunError: it is none, it isn't finished, or an episode's file is missing.
    """
    found = Manifest.read(folder)
    if found is None or found.stage != ONLINE.name:
        what = "holds no finished step" if found is None else f"is a step of the stage {found.stage}"
        raise RunError(f"run: {folder} {what}; give the folder of a finished online-dpo step, such as runs/mine/online")
    if found.version != ONLINE.version:
        raise RunError(
            f"run: {folder} was made by version {found.version} of online-dpo, whose episodes have other columns than "
            f"version {ONLINE.version}'s; replay it with the align that made it, or run it again"
        )
    for number in range(len(found.summary["episodes"])):
        if not (file := folder / "episodes" / f"episode-{number:03d}.parquet").exists():
            raise RunError(f"run: {file} is missing, so episode {number + 1} can't be replayed; put it back")
    return found


def settings_of(recorded: Manifest, changes: Mapping[str, Any]) -> OnlineConfig:
    """The run's settings with the changes.

    Raises:
        RecipeError: they don't go together.
    """
    nulls = [name for name, value in recorded.settings.items() if value is None]
    # a guard that was turned off: JSON has no word for infinity
    infinite = {name: math.inf for name in nulls if OnlineConfig.model_fields[name].default is not None}
    try:
        return OnlineConfig.model_validate_json(json.dumps(recorded.settings | infinite | dict(changes)))
    except ValidationError as invalid:
        told = [
            ".".join(["changes", *map(str, error["loc"])]) + ": " + error["msg"].removeprefix("Value error, ")
            for error in invalid.errors(include_url=False)
        ]
        raise RecipeError(told) from invalid


def check_inputs(recorded: Manifest, inputs: Mapping[str, Table | ModelRef], settings: OnlineConfig) -> None:
    """Refuses other models than the run's. Those of merging may come or go where a change turns it on or off.

    Raises:
        DataError: there is another, or one that the run had is missing.
    """
    before = recorded.settings
    turned = (before["merging"] == "none") != (settings.merging == "none")
    free = set(MERGING_NEEDS) if turned or before["merging_alpha"] != settings.merging_alpha else set()
    for name in {*STAGE.needs} - free:
        known, given = recorded.inputs.get(name), inputs.get(name)
        if known is None and given is not None:
            raise DataError(f"in.{name}: the run had none, and the replay was given {given.name}; leave it out")
        if known is not None and given is None:
            raise DataError(f"in.{name}: missing; the run had {known.name}, and what it wrote is of that one: give it")
        if known is not None and given is not None and known.fingerprint != given.fingerprint:
            raise DataError(
                f"in.{name}: {given.name} is not the model that the run had ({known.name}, fingerprint "
                f"{known.fingerprint[:12]}); its pairs and log-probabilities are of that one: give it"
            )


def same_weights(one: Path, other: Path) -> bool:
    """Whether two models' folders hold the same files of weights, byte by byte."""
    names: Sequence[str] = sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")})
    return bool(names) and not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


STAGE = Stage(
    name="replay",
    summary="train again on the episodes of an online-dpo run, without sampling",
    config=Config,
    needs={
        "policy": Need(Kind.MODEL, "the model that the run started from"),
        "reference": Need(Kind.MODEL, "the frozen model of the run; the policy itself where not given", optional=True),
        **MERGING_NEEDS,
    },
    gives=Kind.MODEL,
    run=run,
    reads=("run",),
    trains=True,
)
