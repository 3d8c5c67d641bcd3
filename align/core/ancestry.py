"""What a model or dataset goes back to: the steps before it, and what came from outside, read from their manifests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.manifest import Manifest, Origin
from align.core.readers import SUFFIXES

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Ancestor:
    """A step, or something from outside.

    Attributes:
        name: the step's; of what is from outside the Hub id, or the file's or folder's name without its place.
        fingerprint: of its content.
        manifest: of the step; None for what is from outside.
        path: where something from outside is.
    """

    name: str
    fingerprint: str
    manifest: Manifest | None = None
    path: str = ""


def ancestors_of(origins: Iterable[Origin], run: Path) -> list[Ancestor]:
    """All that these go back to, each after what it was made from.

    Args:
        origins: inputs and engines of a step.
        run: the folder in which the steps lie that they name. A step of another run is followed into that one, where
            its folder is named.
    """
    return list(_walk(origins, run, set()))


def _walk(origins: Iterable[Origin], run: Path, seen: set[str]) -> Iterator[Ancestor]:
    for origin in origins:
        folder = run / origin.step if origin.step else Path(origin.path)
        folder = folder.parent if folder.name == "model" and not (folder / "manifest.json").exists() else folder
        place = str(folder.resolve()) if folder.exists() else origin.path
        if place in seen:
            continue
        seen.add(place)
        try:
            manifest = Manifest.read(folder) if origin.step or origin.path else None
        except DataError:
            manifest = None
        if manifest is None:
            yield Ancestor(shown(origin.path, origin.name), origin.fingerprint, path=origin.path)
            continue
        yield from _walk([*manifest.inputs.values(), *manifest.engines.values()], folder.parent, seen)
        for source in sources_in(manifest.settings.get("source")):
            if source not in seen:
                seen.add(source)
                yield Ancestor(shown(source), "", path=source)
        yield Ancestor(origin.step or manifest.step, origin.fingerprint, manifest)


def base_models(origins: Mapping[str, Origin], ancestors: Sequence[Ancestor]) -> list[str]:
    """From outside, what a model's weights go back to, through the inputs `model` and `policy` of each training."""
    steps = {each.name: each.manifest for each in ancestors if each.manifest}
    found: list[str] = []
    waiting = [origin for name, origin in origins.items() if name in ("model", "policy")]
    while waiting:
        origin = waiting.pop()
        if manifest := steps.get(origin.step or origin.name):
            waiting += [each for name, each in manifest.inputs.items() if name in ("model", "policy")]
        else:
            found.append(origin.path or origin.name)
    return found


def sources_in(value: Any) -> list[str]:
    """The files, folders and Hub ids that a setting `source` names."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        named = value.get("path", value.get("source"))
        return sources_in(named) if named else ["the tiny world"] if "tiny" in value else []

    return [name for each in value for name in sources_in(each)] if isinstance(value, (list, tuple)) else []


def hub_id(name: str) -> str | None:
    """The Hub id (without its revision) that a name is, if it is one."""
    bare = name.partition("@")[0]
    a_file = Path(name).exists() or Path(name).suffix in SUFFIXES
    return bare if _HUB_ID.fullmatch(bare) and not a_file else None


def shown(path: str, name: str = "") -> str:
    """A source as a card names it: a Hub id in full, a file without the folders of the machine it was on."""
    return path if hub_id(path) else name or Path(path).name
