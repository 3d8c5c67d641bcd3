"""`align rank --serve`, `--export` and `--import`: people rank, here or in another tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from align.annotate import argilla, label_studio
from align.annotate.desk import Desk, read_items
from align.annotate.exchange import Question
from align.core.errors import DataError, RecipeError
from align.core.stage import StageConfig
from align.core.writer import replace_file
from align.settings import checked
from align.yamlfile import Problems, put, split_argument
from reward.annotations import Annotation, AnnotationFile, read_all

TOOLS = {"argilla": argilla, "label-studio": label_studio}


class ServeSettings(StageConfig):
    """Keys of `--serve`."""

    completions: str = Field(description="the completions to rank: a step's folder, or any data of completions")
    out: str = Field(description="the file of annotations (.jsonl); it is added to where it is there already")
    annotator: str = Field("person", min_length=1, description="who ranks; their name in the file")
    prompts: int = Field(1000, ge=1, description="only the first so many prompts")
    port: int = Field(0, ge=0, le=65535, description="of the page; 0 takes one that is free")
    seed: int = Field(0, description="decides the order in which the completions of a prompt are shown")
    browser: bool = Field(False, description="also open the page in the browser of this desktop")


class ExportSettings(StageConfig):
    """Keys of `--export`."""

    completions: str = Field(description="the completions to rank: a step's folder, or any data of completions")
    out: str = Field(description="the file to write (.json)")
    annotations: list[str] = Field([], description="files of annotations that go with them")
    question: Question = Field("ranking", description="ranking: one record a prompt; rating: one a completion")
    prompts: int | None = Field(None, ge=1, description="only the first so many prompts; all by default")


class ImportSettings(StageConfig):
    """Keys of `--import`."""

    source: str = Field(description="what the tool exported (.json)")
    completions: str = Field(description="the completions that were exported to it")
    out: str = Field(description="the file of annotations to write (.jsonl); it must not be there yet")
    annotators: dict[str, str] = Field({}, description="names for the tool's users, by their id or e-mail address")


SETTINGS: dict[str, type[StageConfig]] = {
    "--serve": ServeSettings,
    "--export": ExportSettings,
    "--import": ImportSettings,
}


def run(given: Sequence[str]) -> None:
    """Runs one of the commands.

    Args:
        given: what stands after `align rank`, `--export=argilla` and `--export argilla` alike.

    Raises:
        AlignError: what a user can mend.
    """
    words = [word for each in given for word in (each.split("=", 1) if each.startswith("--") else [each])]
    option = next(word for word in words if word.startswith("--"))
    if option not in SETTINGS:
        raise RecipeError(f"align rank {option}: there is no such option; known are {', '.join(SETTINGS)}, and --help")
    rest = [word for word in words if word != option]
    tool = None
    if option != "--serve":
        named = [word for word in rest if "=" not in word]
        if len(named) != 1 or named[0] not in TOOLS:
            found = " ".join(named) or "nothing"
            raise RecipeError(f"align rank {option}: the tool is one of {', '.join(TOOLS)}, found {found}")
        tool = named[0]
        rest.remove(tool)
    settings = _settings(option, rest)
    if isinstance(settings, ServeSettings):
        serve(settings)
    elif isinstance(settings, ExportSettings):
        export_to(str(tool), settings)
    elif isinstance(settings, ImportSettings):
        import_from(str(tool), settings)


def _settings(option: str, arguments: Sequence[str]) -> StageConfig:
    raw: dict[str, Any] = {}
    for path, value in map(split_argument, arguments):
        put(raw, path, value)
    for key in ("completions", "out", "source", "annotator"):
        if isinstance(raw.get(key), (int, float)):
            raw[key] = str(raw[key])  # a name that looks like a number
    problems = Problems(f"align rank {option}")
    found = checked(SETTINGS[option], raw, (), problems)
    problems.stop()
    return found


def serve(settings: ServeSettings) -> None:
    """Serves the page until it is stopped; what was judged is in the file at every moment."""
    from align.annotate.server import PageServer

    items = list(read_items(settings.completions, settings.prompts))
    with AnnotationFile(Path(settings.out)) as file:
        if file.torn:
            print(
                f"{file.path}: its last line had been cut short by a crash ({file.torn[:60]!r}); it was taken out. The "
                "page had not said that it was saved: that prompt comes again"
            )
        desk = Desk(items, file, settings.annotator, settings.seed)
        done = desk.state()["progress"]
        print(f"{done['ranked']} of {done['all']} prompts ranked by {settings.annotator}; Ctrl-C stops, all is kept")
        with PageServer(desk, settings.port) as server:
            print(f"open {server.url}", flush=True)
            if settings.browser:
                import webbrowser

                webbrowser.open(server.url)
            server.serve_forever()


def export_to(tool: str, settings: ExportSettings) -> None:
    """Writes a file that the tool reads; for Label Studio its labelling configuration too."""
    items = list(read_items(settings.completions, settings.prompts))
    if not items:
        raise DataError(f"{settings.completions}: no prompt has two different completions; there is nothing to rank")
    standing, _ = read_all(map(Path, settings.annotations))
    said: dict[str, list[Annotation]] = {}
    for (_, prompt_id), one in standing.items():
        said.setdefault(prompt_id, []).append(one)
    out = Path(settings.out)
    written = TOOLS[tool].export(items, said, settings.question)
    replace_file(out, json.dumps(written, ensure_ascii=False, indent=1) + "\n")
    print(f"{out}: {len(written)} {'records' if tool == 'argilla' else 'tasks'} of {len(items)} prompts")
    if tool == "label-studio":
        replace_file(out.with_suffix(".xml"), label_studio.config(items, settings.question))
        print(f"{out.with_suffix('.xml')}: the labelling configuration")
    if tool == "argilla" and standing:
        for name in dict.fromkeys(annotator for annotator, _ in standing):
            print(f"user {argilla.user_id(name)} is {name}")


def import_from(tool: str, settings: ImportSettings) -> None:
    """Writes a file of annotations from what a tool exported.

    Raises:
        DataError: the source is of another form or about other completions, or the file is there already.
    """
    out, source = Path(settings.out), Path(settings.source)
    if out.exists():
        raise DataError(f"{out}: is there already, and judgements are not overwritten; name another file with out=")
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DataError(f"{source}: can't be read as JSON ({problem})") from problem
    items = {item.prompt_id: item for item in read_items(settings.completions)}
    lines: dict[tuple[str, str], Annotation] = {}
    for each in TOOLS[tool].spoken(found, items, str(source)):
        name = settings.annotators.get(each.user, each.user)
        did: Any = "skipped" if each.ranks is None else "ranked"
        lines[name, each.prompt_id] = Annotation(each.prompt_id, name, did, each.ranks or {}, seconds=each.seconds)
    if not lines:
        raise DataError(f"{source}: nobody has ranked or rated anything in it yet")
    replace_file(out, "".join(said.line() for said in lines.values()))
    who = _count(lines)
    print(f"{out}: {len(lines)} judgements by {', '.join(f'{name} ({count})' for name, count in who.items())}")


def _count(lines: Mapping[tuple[str, str], Annotation]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, _ in lines:
        counts[name] = counts.get(name, 0) + 1
    return counts
