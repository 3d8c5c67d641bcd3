"""What the tiny writer is taught beside the world's own families: the writing and judging that stages ask a model for.

A module here holds `CHORES`: a name for each chore, and the function that makes one, `(rng) -> (messages, answer)`. The
messages are a stage's template of the set `tiny`, filled; the instructions in them are of the train split.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable

from align.core.records import Messages

Chore = Callable[[random.Random], tuple[Messages, str]]


def load_chores(*modules: str) -> dict[str, Chore]:
    """The chores of some modules of this package, or of all."""
    names = modules or tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
    return {
        f"{name}.{chore}": make
        for name in names
        for chore, make in importlib.import_module(f"{__name__}.{name}").CHORES.items()
    }
