"""Critique and revision, as Constitutional AI makes better answers (arXiv:2212.08073, 3.1).

The model criticises its own answer by a principle drawn anew each round, and then writes the answer again. The public
recipe takes the revision as chosen and the first answer as rejected.

Differs from the paper: critique and revision are asked for in one prompt each, in which what was said is marked off,
and not as further turns of the dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from align.core.asking import NOT_SAMPLED, Answer, MalformedError, Question, ask_each
from align.core.engines.base import Completion, Engine, SamplingParams
from align.core.records import Messages
from data_synthesis.constitution import Principle
from reward.judge import Values, filled

NO_REVISION = "no revision"
"""How the error of a revision begins that could not be had."""

_ABOUT = re.compile(
    r"^\W*(?:here(?:'s| is) (?:the|a|my) (?:revised|rewritten|improved|new|better)"
    r"|(?:revised|rewritten|improved|new) (?:answer|response|version)\b\s*:|revision\s*:|critique\s*:)|=== \w+ ===",
    re.IGNORECASE,
)


@dataclass
class Draft:
    """An answer on its way through the rounds.

    Attributes:
        prompt: what was said to the assistant.
        text: the answer so far.
        principles: one for each round.
        critiques: those so far.
        problem: why a round failed, and with it the rest.
    """

    prompt: Messages
    text: str
    principles: Sequence[Principle]
    critiques: list[str] = field(default_factory=list)
    problem: str = ""

    def completion(self) -> Completion:
        """The revision as a completion; one that failed is an error."""
        if self.problem:
            return Completion("", (), "error", error=f"{NO_REVISION}: {self.problem}")
        return Completion(self.text, (), "stop")


def revise(
    drafts: Sequence[Draft], engine: Engine, critique: str, revision: str, params: SamplingParams, attempts: int
) -> None:
    """Takes the drafts through all their rounds, in place.

    Args:
        drafts: answers to be revised, with as many principles as there are rounds.
        engine: who criticises and revises.
        critique: the template for it, with {instruction}, {completion} and {principle}.
        revision: the template for it, with {critique} too.
        params: how both are sampled.
        attempts: samples of each until one can be used.
    """
    for number in range(max((len(draft.principles) for draft in drafts), default=0)):
        going = [draft for draft in drafts if not draft.problem and number < len(draft.principles)]
        for draft, answer in _asked(going, engine, critique, number, params, attempts, _read_critique):
            draft.problem = _problem("critique", answer)
            draft.critiques += [] if answer.value is None else [answer.value]
        going = [draft for draft in going if not draft.problem]
        for draft, answer in _asked(going, engine, revision, number, params, attempts, _read_revision):
            draft.problem = _problem("revision", answer)
            draft.text = draft.text if answer.value is None else answer.value


def _asked(
    drafts: Iterable[Draft],
    engine: Engine,
    template: str,
    number: int,
    params: SamplingParams,
    attempts: int,
    parse: Callable[[str], str],
) -> Iterator[tuple[Draft, Answer[str]]]:
    def question(draft: Draft) -> Question[str]:
        values: Values = {
            "instruction": draft.prompt, "completion": draft.text, "critique": "".join(draft.critiques[number:])
        }  # fmt: skip
        prompt = filled(template, values, {"principle": draft.principles[number].text})
        return Question(prompt, parse)

    asked = ((draft, [question(draft)]) for draft in drafts)
    for draft, ((answer,),) in ask_each(engine, asked, params, attempts, whole=True):
        yield draft, answer


def _problem(what: str, answer: Answer[str]) -> str:
    if answer.value is not None:
        return ""
    return answer.problem if answer.problem.startswith(NOT_SAMPLED) else f"{what}: {answer.problem}"


def _read_critique(text: str) -> str:
    if not text.strip():
        raise MalformedError("nothing was said")
    return text.strip()


def _read_revision(text: str) -> str:
    """An answer that speaks to the user, and not of its own revision."""
    said = _read_critique(text)
    if _ABOUT.search(said):
        raise MalformedError(f"it speaks of the revision: {said[:60]!r}")
    return said
