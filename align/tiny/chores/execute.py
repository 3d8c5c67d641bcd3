"""Chores of the stage `execute`: assertions for a code instruction, as CodeT asks a model for them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.core.asking import fill
from align.core.records import Messages
from align.tiny.world import MAKERS

TEMPLATE = Path(__file__).parents[3] / "data_synthesis" / "templates" / "execute" / "tiny" / "asserts.txt"
COUNT = 4
"""Assertions of one answer, about lists of one number: of more a model so small does not know the results."""


def asserts(rng: random.Random) -> tuple[Messages, str]:
    """A request for assertions, and right ones: their numbers lie on both sides of what is filtered by."""
    while True:
        item = MAKERS["code"](rng, rng.random() < 0.3)
        if item.split == "train":
            break
    name = re.search(r"\w+(?=\(xs\))", item.answer)
    assert name is not None
    border = int(found[0]) if (found := re.search(r"\d+", item.instruction)) else 3
    numbers = rng.sample(sorted({border - 1, border, border + 1, rng.randint(2, 9), rng.randint(-3, 0)}), COUNT - 1)
    numbers.append(rng.randint(-3, 9))
    lines = [f"assert {name[0]}([{x}]) == {_value(item.answer, name[0], [x])}" for x in numbers]
    template = TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")
    request = fill(template, {"instruction": item.instruction, "count": str(COUNT)})
    return [{"role": "user", "content": request}], "\n".join(lines)


def _value(program: str, name: str, xs: list[int]) -> Any:
    """What one of the world's own programs gives (never a model's: those run in the sandbox)."""
    scope: dict[str, Any] = {}
    exec(program, scope)
    return scope[name](list(xs))


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {"asserts": asserts}
