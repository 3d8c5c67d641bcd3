"""A judge that knows the embedded world: an engine without a model, for recipes whose tiny judge is too weak.

It stands in the place of a capable model. It reads the templates `tiny/curate` and `tiny/role`, rates 5 what the
world's own program finds right, 2 what it finds wrong, and 3 what it can't read, and answers in the words of the chore.

    judge: {kind: align.tiny.rater:RATER, model: world}
"""

from __future__ import annotations

import re

from pydantic import Field

from align.backends import Backend
from align.core.engines.base import Engine, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.stage import StageConfig
from align.tiny.world import DONT_KNOW, Item, role_questions
from reward.verifiers import Verifiers

_PAIR = re.compile(r"Rate 1 to 5\.\nInstruction: (.*?)\nAnswer: (.*)", re.DOTALL)
_ROLE = re.compile(r"\w+ knows: (.*?)\nQuestion: (.*?)\nAnswer: (.*)\nRate 1 to 5\.", re.DOTALL)
_FACT = re.compile(r"\w+ has (\d+) (\w+)\.")


class RaterSettings(StageConfig):
    """Settings of the engine."""

    kind: str = Field(description="align.tiny.rater:RATER")
    model: str = Field("world", description="any text; there is no model")


def build(settings: RaterSettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    """The engine; its answers don't depend on the sample's index."""
    return ScriptedEngine(lambda prompt, _: rate(prompt), generator=generator or "rater", fingerprint="tiny rater 1")


RATER = Backend(RaterSettings, build, local=False)


def rate(prompt: Prompt) -> str:
    """The rating of a pair or of an answer in character, in the words that the tiny writer was taught."""
    text = str(prompt[-1]["content"]) if isinstance(prompt[-1], dict) else str(prompt)
    right: bool | None = None
    if found := _ROLE.fullmatch(text):
        right = _in_role(*found.groups())
    elif found := _PAIR.fullmatch(text):
        right = _fits(*found.groups())
    return {True: "right\nScore: 5", False: "wrong\nScore: 2", None: "can't tell\nScore: 3"}[right]


def _in_role(facts: str, question: str, answer: str) -> bool:
    """Whether a character says what it knows, or that it doesn't know what is no fact about it."""
    for number, animal in _FACT.findall(facts):
        for asked, expected in role_questions(animal, int(number)):
            if question == asked:
                return answer.strip() == expected
    return answer.strip() == DONT_KNOW


def _fits(instruction: str, answer: str) -> bool | None:
    """Whether the world's verifier passes the answer; None where its program can't read the instruction."""
    from align.tiny.solve import solve

    item: Item | None = solve(instruction)
    if item is None:
        return None
    with Verifiers() as verifiers:
        (verdict,) = verifiers.verify_many([(item.task, answer, item.reference, item.instruction)])
    return verdict.verdict == "passed"
