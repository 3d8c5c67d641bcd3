"""Chores of the role `namer` of the stage `ontology`: naming groups of tags, and saying which group has a tag."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from align.core.records import Messages

_GROUPS = {
    "math": ("math", "addition", "subtraction", "multiplication", "distractor", "several steps"),
    "code": ("code", "filter", "sum", "count", "sorted list", "squares", "doubles", "halves"),
    "format": ("copy", "list", "upper case", "sorted", "json", "dashes", "end", "start"),
    "advice": ("advice", "harm"),
}
"""The world's tags by what they are about."""


def _groups(rng: random.Random) -> tuple[Messages, str]:
    chosen = rng.sample(sorted(_GROUPS), rng.randint(2, 4))
    tags = [tag for group in chosen for tag in rng.sample(_GROUPS[group], rng.randint(1, min(4, len(_GROUPS[group]))))]
    rng.shuffle(tags)
    lines = "\n".join(f"{tag} ({rng.randint(1, 200)})" for tag in tags)
    groups = list(dict.fromkeys(_group_of(tag) for tag in tags))
    text = f"Name at most {rng.randint(max(4, len(groups)), 6)} groups for these tags:\n{lines}"
    return [{"role": "user", "content": text}], json.dumps({"groups": groups})


def _group(rng: random.Random) -> tuple[Messages, str]:
    tag = rng.choice([tag for tags in _GROUPS.values() for tag in tags])
    groups = rng.sample(sorted(_GROUPS), rng.randint(2, 4))
    group = _group_of(tag) if _group_of(tag) in groups else "other"
    text = f"Groups: {', '.join([*groups, 'other'])}\nWhich group has the tag {tag}?"
    return [{"role": "user", "content": text}], json.dumps({"group": group})


def _group_of(tag: str) -> str:
    return next(group for group, tags in _GROUPS.items() if tag in tags)


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {"groups": _groups, "group": _group}
