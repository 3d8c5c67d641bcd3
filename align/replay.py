"""`align replay RUN/STEP key=value … out=FOLDER`: the arguments of the stage `replay`, as the run tells them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.core.errors import RunError
from align.settings import stage_keys
from align.train.replay import STAGE, recorded_in
from align.train.settings import MERGING_NEEDS


def arguments_of(folder: Path, given: Sequence[str]) -> list[str]:
    """The run's own models, where none are given; and every key that is none of the stage's is a change of settings.

    Raises:
        RunError: the folder holds no finished online-dpo step.
    """
    recorded = recorded_in(folder)
    if any(each.startswith("seed=") for each in given):
        raise RunError("seed: a replay takes the run's, which decides the order of its pairs; leave it out")
    keys = {*stage_keys(STAGE), "out", "processes", "overwrite"}
    unmerged = "merging=none" in given  # then the run's base and sft would have no effect
    found = [f"run={folder}"]
    for name in STAGE.needs:
        if (origin := recorded.inputs.get(name)) is not None and not (unmerged and name in MERGING_NEEDS):
            found.append(f"{name}={folder.resolve().parent / origin.step if origin.step else origin.path}")
    return found + [each if each.split("=")[0].split(".")[0] in keys else f"changes.{each}" for each in given]
