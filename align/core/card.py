"""The card (README.md) of a dataset: what made it, from what, how, under which licences. A model's: `model_card`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.core.records import Kind


@dataclass(frozen=True)
class Card:
    """What a card says besides the counts, which the writer knows, or the curves of a training.

    Attributes:
        title: the heading, such as the step's name.
        stage: the stage that made it, with its version (`pair 1`).
        made_by: the program and its version.
        settings: the stage's settings.
        inputs: what it was made from: a line for each name.
        licenses: the licence of each source that the rows go back to, where known.
        notes: more lines of text.
        summary: the stage's figures, complete by the time that the card is written. Of them the card shows `yield`
            (step to count, in order) and `lost` (reason to count).
    """

    title: str = "dataset"
    stage: str = ""
    made_by: str = "align"
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    licenses: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


def card_text(card: Card, kind: Kind, columns: Mapping[str, str], counts: Mapping[str, Counter[str]], rows: int) -> str:
    """A dataset's card: a YAML header that the `datasets` library and the Hub read, and a page for people.

    Args:
        card: what made the rows.
        kind: what the rows are.
        columns: the type of each column, as text.
        counts: rows by value, for each column that was counted (split, source, task, verdict).
        rows: how many there are.
    """
    header: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        "tags": _tags(card, kind),
    }
    licences = sorted(set(card.licenses.values()))
    if licences:
        header["license"] = licences[0] if len(licences) == 1 else licences
        header["source_licenses"] = dict(sorted(card.licenses.items()))
    made = f"{kind.value.capitalize()}: {rows} rows, made by the stage `{card.stage}`" if card.stage else f"{rows} rows"
    page = [f"# {card.title}", "", f"{made} ({card.made_by}).", ""]
    if card.notes:
        page += [card.notes, ""]
    page += ["The single Hub split holds all rows; the column `split` says what may be trained on.", ""]
    page += _origins(card)
    for title, key, heads in (("Yield", "yield", "step | count"), ("Lost", "lost", "why | count")):
        if figures := card.summary.get(key):
            page += ["", f"## {title}", "", f"| {heads} |", "|---|---|"]
            page += [f"| {cell(str(name))} | {number} |" for name, number in figures.items()]
    for name, counter in counts.items():
        page += ["", f"## Rows by {name}", "", f"| {name} | rows |", "|---|---|"]
        page += [f"| {cell(value)} | {number} |" for value, number in sorted(counter.items())]
    page += ["", "## Columns", "", "| column | type |", "|---|---|"]
    page += [f"| {cell(name)} | `{cell(kind)}` |" for name, kind in columns.items()]
    return _text(header, [*page, *_settings(card)])


def read_licenses(folder: Path) -> dict[str, str]:
    """The licences that a dataset folder's card states: of its sources, or else its own; empty where it has none."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}  # a README written by hand for people is no fault
    if not isinstance(header, dict):
        return {}
    sources = header.get("source_licenses")
    if isinstance(sources, dict):
        return {str(name): str(licence) for name, licence in sources.items()}
    licence = header.get("license")
    return {folder.resolve().name: str(licence)} if isinstance(licence, str) else {}


def _tags(card: Card, kind: Kind) -> list[str]:
    return list(dict.fromkeys(["align", kind.value, *card.stage.split()[:1]]))


def _origins(card: Card) -> list[str]:
    made_from = [f"- {name}: {what}" for name, what in card.inputs.items()] or ["- nothing else"]
    licences = [f"- {source}: {licence}" for source, licence in sorted(card.licenses.items())] or ["- not stated"]
    return ["## Made from", "", *made_from, "", "## Licences of the sources", "", *licences]


def _settings(card: Card) -> list[str]:
    import yaml

    if not card.settings:
        return []
    settings = yaml.safe_dump(plain(card.settings), sort_keys=False, allow_unicode=True)
    return ["", "## Settings", "", "```yaml", settings.rstrip(), "```"]


def _text(header: Mapping[str, Any], page: list[str]) -> str:
    import yaml

    top = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n" + "\n".join(page) + "\n"


def cell(value: str) -> str:
    """Text as a cell of a Markdown table."""
    return value.replace("|", "\\|").replace("\n", " ") or "(empty)"


def plain(value: Any) -> Any:
    """The value in types that YAML's safe writer knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
