"""What users have, as rows of the kind that a stage needs: one source, or a mixture of several.

A source is a name (a file, folder, glob or Hub id) or a mapping with the keys of `Source`; a list of those is a
mixture.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from align.core import formats
from align.core.card import Card, read_licenses
from align.core.columns import TASK_OF, reference_columns, reference_of, stored
from align.core.errors import DataError
from align.core.fingerprint import content_fingerprint, fingerprint_of
from align.core.locate import Part, locate, our_split
from align.core.mixture import pick
from align.core.readers import Record
from align.core.records import COLUMNS, Kind, Row
from align.core.source_spec import Source, Spec, parse_sources
from align.core.store import Table
from align.core.text import prompt_id_of, root_text, split_of
from align.core.unfold import are_texts
from align.core.writer import DatasetWriter

SHARES = (0.05, 0.05)
"""Shares of dev and test where prompts come without a split."""


def source_fingerprint(spec: Spec) -> str:
    """The fingerprint of a setting that names data: of the content of its files, and of the other keys.

    A Hub id counts with its revision. A mapping that only a stage understands (`{tiny: …}`) counts as it is.

    Raises:
        DataError: there is no such data.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return fingerprint_of([source_fingerprint(item) for item in spec])
    if isinstance(spec, Mapping) and not {"source", "path"} & set(spec):
        return fingerprint_of(spec)
    if isinstance(spec, (str, Path)) and Path(spec).is_file():
        return fingerprint_of([Path(spec).name, content_fingerprint(Path(spec))])  # of any format
    (source,) = parse_sources(spec)
    return _fingerprint(source, locate(source.source, source.name, source.split, source.revision, texts=True))


def _fingerprint(source: Source, parts: Sequence[Part]) -> str:
    known = source.model_dump(exclude={"source"})
    files = [[part.label, part.split, content_fingerprint(part.file)] for part in parts if part.file is not None]
    hub = [[part.label, part.split, len(part.dataset)] for part in parts if part.file is None]
    return fingerprint_of([known, files, hub])


def open_source(
    spec: Spec, kind: Kind | tuple[Kind, ...] | None, cache: Path, seed: int = 0, name: str | None = None
) -> Table:
    """Rows of a kind from what a user has.

    A folder that already holds rows of the kind is read where it lies; anything else is converted once into a folder of
    `cache`, in bounded memory, and read from there as long as the source stays the same.

    Rows without `prompt_id` get the hash of the prompt. Prompts without `split` are divided by the hash of the root
    prompt (`SHARES`); other rows without one are all `train`.

    Args:
        spec: see the module.
        kind: what is needed. Of several kinds the first that a folder holds, and for data to be converted the first.
            None for any rows, prompt and completion made messages where they can be; a folder of texts will do, too.
        cache: a folder for converted data, which may be shared between runs.
        seed: decides random subsets.
        name: how people know the table; else what the spec calls it.

    Raises:
        DataError: the data is missing, damaged, or of no known shape.
        RecipeError: the spec itself is wrong.
    """
    sources = parse_sources(spec)
    known_as = name or " + ".join(Path(source.source).name for source in sources)
    kinds: tuple[Kind | None, ...] = kind if isinstance(kind, tuple) else (kind,)
    located = [locate(s.source, s.name, s.split, s.revision, texts=kinds[0] is None) for s in sources]
    if len(sources) == 1 and sources[0] == Source(source=sources[0].source):
        ready = _ready(Path(sources[0].source).expanduser(), kinds, known_as)
        if ready is not None:
            return ready
    kind = kinds[0]
    prints = [_fingerprint(source, parts) for source, parts in zip(sources, located, strict=True)]
    drawn = any(s.fraction or s.count or s.weight for s in sources)
    folder = cache / fingerprint_of([formats.VERSION, kind, SHARES, prints, seed if drawn else None])
    if not (folder / "README.md").is_file():  # the card is written last
        _convert(sources, kind, folder, seed)
    return Table.open(folder, name=known_as)


def _ready(path: Path, kinds: Sequence[Kind | None], name: str) -> Table | None:
    """The table of a folder that holds rows of one of the kinds as a stage wrote them; None where it doesn't.

    Completions have all the columns of prompts and of demonstrations, and are neither: many of a prompt, good and bad.
    """
    if not [*(path / "data").glob("*.parquet")]:
        return None
    table = Table.open(path, name=name)
    columns = set(table.columns)
    completions = set(COLUMNS[Kind.COMPLETIONS]) <= columns
    if completions and not {Kind.COMPLETIONS, None} & set(kinds):
        wanted = " or ".join(kind.value for kind in kinds if kind is not None)
        raise DataError(
            f"{path}: holds completions, {wanted} were expected; make demonstrations of them with the stage "
            "`demonstrate`, preferences with `pair`, and take their prompts with `prompts`"
        )
    for kind in kinds:
        fits = kind is not None and set(COLUMNS[kind]) <= columns
        if fits and (kind is Kind.ONTOLOGY or table.has_messages("prompt")):
            return table
    return None


def kind_of_source(spec: Spec) -> Kind:
    """What the rows of a source are best read as: of the kinds that their columns allow, the one that holds most.

    Raises:
        DataError: there is no such data, or its columns are of no shape known.
        RecipeError: the spec itself is wrong.
    """
    source = parse_sources(spec)[0]
    for part in locate(source.source, source.name, source.split, source.revision):
        for where, record in part.records():
            columns = tuple(_renamed(record, source, where))
            labelled = {"verdict", "reward"} & set(columns) and set(formats.ANSWERS) & set(columns)
            if labelled or are_texts(record.get("chosen")):
                return Kind.COMPLETIONS
            for kind in (Kind.PREFERENCES, Kind.DEMONSTRATIONS):
                try:
                    formats.shape_of(columns, kind, where)
                except DataError:
                    continue
                return kind
            formats.shape_of(columns, Kind.PROMPTS, where)
            return Kind.PROMPTS
    raise DataError(f"{source.source}: has no rows")


def _convert(sources: Sequence[Source], kind: Kind | None, folder: Path, seed: int) -> None:
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    card = Card(
        title="Converted for reading",
        notes="A cache: it may be removed at any time.",
        inputs={source.source: json.dumps(source.model_dump(exclude_defaults=True)) for source in sources},
        licenses=licenses_of(sources),
    )
    try:
        with DatasetWriter(part, kind or Kind.COMPLETIONS, card, lenient=True) as writer:
            dropped: list[str] = []
            last, index = None, 0  # completions of one prompt that follow one another are numbered
            for row in read_rows(sources, kind, seed, dropped):
                if kind is not Kind.ONTOLOGY and row["split"] is None:
                    known = kind is Kind.PROMPTS and row["prompt"]
                    row["split"] = split_of(root_text(row["prompt"]), *SHARES) if known else "train"
                if kind is Kind.COMPLETIONS:
                    index = index + 1 if row["prompt_id"] == last else 0
                    last = row["prompt_id"]
                    row["sample_index"] = index if row["sample_index"] is None else row["sample_index"]
                writer.write(row)
            if dropped:
                writer.card = replace(card, notes=f"{card.notes} Left out: {len(dropped)} rows; first: {dropped[0]}")
        if folder.exists():  # an unfinished one, or another process was quicker
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def licenses_of(sources: Sequence[Source]) -> dict[str, str]:
    """The licences of the sources, where they are stated: by the setting, on a folder's card, or by the Hub."""
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source.source).expanduser()
        if source.license is not None:
            found[path.name if path.exists() else source.source] = source.license
        elif path.is_dir():
            found |= read_licenses(path)
        elif not path.exists():
            for part in locate(source.source, source.name, source.split, source.revision):
                if part.dataset is not None and part.dataset.info.license:
                    found[part.label] = part.dataset.info.license
    return found


def read_rows(
    sources: Sequence[Source], kind: Kind | None, seed: int = 0, dropped: list[str] | None = None
) -> Iterator[Row]:
    """Yields the rows of a mixture, streaming; `split` is None where the source tells none.

    Args:
        sources: see `parse_sources`.
        kind: of the rows.
        seed: decides random subsets.
        dropped: gets the reason for each row left out by `bad_rows: drop`.

    Raises:
        DataError: as for `open_source`.
    """
    located = [locate(s.source, s.name, s.split, s.revision, texts=kind is None) for s in sources]
    shapes: dict[tuple[str, ...], formats.Shape] = {}
    for source, part, number, where, record in pick(sources, located, seed):
        named = _renamed(record, source, where)
        columns = tuple(named)
        if columns not in shapes:
            shapes[columns] = formats.shape_of(columns, kind, where)
        try:
            rows = shapes[columns](named, where)
            rows = [finish(row, record, source, part, number, kind, where) for row in rows]
        except DataError as problem:
            if source.bad_rows == "refuse":
                raise DataError(f"{problem}. Mend it, or leave such rows out with bad_rows: drop") from problem
            if dropped is not None:
                dropped.append(str(problem))
            continue
        yield from rows


def tell_split(sources: Sequence[Source]) -> bool:
    """Whether rows of a source come with a split of their own: by the files' names, the Hub's, or a column."""
    for source in sources:
        for part in locate(source.source, source.name, source.split, source.revision):
            if part.split is not None or any("split" in record for _, record in islice(part.records(), 1)):
                return True
    return False


def _renamed(record: Record, source: Source, where: str) -> Record:
    """The record under our names, without the columns that went into the reference."""
    missing = sorted(set(source.columns) - set(record))
    if missing:
        raise DataError(f"{where}: `columns` names {', '.join(missing)}; the columns are {', '.join(record)}")
    used = reference_columns(source.reference_from)
    ours = {name for name in source.columns.values() if name is not None}
    kept = {key: value for key, value in record.items() if key not in source.columns and key not in ours | used}
    return kept | {name: record[key] for key, name in source.columns.items() if name is not None}


def finish(row: Row, record: Record, source: Source, part: Part, number: int, kind: Kind | None, where: str) -> Row:
    """The row with the columns that all rows of the kind have, and each column in the type that it is stored as.

    Args:
        row: what the shape made of the record.
        record: the record as it was read.
        source: what the source says of all its rows.
        part: the file or split.
        number: the record's number in it, from 0.
        kind: of the row.
        where: the record's place.
    """
    if kind is Kind.ONTOLOGY:
        return {name: row.get(name) for name in COLUMNS[kind]} | row
    row = stored(row, kind, where)
    if source.reference_from is not None:
        row["reference"] = reference_of(record, source.reference_from, where)
    task = row.get("task") or source.task or TASK_OF.get(str(source.reference_from))
    mine: Row = {
        "prompt_id": row.get("prompt_id") or prompt_id_of(row["prompt"] or [{"role": "", "content": where}]),
        "prompt": row["prompt"],
        "split": _split(row, part, where),
        "source": row.get("source") or part.label,
        "task": task,
        "family": row.get("family") or source.family or task,
        "reference": row.get("reference"),
        "source_row": row["source_row"] if row.get("source_row") is not None else number,
    }
    columns = COLUMNS[kind or Kind.COMPLETIONS]
    for name in ("task", "family", "reference"):
        if name not in columns and mine[name] is None:
            del mine[name]
    return mine | {name: None for name in columns if name not in mine} | {k: v for k, v in row.items() if k not in mine}


def _split(row: Row, part: Part, where: str) -> str | None:
    own = row.get("split")
    if own is None:
        return None if part.split is None else our_split(part.split)
    found = our_split(str(own))
    if found is None:
        raise DataError(
            f"{where}: split {own!r} was found, one of train, dev and test was expected; leave the column out with "
            "columns: {split: null}, or choose one with `split`"
        )
    return found
