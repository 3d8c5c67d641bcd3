"""A sampling stage, killed while it samples: real processes (forks of this one), the real pipeline, SIGKILL.

The engines are scripted, so that a kill comes at a known completion: while the n-th is being made, when exactly n - 1
are finished. Those must never be asked for again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from align.backends import Backend
from align.core.engines.base import Completion, Engine, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.records import COLUMNS, Kind, Row
from align.core.stage import StageConfig
from align.core.store import Table
from align.core.writer import write_rows
from align.pipeline import run
from align.recipe import load_recipe

Answer = Callable[[Prompt, int], str | Completion]

_answers: Mapping[str, Answer] = {}
_log = Path()
_dies_at: int | None = None


class Settings(StageConfig):
    kind: str = Field(description="tests.synthesis.kills:SCRIPTED")
    model: str = Field(description="the key of the answers")


def _build(settings: Settings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    def answer(prompt: Prompt, index: int) -> str | Completion:
        said = _log.read_text().count("\n") if _log.exists() else 0
        if _dies_at is not None and said + 1 >= _dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with _log.open("a") as log:
            log.write(f"{settings.model} {index} {prompt!r}\n".replace("\n", " ") + "\n")
        return _answers[settings.model](prompt, index)

    return ScriptedEngine(answer, generator=settings.model, fingerprint=settings.model)


SCRIPTED = Backend(Settings, _build, local=False)


def assert_survives_kills(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Iterable[Row]],
    answers: Mapping[str, Answer],
    kills: tuple[float, ...] = (0.2, 0.7),
) -> list[Row]:
    """Runs a stage whole, and again with kills at shares of its completions; gives its rows.

    Args:
        folder: an empty one.
        stage: the verb.
        settings: of the stage.
        inputs: rows by input; what they have decides their kind.
        answers: by role (`sampler`, `sampler-2` for the second of a list): from a prompt and a sample index to an
            answer; the same one every time.
        kills: after which shares of all completions the process is killed.
    """
    places = {}
    for name, rows in inputs.items():
        rows = list(rows)
        kind = next(
            kind for kind in (Kind.COMPLETIONS, Kind.PREFERENCES, Kind.PROMPTS, Kind.DEMONSTRATIONS, Kind.ONTOLOGY)
            if set(COLUMNS[kind]) <= set(rows[0])
        )  # fmt: skip
        write_rows(folder / name, rows, kind)
        places[name] = str(folder / name)
    engines: dict[str, Any] = {}
    for key in sorted(answers):
        engines.setdefault(key.partition("-")[0] if key.rpartition("-")[2].isdigit() else key, []).append(
            {"kind": "tests.synthesis.kills:SCRIPTED", "model": key}
        )
    step = {
        "stage": stage, "in": places, "with": dict(settings),
        "engines": {role: each if len(each) > 1 else each[0] for role, each in engines.items()},
    }  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "killed", "seed": 7, "steps": {"it": step}}))

    assert _attempt(recipe, folder / "whole", answers, folder / "whole.log", None) == 0
    rows = list(Table.open(folder / "whole" / "it").rows())
    asked = (folder / "whole.log").read_text().splitlines()
    log = folder / "killed.log"
    for share in kills:
        dies_at = max(2, int(share * len(asked)))
        assert dies_at < len(asked), "too few completions for a kill among them"
        status = _attempt(recipe, folder / "killed", answers, log, dies_at)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert len(log.read_text().splitlines()) == dies_at - 1
        assert not (folder / "killed" / "it" / "manifest.json").exists()
    assert _attempt(recipe, folder / "killed", answers, log, None) == 0
    assert list(Table.open(folder / "killed" / "it").rows()) == rows
    assert sorted(log.read_text().splitlines()) == sorted(asked), "a finished sample was asked for again, or never"
    return rows


def _attempt(recipe: Path, out: Path, answers: Mapping[str, Answer], log: Path, dies_at: int | None) -> int:
    """One run in a process of its own; its wait status."""
    global _answers, _log, _dies_at
    _answers, _log, _dies_at = answers, log, dies_at
    sys.stdout.flush()
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        said = os.open(out.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        run(load_recipe(recipe, (), out))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
