"""Dialogues in character, and whether an answer keeps to what the character knows; see `role-play`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from align.core.asking import NOT_SAMPLED, Question, ask_each, fill
from align.core.engines.base import Completion
from align.core.records import Messages, Row, Verdict
from data_synthesis.characters import Asked, Profile, gives_away
from data_synthesis.leaks import LeakConfig
from data_synthesis.repurposed import Yield
from data_synthesis.sampling import ErrorBudget
from reward.judge import Judge, score, score_question


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

    def prompt(self, turn: int, system: str) -> Messages:
        """What is trained on: the brief profile, the dialogue so far, and the question; no facts and no evidence."""
        text = fill(system, {"name": self.profile.name, "brief": self.profile.brief})
        opening: Messages = [{"role": "system", "content": text}] if text else []
        return [*opening, *self.earlier, {"role": "user", "content": self.questions[turn].question}]


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
    ) -> Iterator[tuple[Dialogue, list[tuple[Completion, Verdict, str | None]]]]:
        """Yields the answers with their verdicts, and the judge's words (JSON text) where it was asked."""
        ruled = [
            (dialogue, [(completion, self.rule(dialogue, turn, completion)) for completion in completions])
            for dialogue, completions in groups
        ]
        if self.judge is None:
            for dialogue, pairs in ruled:
                yield dialogue, [(completion, verdict, None) for completion, verdict in pairs]
            return
        judge, config = self.judge, self.judge.config
        asked = (
            (group, [self._question(judge, group[0], turn, c.text) for c, v in group[1] if v.verdict == "passed"])
            for group in ruled
        )
        for (dialogue, pairs), found in ask_each(
            judge.engine, asked, judge.params, config.judge_attempts, config.judge_votes, whole=True
        ):
            votes = iter(found)
            done: list[tuple[Completion, Verdict, str | None]] = []
            for completion, verdict in pairs:
                if verdict.verdict != "passed":
                    done.append((completion, verdict, None))
                    continue
                judgement = score(next(votes), config.scale, config.judge_attempts)
                self.budget.count(judgement.verdict.verdict == "error", judgement.verdict.detail, seen_before=True)
                done.append((completion, judgement.verdict, json.dumps(judgement.figures(), ensure_ascii=False)))
            yield dialogue, done

    def _question(self, judge: Judge, dialogue: Dialogue, turn: int, completion: str) -> Question[float]:
        asked, profile = dialogue.questions[turn], dialogue.profile
        values = {
            "name": profile.name, "facts": profile.facts, "evidence": asked.evidence, "question": asked.question,
            "knower": profile.name if asked.kind == "known" else dialogue.other.name, "completion": completion,
        }  # fmt: skip
        return score_question(judge.template, values, judge.config.scale, judge.config.judge_json)

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
