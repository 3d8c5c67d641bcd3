"""The command line as a user types it, in this process: a start of another would import torch anew each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from align.cli import app
from align.core.manifest import Manifest
from align.core.store import Table


def align(*arguments: object) -> str:
    """Runs `align ARGUMENTS`, which must end well; gives what it printed."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    """Runs `align ARGUMENTS`, which must be refused as what a user can mend; gives what it said."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 2, f"exit status {done.exit_code}: {done.output}"
    assert "Traceback" not in done.output
    return done.stderr


def manifest(folder: Path) -> Manifest:
    found = Manifest.read(folder)
    assert found is not None, f"{folder} is not finished"
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(Table.open(folder).rows())


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
