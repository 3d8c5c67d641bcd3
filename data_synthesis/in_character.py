"""Dialogues in character, and whether an answer keeps to what the character knows; see `role-play`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from align.core.asking import NOT_SAMPLED
from align.core.engines.base import Completion
from align.core.records import Messages, Row, Verdict
from data_synthesis.characters import Asked, Profile, gives_away
from data_synthesis.leaks import LeakConfig
from data_synthesis.repurposed import Yield
from data_synthesis.sampling import ErrorBudget, answered
from reward.judge import Judge, Values


@dataclass
class Dialogue:
    """A conversation with a character, and the questions that it still has before it.

    Attributes:
        profile: of the character.
        other: of the contrasting one.
        questions: all of them, in order.
        earlier: the turns so far, each answered well.
        rows: what came of it.
    """

    profile: Profile
    other: Profile
    questions: Sequence[Asked]
    earlier: Messages = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Checks:
    """Checks answers in character: rules first, then, of those that pass, a judge where there is one.

    Attributes:
        config: the leak check's settings.
        judge: or None.
        counts: the yield; an answer that was sampled at all is counted.
        budget: of errors.
    """

    def __init__(self, config: LeakConfig, judge: Judge | None, counts: Yield, budget: ErrorBudget) -> None:
        self.config, self.judge, self.counts, self.budget = config, judge, counts, budget

    def checked(
        self, groups: Sequence[tuple[Dialogue, list[Completion]]], turn: int
    ) -> Iterator[tuple[Dialogue, list[Completion], list[Verdict]]]:
        """Yields the answers with their verdicts: the rules', and, where they pass and there is one, the judge's."""
        ruled = [
            (dialogue, completions, [self.rule(dialogue, turn, completion) for completion in completions])
            for dialogue, completions in groups
        ]
        judge = self.judge
        if judge is None:
            yield from ruled
            return

        def questions(group: tuple[Dialogue, list[Completion], list[Verdict]]) -> Iterator[tuple[None, Values]]:
            dialogue, completions, verdicts = group
            asked = dialogue.questions[turn]
            knower = dialogue.profile if asked.kind == "known" else dialogue.other
            for completion, verdict in zip(completions, verdicts, strict=True):
                if verdict.verdict == "passed":
                    yield None, {
                        "name": dialogue.profile.name, "facts": dialogue.profile.facts, "knower": knower.name,
                        "evidence": asked.evidence, "question": asked.question, "completion": completion.text,
                    }  # fmt: skip

        for (dialogue, completions, verdicts), said in answered(ruled, questions, judge.judge_many):
            given = iter(said)
            final = [next(given)[1] if verdict.verdict == "passed" else verdict for verdict in verdicts]
            for verdict in final:
                if verdict.verdict == "error" and not verdict.detail.startswith(NOT_SAMPLED):
                    self.budget.count(True, verdict.detail, seen_before=True)
            yield dialogue, completions, final

    def rule(self, dialogue: Dialogue, turn: int, completion: Completion) -> Verdict:
        """What can be said of an answer without a judge."""
        asked = dialogue.questions[turn]
        self.budget.count(completion.finish_reason == "error", completion.error)
        if completion.finish_reason == "error":
            return Verdict.error(f"{NOT_SAMPLED}: {completion.error}")
        self.counts.passed()
        if completion.finish_reason == "length":
            return Verdict.of(False, "cut off at max_tokens")
        if not completion.text.strip():
            return Verdict.of(False, "an empty answer")
        if asked.kind == "unknown" and (
            shown := gives_away(completion.text, asked, dialogue.profile.facts, self.config)
        ):
            return Verdict.of(False, f"{GIVES_AWAY}: {shown}")
        return Verdict.of(True, "no rule is against it")


GIVES_AWAY = "gives away what only the other knows"


def refused(verdict: Verdict) -> str | None:
    """What a rule has against an answer, in short; None where it has nothing, or a judge has spoken."""
    if verdict.detail.startswith(NOT_SAMPLED):
        return NOT_SAMPLED
    failed = verdict.verdict == "failed" and not verdict.detail.startswith("judge:")
    return verdict.detail.split(":")[0] if failed else None
