"""Stage `role-play`: profiles of characters become dialogues, as Ditto does it (arXiv:2401.12474, 3).

A profile is reading matter. For a character A and a contrasting one B the writer is shown both, and asks A what A's
profile answers, and what only B's does; with each question it must quote the evidence, which is looked up in the
profile. The answer is written with the evidence in view, or, for what only B knows, knowing that A can't know it. Then
all of that is taken away: the training prompt has a brief profile as system prompt, the dialogue so far, and the
question. So the model learns to answer from what it knows of A, and where that ends.

An answer to what only B knows must hold no number of the evidence and no run of its words (`leak_words`); a judge,
where there is one, sees the evidence and says whether the character kept to what it knows.

Differs from the paper: the evidence is looked up, and the answers are checked (the paper does neither); B is drawn from
characters of the same split, not chosen; the turns of a dialogue are asked for together, so that they are questions of
one conversation but no follow-ups to answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from align.core.asking import Answer, Question, ask_each, load_template, load_templates
from align.core.engines.base import Completion, SamplingParams
from align.core.engines.cache import in_order
from align.core.errors import DataError
from align.core.records import Kind, Messages, Row, Verdict
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from align.core.text import prompt_id_of
from data_synthesis.characters import (
    QUESTIONS_SCHEMA,
    Asked,
    AskedFor,
    Profile,
    ProfileConfig,
    pairs_of,
    refused_questions,
    usable_questions,
)
from data_synthesis.in_character import Checks, Dialogue, refused
from data_synthesis.leaks import LeakConfig
from data_synthesis.repurposed import Yield, unsampled, was_whole
from data_synthesis.sampling import ErrorBudget
from reward.judge import TEMPLATES as JUDGES
from reward.judge import Judge, JudgeConfig, filled

TEMPLATES = Path(__file__).parent / "templates" / "role-play"
NEEDS = {
    "known": ["name", "facts", "other", "other_facts", "count"],
    "unknown": ["name", "other", "other_facts", "count"],
    "answer": ["evidence", "question"],
    "decline": ["question"],
}
BLOCK = 256
"""Characters whose dialogues are led together, a turn at a time; the contrasting one is drawn from the same block."""


class RolePlayConfig(JudgeConfig, LeakConfig, ProfileConfig):
    """Settings of `role-play`."""

    system: str = Field(
        "You are {name}. {brief}", description="the system prompt of the training prompts, with {name} and {brief}"
    )
    templates: str = Field(
        "default", description="what the writer is asked: a shipped set's name, or a folder with known.txt and "
        "unknown.txt (questions), answer.txt and decline.txt",
    )  # fmt: skip
    known: int = Field(2, ge=0, description="questions of a dialogue that the character's own profile answers")
    unknown: int = Field(1, ge=0, description="questions that only the contrasting character's profile answers")
    turns: int = Field(
        1, ge=1, description="questions of one dialogue; 1: each question is asked alone. Known and unknown are mixed"
    )
    dialogues: int = Field(1, ge=1, description="times that questions are asked for with each character")
    samples: int = Field(
        1, ge=1, description="answers sampled to each question; a dialogue goes on with the first good"
    )
    temperature: float = Field(0.7, ge=0, le=5, description="sampling temperature of questions and answers")
    max_tokens: int = Field(512, ge=1, description="most new tokens of a list of questions, and of an answer")
    attempts: int = Field(3, ge=1, description="samples asked for until a list of questions can be read")
    json_answers: bool = Field(
        False, description="let the writer write nothing but JSON where questions are asked for; for engines with "
        "structured output",
    )  # fmt: skip
    judge_template: str = Field(
        "role", description="what the judge is asked: a shipped template's name, a file, or a text, with {question} "
        "and {completion}, perhaps {name}, {facts}, {evidence} and {knower} (whose evidence it is)",
    )  # fmt: skip
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="the stage fails when a larger share of answers can't be sampled or read"
    )

    @model_validator(mode="after")
    def _there_is_something_to_ask(self) -> Self:
        if self.known + self.unknown == 0:
            raise ValueError("known=0 and unknown=0 leave nothing to ask; raise one of them")
        return self


def run(config: RolePlayConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives every answer in character with its verdict; the prompt has neither facts nor evidence."""
    table = inputs["profiles"]
    assert isinstance(table, Table)
    templates = load_templates(config.templates, TEMPLATES, NEEDS)
    load_template(config.judge_template, JUDGES, ["question", "completion"])
    summary: dict[str, Any] = {}
    return Result(_rows(config, templates, table, tools, summary), summary)


def _rows(
    config: RolePlayConfig, templates: Mapping[str, str], table: Table, tools: Tools, summary: dict[str, Any]
) -> Iterator[Row]:
    stage = Stagecraft(config, templates, tools)
    skipped: Counter[str] = Counter()
    kinds = {kind: {"passed": 0, "failed": 0, "error": 0} for kind in ("known", "unknown")}
    pairs = pairs_of(table, config, BLOCK, tools.seed, skipped)
    characters = 0
    tools.progress.start(None, "characters")
    while block := list(islice(pairs, BLOCK)):
        characters += len(block)
        dialogues = list(stage.questioned(block))
        for turn in range(config.turns):
            stage.lead([d for d in dialogues if turn < len(d.questions)], turn)
        for row in (row for dialogue in dialogues for row in dialogue.rows):
            kinds[row["asked_for"]][row["verdict"]] += 1
            stage.counts.judged(row)
            yield row
        tools.progress.advance(len(block), kept=stage.counts.steps["kept"])
    summary.update(characters=characters, **stage.counts.summary(), verdicts=kinds, skipped=dict(skipped))
    stage.budget.check()
    if not characters:
        reasons = ", ".join(f"{why}: {count}" for why, count in skipped.most_common()) or "the table is empty"
        raise DataError(f"role-play: {table.name} has no two characters of one split to play ({reasons})")


class Stagecraft:
    """Asks the questions and leads the dialogues, and counts what comes of them (in answers).

    Attributes:
        counts: the yield; a question that is lost counts as the answers that it would have had.
        budget: of errors.
    """

    def __init__(self, config: RolePlayConfig, templates: Mapping[str, str], tools: Tools) -> None:
        self.config, self.templates = config, templates
        self.writer = tools.engines["writer"]
        self.seed = tools.seed
        self.params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=tools.seed)
        self.counts = Yield("asked", "questions", "answered", "kept")
        self.budget = ErrorBudget("role-play", config.max_error_share)
        judge = None
        if "judge" in tools.engines:
            judge = Judge(tools.engines["judge"], config, tools.seed, needs=("question", "completion"))
        self.checks = Checks(config, judge, self.counts, self.budget)

    def questioned(self, pairs: Iterable[tuple[Profile, Profile]]) -> Iterator[Dialogue]:
        """Yields the dialogues to be led: query simulation. Known and unknown questions are mixed in a drawn order."""
        config = self.config
        numbers: dict[AskedFor, int] = {"known": config.known, "unknown": config.unknown}
        kinds = [(kind, number) for kind, number in numbers.items() if number]
        schema = QUESTIONS_SCHEMA if config.json_answers else None

        def questions() -> Iterator[tuple[tuple[Profile, Profile], list[Question[list[Asked | str]]]]]:
            for one, other in pairs:
                values = {"name": one.name, "facts": one.facts, "other": other.name, "other_facts": other.facts}
                asked = []
                for kind, number in kinds:
                    prompt = filled(self.templates[kind], values, {"count": str(number)})
                    knows, ignorant = (one, other) if kind == "known" else (other, one)
                    read = partial(usable_questions, kind=kind, most=number, knows=knows, other=ignorant)
                    asked.append(Question(prompt, read, schema))
                yield (one, other), asked

        found = ask_each(self.writer, questions(), self.params, config.attempts, config.dialogues, whole=True)
        for (one, other), lists in found:
            for number in range(config.dialogues):
                asked = [
                    each
                    for (kind, wanted), votes in zip(kinds, lists, strict=True)
                    for each in self._usable(votes[number], kind, wanted, one, other)
                ]
                random.Random(f"{self.seed}/{one.id}/{number}").shuffle(asked)
                for start in range(0, len(asked), config.turns):
                    yield Dialogue(one, other, asked[start : start + config.turns])

    def _usable(
        self, answer: Answer[list[Asked | str]], kind: AskedFor, wanted: int, one: Profile, other: Profile
    ) -> list[Asked]:
        """The questions of a list that can be asked; those that can't, and those that lack, are counted as lost."""
        each = self.config.samples
        self.counts.steps["asked"] += wanted * each
        found = answer.value or (refused_questions(answer.text, kind, wanted, one, other) if was_whole(answer) else [])
        self.budget.count(not found, answer.problem)
        if not found:
            self.counts.lost[unsampled(answer.problem, "the list of questions")] += wanted * each
            return []
        for problem in found:
            if isinstance(problem, str):
                self.counts.lost[problem] += each
        if missing := wanted - len(found):
            self.counts.lost["fewer questions than were asked for"] += missing * each
        usable = [question for question in found if isinstance(question, Asked)]
        self.counts.steps["questions"] += len(usable) * each
        return usable

    def lead(self, dialogues: Sequence[Dialogue], turn: int) -> None:
        """Takes every dialogue one turn further: response simulation. One without a good answer ends there."""
        prompts = (self.sampled_prompt(dialogue, turn) for dialogue in dialogues)
        answers = in_order(self.writer, prompts, self.config.samples, self.params)
        groups = ((d, completions) for d, (_, completions) in zip(dialogues, answers, strict=True))
        for dialogue, found in self.checks.checked(list(groups), turn):
            rows = [self._row(dialogue, turn, index, *each) for index, each in enumerate(found)]
            dialogue.rows += rows
            good = next((row for row in rows if row["kept"]), None)
            if good is not None:
                dialogue.earlier = [*good["prompt"][bool(self.config.system) :], *good["completion"]]
                continue
            if never_asked := len(dialogue.questions) - turn - 1:
                self.counts.lost["an earlier turn had no good answer"] += never_asked * self.config.samples
            dialogue.questions = dialogue.questions[: turn + 1]

    def sampled_prompt(self, dialogue: Dialogue, turn: int) -> Messages:
        """What the writer sees: the dialogue so far, then the question with the evidence, or that it can't be known."""
        asked, profile = dialogue.questions[turn], dialogue.profile
        values = {"name": profile.name, "facts": profile.facts, "question": asked.question}
        if asked.kind == "known":
            prompt = filled(self.templates["answer"], {**values, "evidence": asked.evidence})
        else:
            prompt = filled(self.templates["decline"], values)
        return [*dialogue.prompt(turn, self.config.system)[:-1], *prompt]

    def _row(
        self, dialogue: Dialogue, turn: int, index: int, completion: Completion, verdict: Verdict, judgement: str | None
    ) -> Row:
        asked, profile = dialogue.questions[turn], dialogue.profile
        prompt = dialogue.prompt(turn, self.config.system)
        return {
            "prompt_id": prompt_id_of(prompt),
            "prompt": prompt,
            "split": profile.split,
            "source": profile.row.get("source"),
            "task": None,
            "family": profile.row.get("family") or "role-play",
            "reference": None,
            "sample_index": index,
            "completion": [{"role": "assistant", "content": completion.text.strip()}],
            "reward": verdict.reward,
            "verdict": verdict.verdict,
            "detail": verdict.detail,
            "generator": self.writer.generator,
            "finish_reason": completion.finish_reason,
            "kept": verdict.verdict == "passed",
            "refused": refused(verdict),
            "source_row": profile.row.get("source_row"),
            "license": profile.license,
            "parent_id": profile.row.get("prompt_id") if profile.row.get("prompt") else None,
            "character": profile.name,
            "contrast": dialogue.other.name,
            "asked_for": asked.kind,
            "evidence": asked.evidence,
            "turn": turn,
            "raw_questions": asked.raw,
            "judgement": judgement,
        }


def asks(config: RolePlayConfig) -> dict[str, Asks]:
    """The lists of questions, and an answer to each question; the votes on those."""
    answers = config.dialogues * (config.known + config.unknown) * config.samples
    lists = config.dialogues * ((config.known > 0) + (config.unknown > 0))
    return {
        "writer": Asks(lists + answers, config.max_tokens),
        "judge": Asks(answers * config.judge_votes, config.judge_max_tokens),
    }


STAGE = Stage(
    name="role-play",
    summary="profiles of characters to dialogues: what they know, and what they can't know",
    config=RolePlayConfig,
    needs={"profiles": Need(None, "characters: rows with a name and facts, perhaps a brief profile")},
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "writer": "the model that asks and that answers in character",
        "judge": "a model that says whether the character kept to what it knows; else the rules alone decide",
    },
    optional_engines=("judge",),
    reads=("templates", "judge_template"),
    asks=asks,
    adds=(
        "finish_reason", "kept", "refused", "source_row", "license", "parent_id", "character", "contrast", "asked_for",
        "evidence", "turn", "raw_questions", "judgement",
    ),
)  # fmt: skip
