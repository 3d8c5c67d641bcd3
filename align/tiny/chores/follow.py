"""Chores of the stages `constraints` and `follow`: demands on form, said anew, checked, told apart, judged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from align.core.asking import fill, load_template, load_templates
from align.core.records import Messages
from align.tiny import world
from data_synthesis.constraints import SHIPPED, TEMPLATES
from reward import judge

_TEMPLATES = load_templates("tiny", SHIPPED, TEMPLATES) | {
    "quality": load_template("follow_tiny", judge.TEMPLATES, ["completion"])
}

PHRASES: dict[str, tuple[str, ...]] = {
    "upper case": (*world._DEMANDS["upper case"], "Make it upper case.", "All in upper case."),
    "sorted": (*world._DEMANDS["sorted"], "Give them sorted.", "Keep them in sorted order."),
    "json": (*world._DEMANDS["json"], "Use a JSON list.", "Make it a JSON list."),
    "dashes": (*world._DEMANDS["dashes"], "Put a dash before each.", "Start each line with a dash."),
    "end": (*world._DEMANDS["end"], "Put DONE at the end.", "Close with DONE."),
    "start": (*world._DEMANDS["start"], "Put OK at the start.", "Open with OK."),
}
"""The ways to say each demand; the first two are the world's own."""

CHECKS: dict[str, tuple[str, ...]] = {
    "upper case": ("s.isupper()", "s == s.upper()", "s.upper() == s"),
    "sorted": (
        "s.split(', ') == sorted(s.split(', '))",
        "sorted(s.split(', ')) == s.split(', ')",
        "s == ', '.join(sorted(s.split(', ')))",
    ),
    "json": ("s.startswith('[')", "s.endswith(']')", "s[:1] + s[-1:] == '[]'"),
    "dashes": (
        "all(x[0] == '-' for x in s.split('\\n'))",
        "all(x[:2] == '- ' for x in s.split('\\n'))",
        "s.startswith('- ')",
    ),
    "end": ("s.endswith('DONE')", "s[-4:] == 'DONE'", "s.split()[-1] == 'DONE'"),
    "start": ("s.startswith('OK')", "s[:2] == 'OK'", "s.split()[0] == 'OK'"),
}
"""What a function returns that checks the demand on an answer `s` of this world."""


def _filled(template: str, **values: str) -> Messages:
    return [{"role": "user", "content": fill(_TEMPLATES[template], values)}]


def augment(rng: random.Random) -> tuple[Messages, str]:
    """A demand, said in two other ways."""
    phrases = PHRASES[rng.choice(list(PHRASES))]
    seed = rng.choice(phrases)
    said = rng.sample([phrase for phrase in phrases if phrase != seed], 2)
    return _filled("augment", count="2", seeds=seed), "\n".join(said)


def verifier(rng: random.Random) -> tuple[Messages, str]:
    """A demand to a function that checks it, with three cases."""
    demand = rng.choice(list(PHRASES))
    outcomes = [True, False, rng.random() < 0.5]
    rng.shuffle(outcomes)
    answer = {"func": _function(rng.choice(CHECKS[demand])), "cases": [_case(rng, demand, met) for met in outcomes]}
    prompt = _filled("verifier", constraint=rng.choice(PHRASES[demand]))
    return prompt, json.dumps(answer)


def _function(check: str) -> str:
    return f"def evaluate(s): return {check}"


def _case(rng: random.Random, demand: str, met: bool) -> dict[str, str | bool]:
    words = sorted(rng.sample(world.WORDS, 2 if demand in ("sorted", "json") else 1))
    if demand == "sorted" and not met:
        words.reverse()
    return {"input": world._render(words, [demand] if met else []), "output": met}


def back(rng: random.Random) -> tuple[Messages, str]:
    """A function to the demand that it checks."""
    demand = rng.choice(list(CHECKS))
    function = _function(rng.choice(CHECKS[demand]))
    return _filled("back", function=function), PHRASES[demand][0]


def relation(rng: random.Random) -> tuple[Messages, str]:
    """Two demands: do they say the same?"""
    demand, other = rng.sample(list(PHRASES), 2)
    same = rng.random() < 0.5
    prompt = _filled(
        "relation",
        constraint=rng.choice(PHRASES[demand]), back=PHRASES[demand if same else other][0],
    )  # fmt: skip
    return prompt, "entailment" if same else "contradiction"


def quality(rng: random.Random) -> tuple[Messages, str]:
    """An answer under one demand, with the words that were asked for or without."""
    while True:
        item = world.MAKERS["format"](rng, True)
        if item.split == "train":
            break
    words = item.answer.split(", ")
    right = rng.random() < 0.5
    if not right:
        words = _spoilt(rng, words)
    completion = world._render(words, rng.sample(list(PHRASES), 1))
    prompt = _filled(
        "quality", lowest="0", highest="10", instruction=item.instruction,
        completion=completion,
    )  # fmt: skip
    return prompt, f"Score: {9 if right else 2}"


def _spoilt(rng: random.Random, words: list[str]) -> list[str]:
    """One word left out, said twice, or another in its place."""
    place = rng.randrange(len(words))
    other = rng.choice([word for word in world.WORDS if word not in words])
    return rng.choice(
        (words[:place] + words[place + 1 :], [*words, words[place]], [*words[:place], other, *words[place + 1 :]])
    )


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {
    "augment": augment,
    "verifier": verifier,
    "back": back,
    "relation": relation,
    "quality": quality,
}
