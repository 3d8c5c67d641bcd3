"""The manifest of a step: what it did, written last, so that a folder without one is unfinished."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.core.errors import DataError
from align.core.writer import replace_file

FILE = "manifest.json"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy", "vllm", "openai")


class Origin(BaseModel):
    """One input or engine of a step: where it came from.

    Attributes:
        name: how people know it: a step's name, a file, a model id.
        path: the folder, file or id; a step of the same run is given relative to the run's folder.
        fingerprint: of its content.
        step: the step of the same run that made it, if one did.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    path: str = ""
    fingerprint: str = ""
    step: str | None = None


class Manifest(BaseModel):
    """What a step did. More keys than these are kept.

    Attributes:
        step: the step's name in its recipe.
        stage: the stage's name.
        version: the stage's version.
        fingerprint: of the stage's version, the settings, the inputs' and models' content, and the seed.
        settings: the stage's settings, defaults included.
        seed: the step's own seed.
        inputs: what it was made from, by input name.
        engines: the models that it sampled from, by role.
        rows: how many rows it gave; None for a model.
        seconds: wall time.
        cpu_seconds: of this process and its children.
        summary: the stage's own figures.
        versions: of Python and the main libraries.
    """

    model_config = ConfigDict(extra="allow")

    step: str
    stage: str
    version: int = 1
    fingerprint: str
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    inputs: dict[str, Origin] = Field(default_factory=dict)
    engines: dict[str, Origin] = Field(default_factory=dict)
    rows: int | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    summary: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, whole or not at all; the last thing that a step does.

        Raises:
            RunError: the disk is full, or the folder can't be written to.
        """
        replace_file(folder / FILE, json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a step's folder; None where the step isn't finished.

        Raises:
            DataError: there is one, and it can't be read.
        """
        path = folder / FILE
        try:
            return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as problem:
            first = str(problem).splitlines()[0]
            raise DataError(f"{path}: can't be read ({first}); remove it to have the step run again") from problem


def versions() -> dict[str, str]:
    """The versions of Python and of the main libraries that are installed; imports none of them."""
    found = {"python": platform.python_version()}
    for name in ("align-toolkit", *_LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
