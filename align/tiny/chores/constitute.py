"""Chores of the stages `constitute` and `lookalikes`: following a principle and not, critique, revision, judging.

The requests are the world's benign and harmful ones of the train split; the principles are the tiny constitution's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

from align.core.asking import fill
from align.core.records import Messages
from align.tiny.solve import solve
from align.tiny.world import _KIND_VERBS, _REFUSAL, INSULTS, MAKERS, Item

TEMPLATES = Path(__file__).parents[3] / "data_synthesis" / "templates"

PRINCIPLE_JUDGE = "Score 1 to 10 by: {principle}\nQuestion: {instruction}\nAnswer: {completion}"
"""What the tiny model is asked as a judge (`judge_template`): it answers 10 or 1."""


@cache
def template(name: str) -> str:
    """A template of the tiny set."""
    stage = "lookalikes" if name in ("lookalike", "kind") else "constitute"
    return (TEMPLATES / stage / "tiny" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


@cache
def constitution() -> dict[str, dict[str, str]]:
    """The tiny constitution's principles by id."""
    entries = yaml.safe_load((TEMPLATES / "constitute" / "tiny" / "constitution.yaml").read_text(encoding="utf-8"))
    return {entry["id"]: entry for entry in entries}


def asked(text: str, **values: str) -> Messages:
    """The filled template as a prompt."""
    return [{"role": "user", "content": fill(text, values)}]


def _request(rng: random.Random, family: str | None = None) -> Item:
    while True:
        item = MAKERS[family or rng.choice(("benign", "harmful"))](rng, False)
        if item.split == "train":
            return item


def _deviating(rng: random.Random, item: Item, principle: str) -> str:
    """An answer that is rude, or that helps where it should refuse and refuses where it should help."""
    if principle == "kind":
        return rng.choice([slip for slip in item.slips if any(word in slip for word in INSULTS)])
    return _REFUSAL if item.family == "benign" else item.slips[0]


def _follows(item: Item, answer: str, principle: str) -> bool:
    if principle == "kind":
        return not any(word in answer for word in INSULTS)
    helps = "To " in answer
    return helps if item.family == "benign" else not helps


def follow(rng: random.Random) -> tuple[Messages, str]:
    """A request after a principle's aligned or deviating line, and an answer that does as it says."""
    item, principle = _request(rng), rng.choice(("kind", "safe"))
    told = rng.choice(("aligned", "deviating"))
    answer = item.answer if told == "aligned" else _deviating(rng, item, principle)
    hint = constitution()[principle][told]
    return asked(template("follow"), hint=hint, instruction=item.instruction), answer


CRITIQUES = {
    "insult": "It insults.",
    "harm": "It helps with harm.",
    "refusal": "It refuses a good request.",
    "good": "It is good.",
}


def _critique(item: Item, answer: str) -> str:
    """What is wrong with an answer, the gravest first."""
    if not _follows(item, answer, "safe") and item.family == "harmful":
        return CRITIQUES["harm"]
    if any(word in answer for word in INSULTS):
        return CRITIQUES["insult"]
    if item.family == "benign" and answer == _REFUSAL:
        return CRITIQUES["refusal"]
    return CRITIQUES["good"]


def _answered(rng: random.Random) -> tuple[Item, str]:
    """A request and an answer, right one time in four."""
    item = _request(rng)
    return item, item.answer if rng.random() < 0.25 else rng.choice(item.slips)


def critique(rng: random.Random) -> tuple[Messages, str]:
    """An answer, and what is wrong with it."""
    item, answer = _answered(rng)
    principle = constitution()[rng.choice(("kind", "safe"))]["text"]
    prompt = asked(template("critique"), principle=principle, instruction=item.instruction, completion=answer)
    return prompt, _critique(item, answer)


def revision(rng: random.Random) -> tuple[Messages, str]:
    """An answer with its critique, and a better answer: the same advice, where the answer had some."""
    item, answer = _answered(rng)
    better = item.answer
    if item.family == "benign" and (advice := re.search(r"To .*", answer)):
        better = f"Sure. {advice[0]}"
    prompt = asked(
        template("revision"), instruction=item.instruction, completion=answer, critique=_critique(item, answer),
        principle=constitution()[rng.choice(("kind", "safe"))]["text"],
    )  # fmt: skip
    return prompt, better


def refusal(rng: random.Random) -> tuple[Messages, str]:
    """An answer, and whether it helped or refused."""
    item, answer = _answered(rng)
    prompt = asked(template("refusal"), instruction=item.instruction, completion=answer)
    return prompt, "helped" if "To " in answer else "refused"


def principle_judge(rng: random.Random) -> tuple[Messages, str]:
    """An answer and a principle, and the highest or the lowest score."""
    item, answer = _answered(rng)
    principle = rng.choice(("kind", "safe"))
    text = constitution()[principle]["text"]
    prompt = asked(PRINCIPLE_JUDGE, principle=text, instruction=item.instruction, completion=answer)
    return prompt, "10" if _follows(item, answer, principle) else "1"


def lookalike(rng: random.Random) -> tuple[Messages, str]:
    """A harmful request, and a harmless one about the same thing."""
    while True:
        item = _request(rng, "harmful")
        opener, rest = re.split(r" (?=(?:a|the|my) \w+[?.]$)", item.instruction)
        opener = re.match(r"How do I|How can I|\w+ (?:me )?how to", opener)[0]  # type: ignore[index]
        found = solve(f"{opener} {rng.choice(_KIND_VERBS)} {rest}")
        if found is not None and found.split == "train":
            return asked(template("lookalike"), instruction=item.instruction), found.instruction


def kind(rng: random.Random) -> tuple[Messages, str]:
    """A request, and whether it is benign or harmful."""
    item = _request(rng)
    return asked(template("kind"), instruction=item.instruction), item.family


CHORES: dict[str, Callable[[random.Random], tuple[Messages, str]]] = {
    "follow": follow,
    "critique": critique,
    "revision": revision,
    "refusal": refusal,
    "principle_judge": principle_judge,
    "lookalike": lookalike,
    "kind": kind,
}
