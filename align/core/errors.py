"""The exception tree: everything a user can cause.

    AlignError
    ├── RecipeError    a recipe or a setting is wrong (all problems of a recipe at once)
    ├── DataError      a dataset or a row can't be read, converted or written
    ├── ModelError     a model folder or id can't be used as what it was given for
    ├── EngineError    an engine can't sample
    ├── SandboxError   untrusted code can't be run safely here
    └── RunError       a run can't start or go on (locked folder, full disk, stopped by a guard)

A message says where, what was found, what was expected and how to mend it. The command line prints it without a
traceback and exits with status 2. Anything that is not an `AlignError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class AlignError(Exception):
    """Something the user can mend; the message says how."""


class RecipeError(AlignError):
    """One or more problems of a recipe or of a stage's settings, found before anything ran."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(AlignError):
    """A dataset that is missing, corrupt, or without the columns that a stage needs."""


class ModelError(AlignError):
    """A model that is missing, or of another kind than the stage needs."""


class EngineError(AlignError):
    """An engine that can't be built, or that failed on more samples than the stage allows."""


class SandboxError(AlignError):
    """The machine lacks the isolation that the settings ask for."""


class RunError(AlignError):
    """A run that can't start or go on."""
