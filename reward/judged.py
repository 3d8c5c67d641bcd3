"""The tasks that a model judges, as the stage `verify` has them: `judge` scores by a rubric, `compare` compares pairs.

A row of the task `judge` is judged by its reference's rubric; the verdict is passed from `pass_from` on, the reward is
the mean score moved to 0 (lowest) to 1 (highest). A row of the task `compare` sets its completion against the
reference's `other` one, in both orders; it passes where the completion wins in both. A preference (`chosen`,
`rejected`) is read as a comparison whose winner is known.

Rows are judged in batches; everything that the judge said stands in the column `judgement`, JSON text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from align.core.asking import NOT_SAMPLED, Answer, Question, ask_each, load_template
from align.core.errors import DataError, EngineError
from align.core.formats import messages
from align.core.records import Message, Row, Verdict
from align.core.stage import Tools
from reward.judge import TEMPLATES, JudgeConfig, Scale, Values, params_of, score, score_question
from reward.judge_pairs import PairTally, Winner, compare, pair_questions
from reward.judge_references import PairReference, ScoreReference, read_reference

JUDGED: tuple[str, ...] = ("judge", "compare")
"""Tasks that no program can verify."""

NEEDS_JUDGE = (
    "a model must judge this task, and none was given: run `align verify` with an engine in the role `judge`, as in "
    "judge=MODEL (a folder, a Hub id, or {kind: ..., model: ...})"
)
"""The detail of a row of these tasks that no model has judged."""

DOWN_AFTER = 200
"""Rows one after the other for which the engine gave nothing, after which it counts as down."""

NO_REFERENCE = "(none was given)"


class JudgedConfig(JudgeConfig):
    """Settings of `verify` for the tasks `judge` and `compare`."""

    judge_template: str = Field(
        "judge_rubric", description="what the judge is asked of a row of the task judge: a shipped template's name, a "
        "file, or the text itself, with {completion}, and {instruction}, {rubric}, {reference}, {lowest}, {highest}, "
        "{mark} as wanted",
    )  # fmt: skip
    compare_template: str = Field(
        "judge_pair", description="what the judge is asked of a row of the task compare: the same, with {completion_a} "
        "and {completion_b}, and {instruction}, {rubric}, {reference}, {mark} as wanted",
    )  # fmt: skip
    rubric: str = Field(
        "Does it do what the instruction asks: correctly above all, then completely and to the point?", min_length=1,
        description="what counts, for rows whose reference has no rubric of its own",
    )  # fmt: skip


def judged(rows: Iterable[Row], config: JudgedConfig, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    """Yields every row, in order; those that waited for a judge have its verdict, if there is one.

    Args:
        rows: verified rows. Those of the tasks `JUDGED` with the detail `NEEDS_JUDGE` are judged.
        config: the settings.
        tools: of the step; without an engine `judge` the rows stay as they are.
        summary: gets the counts by verdict, and figures under `judge` and `compare`.

    Raises:
        DataError: a template can't be found, or lacks a placeholder.
        EngineError: the engine can't go on, or gave nothing for `DOWN_AFTER` rows one after the other.
    """
    engine = tools.engines.get("judge")
    if engine is None:
        yield from rows
        return
    desk = _Desk(config, tools.seed)
    silent = 0
    for (row, case), answers in ask_each(
        engine, map(desk.case, rows), desk.params, config.judge_attempts, config.judge_votes, whole=True
    ):
        row["judgement"] = None
        if case is not None:
            desk.judge(row, case, answers)
            tools.progress.advance(0, judged=desk.judged, judge_errors=desk.errors)
        if answers:
            silent = silent + 1 if all(_unsampled(a) for votes in answers for a in votes) else 0
        if silent >= DOWN_AFTER:
            raise EngineError(
                f"the judge {engine.generator} gave nothing for {silent} rows one after the other; the last time: "
                f"{answers[-1][-1].problem}. What it said before is kept: mend the cause and run the same command again"
            )
        yield row
    desk.report(summary)
    for task in desk.counts:
        tools.progress.say(f"{task}: {_in_words(summary[task])}")


@dataclass(frozen=True, slots=True)
class _Case:
    """A row that is judged: its task, and what its reference says; or the problem with it."""

    problem: str | None = None
    scale: Scale | None = None
    expected: Winner | None = None


class _Desk:
    """Turns rows into questions, and answers into verdicts and counts."""

    def __init__(self, config: JudgedConfig, seed: int) -> None:
        self.config = config
        self.params = params_of(config, seed)
        self.templates = {
            "judge": load_template(config.judge_template, TEMPLATES, ["completion"]),
            "compare": load_template(config.compare_template, TEMPLATES, ["completion_a", "completion_b"]),
        }
        self.verdicts: dict[str, Counter[str]] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.rewards = self.spreads = 0.0
        self.judged = self.errors = 0
        self.pairs = PairTally()

    def case(self, row: Row) -> tuple[tuple[Row, _Case | None], Sequence[Question[Any]]]:
        """A row with what is asked about it: nothing where it needs no judge, or can't be judged."""
        if row["task"] not in JUDGED:
            return (row, None), ()
        if row["detail"] != NEEDS_JUDGE:  # broken in a way that was seen before
            return (row, _Case(row["detail"])), ()
        try:
            return self._asked(row)
        except DataError as problem:
            return (row, _Case(str(problem))), ()
        except Exception as bug:  # a bug of ours on one row in a million must not cost the other rows
            what = f"{type(bug).__name__}: {bug!s:.200}"
            return (row, _Case(f"{row['task']}: no question could be made ({what}); please report this")), ()

    def _asked(self, row: Row) -> tuple[tuple[Row, _Case], Sequence[Question[Any]]]:
        template, as_json = self.templates[row["task"]], self.config.judge_json
        if not row["prompt"] and "{instruction}" in template:
            raise DataError("prompt: missing; the judge is shown it as the instruction")
        if row["task"] == "judge":
            of_score = read_reference(ScoreReference, row["reference"])
            scale = of_score.scale(self.config.scale)
            values = {**self._values(row, of_score), "completion": row["completion"]}
            rubric = {"rubric": self._rubric(of_score)}
            return (row, _Case(scale=scale)), [score_question(template, values, scale, as_json, rubric)]
        of_pair = read_reference(PairReference, row["reference"])
        other = messages(of_pair.other, "assistant", "other", "reference")
        rubric = {"rubric": self._rubric(of_pair)}
        questions = pair_questions(template, self._values(row, of_pair), row["completion"], other, as_json, rubric)
        return (row, _Case(expected=of_pair.winner)), questions

    def _values(self, row: Row, reference: ScoreReference | PairReference) -> Values:
        prompt: list[Message] = row["prompt"]
        return {"instruction": prompt, "reference": reference.answer or NO_REFERENCE}

    def _rubric(self, reference: ScoreReference | PairReference) -> str:
        rubric = reference.rubric or self.config.rubric
        return rubric if isinstance(rubric, str) else "\n".join(f"- {criterion}" for criterion in rubric)

    def judge(self, row: Row, case: _Case, answers: Sequence[Sequence[Answer[Any]]]) -> None:
        """Writes a verdict into its row, and counts it."""
        task, attempts = row["task"], self.config.judge_attempts
        figures: dict[str, Any] | None = None
        if case.problem is not None:
            verdict = Verdict.error(case.problem)
        elif case.scale is not None:
            judgement = score(answers[0], case.scale, attempts)
            verdict = judgement.verdict
            figures = judgement.figures()
            figures |= {"lowest": case.scale.lowest, "highest": case.scale.highest, "pass_from": case.scale.pass_from}
            if verdict.reward is not None:
                self.rewards += verdict.reward
                self.spreads += judgement.spread or 0.0
        else:
            comparison = compare(answers, attempts)
            verdict = comparison.verdict
            figures = comparison.figures()
            if case.expected is not None:
                agrees = None if comparison.winner is None else comparison.winner == case.expected
                figures |= {"expected": case.expected, "agrees": agrees}
            self.pairs.count(comparison, case.expected)
        row |= {"verdict": verdict.verdict, "reward": verdict.reward, "detail": verdict.detail}
        row["judgement"] = None if figures is None else json.dumps(figures, ensure_ascii=False)
        self.verdicts.setdefault(task, Counter())[verdict.verdict] += 1
        self.judged += 1
        self.errors += verdict.verdict == "error"
        flat = [answer for votes in answers for answer in votes]
        self.counts.setdefault(task, Counter()).update(
            rows=1,
            errors=verdict.verdict == "error",
            votes=len(flat),
            unreadable_votes=sum(answer.value is None and not _unsampled(answer) for answer in flat),
            unsampled_votes=sum(map(_unsampled, flat)),
            asked_again=sum(answer.attempts - 1 for answer in flat),
        )

    def report(self, summary: dict[str, Any]) -> None:
        """Fills the summary."""
        summary.setdefault("verdicts", {}).update({task: dict(of_task) for task, of_task in self.verdicts.items()})
        for task, counts in self.counts.items():
            summary[task] = dict(counts)
            judged_rows = counts["rows"] - counts["errors"]
            if task == "compare":
                summary[task] |= self.pairs.summary()
            elif judged_rows:
                summary[task] |= {
                    "mean_reward": round(self.rewards / judged_rows, 4),
                    "mean_spread": round(self.spreads / judged_rows, 4),
                }


def _in_words(figures: Mapping[str, Any]) -> str:
    """The figures that a person wants to see at once."""
    said = [f"{figures['rows'] - figures['errors']} of {figures['rows']} rows judged"]
    if "mean_reward" in figures:
        said.append(f"mean reward {figures['mean_reward']:g}")
    if "wins" in figures:
        said.append(f"{figures['wins']} wins, {figures['ties']} ties, {figures['losses']} losses")
    if figures.get("first_position_share") is not None:
        said.append(f"the first of two took {figures['first_position_share']:.0%}")
        said.append(f"the orders disagree on {figures['inconsistent_share']:.0%}")
    if labels := figures.get("labels"):
        said.append(f"right by {labels['n']} labels {labels['accuracy']:g}% ({labels['low']:g} to {labels['high']:g})")
    return ", ".join(said)


def _unsampled(answer: Answer[Any]) -> bool:
    """Whether the engine gave nothing, so that there was nothing to read."""
    return answer.problem.startswith(NOT_SAMPLED)
