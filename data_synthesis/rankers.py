"""What ranks one prompt's completions in the stage `rank`: judges, a reward model, people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from align.core.asking import Question, ask_each, load_template
from align.core.engines.base import Engine
from align.core.errors import DataError
from align.core.records import Message, Messages, Row
from align.core.store import Table
from align.core.text import stable_hash
from data_synthesis.sampling import ErrorBudget
from reward.annotations import completion_id, read_all
from reward.judge import TEMPLATES, Judgement, Values, params_of, score, score_question
from reward.judge_pairs import Comparison, PairTally, Winner, compare, pair_questions
from reward.judged import NO_REFERENCE, JudgedConfig
from reward.rankings import Ranking, circular_triads, ranking_of
from reward.scoring import item_of

_OUTCOMES: dict[Winner, float] = {"completion": 1.0, "tie": 0.5, "other": 0.0}


@dataclass
class Group:
    """The completions of one prompt; equal texts are ranked once.

    Attributes:
        rows: one a completion, in the order in which they were sampled.
        place: of each row among the distinct completions; None where there is nothing to rank.
        ids: of the distinct completions (`completion_id`).
        completions: the distinct completions.
        rankings: what each ranker said, by its name.
        scores: the numbers that a ranker gave, by its name, where it gives any.
        judgements: what judges said of each distinct completion, for the row.
        good: by person, whether the best is good enough.
    """

    rows: list[Row]
    place: list[int | None] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    completions: list[list[Message]] = field(default_factory=list)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    judgements: list[list[dict[str, Any]]] = field(default_factory=list)
    good: dict[str, bool] = field(default_factory=dict)

    @staticmethod
    def of(rows: list[Row]) -> Group:
        """The group of a prompt's rows; a failed sample is not ranked."""
        group = Group(rows)
        for row in rows:
            name = completion_id(row["completion"]) if row.get("finish_reason") != "error" else None
            if name is not None and name not in group.ids:
                group.ids.append(name)
                group.completions.append(row["completion"])
                group.judgements.append([])
            group.place.append(None if name is None else group.ids.index(name))
        return group

    @property
    def prompt(self) -> Messages:
        """What is answered."""
        prompt: Messages = self.rows[0]["prompt"]
        return prompt


class Ranker(Protocol):
    """Ranks groups.

    Attributes:
        kind: judge, reward_model or people.
        names: of the rankers that it stands for, each with what it is, for people.
    """

    kind: str
    names: dict[str, str]

    def rank(self, groups: Sequence[Group]) -> None:
        """Fills `rankings` of each group."""
        ...

    def figures(self) -> dict[str, Any]:
        """What it has to say of its rankings, for the summary."""
        ...


class JudgeRanker:
    """A model that compares every two completions in both orders, or scores each."""

    kind = "judge"

    def __init__(self, engine: Engine, name: str, config: JudgedConfig, pairs: bool, seed: int, max_errors: float):
        self.engine, self.name, self.config, self.pairs = engine, name, config, pairs
        self.names = {name: "judge"}
        self.params = params_of(config, seed)
        self.pair_template = load_template(config.compare_template, TEMPLATES, ["completion_a", "completion_b"])
        self.score_template = load_template(config.judge_template, TEMPLATES, ["completion"])
        self.budget = ErrorBudget(f"rank ({name})", max_errors)
        self.counts: Counter[str] = Counter()
        self.tally = PairTally()

    def rank(self, groups: Sequence[Group]) -> None:
        """See `Ranker`."""
        if self.pairs:
            self._compare(groups)
        else:
            self._score(groups)

    def _compare(self, groups: Sequence[Group]) -> None:
        """Asks for every two completions which is better, each first once: n(n - 1) questions of n completions."""
        config = self.config
        asked = ((group, self._pair_questions(group)) for group in groups)
        for group, answers in ask_each(
            self.engine, asked, self.params, config.judge_attempts, config.judge_votes, whole=True
        ):
            ranking: dict[tuple[int, int], float] = {}
            for number, (i, j) in enumerate(combinations(range(len(group.ids)), 2)):
                said = compare(answers[2 * number : 2 * number + 2], config.judge_attempts)
                self._count(said)
                group.judgements[i].append({"judge": self.name, "other": group.ids[j], **said.figures()})
                if said.winner is not None:
                    ranking[i, j] = _OUTCOMES[said.winner]
            group.rankings[self.name] = ranking
            circular, triads = circular_triads(len(group.ids), ranking)
            self.counts.update(circular_triads=circular, triads=triads)

    def _pair_questions(self, group: Group) -> list[Question[Any]]:
        values: Values = {"instruction": group.prompt, "reference": NO_REFERENCE}
        more = {"rubric": self.config.rubric}
        return [
            question
            for one, other in combinations(group.completions, 2)
            for question in pair_questions(self.pair_template, values, one, other, self.config.judge_json, more)
        ]

    def _count(self, said: Comparison) -> None:
        self.budget.count(said.winner is None, said.verdict.detail)
        self.tally.count(said, None)
        self.counts.update(comparisons=1, unreadable=said.winner is None)

    def _score(self, groups: Sequence[Group]) -> None:
        """Asks for the score of each completion alone: n questions of n completions."""
        asked = [(group, place) for group in groups for place in range(len(group.ids))]
        for group in groups:
            group.scores[self.name] = [None] * len(group.ids)
        for group, place, said in self.scored(asked):
            group.scores[self.name][place] = said.verdict.reward
        for group in groups:
            group.rankings[self.name] = ranking_of(group.scores[self.name])

    def scored(self, asked: Iterable[tuple[Group, int]]) -> Iterator[tuple[Group, int, Judgement]]:
        """Yields completions, by group and place, with the judge's score of each."""
        config, scale = self.config, self.config.scale
        items = ((item, [self._score_question(*item)]) for item in asked)
        for (group, place), (answers,) in ask_each(
            self.engine, items, self.params, config.judge_attempts, config.judge_votes, whole=True
        ):
            said = score(answers, scale, config.judge_attempts)
            self.budget.count(said.verdict.verdict == "error", said.verdict.detail)
            self.counts.update(scores=1, unreadable=said.verdict.verdict == "error")
            group.judgements[place].append({"judge": self.name, **said.figures()})
            yield group, place, said

    def _score_question(self, group: Group, place: int) -> Question[float]:
        completion = group.completions[place]
        values: Values = {"instruction": group.prompt, "reference": NO_REFERENCE, "completion": completion}
        more = {"rubric": self.config.rubric}
        return score_question(self.score_template, values, self.config.scale, self.config.judge_json, more)

    def figures(self) -> dict[str, Any]:
        """See `Ranker`."""
        self.budget.check()
        found: dict[str, Any] = dict(self.counts)
        return found | (self.tally.summary() if self.tally.winners else {})


class RewardRanker:
    """A reward model or an ensemble (`reward.members.Judge`) that scores each completion."""

    kind = "reward_model"

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = f"reward model {name}"
        self.names = {self.name: "reward model"}
        self.scored = 0

    def rank(self, groups: Sequence[Group]) -> None:
        """See `Ranker`."""
        items = [
            item_of(group.prompt, completion, group.rows[0].get("tools"))
            for group in groups
            for completion in group.completions
        ]
        scores = iter(self.model.score_many(items))
        for group in groups:
            own: list[float | None] = [float(next(scores)) for _ in group.completions]
            group.scores[self.name] = own
            group.rankings[self.name] = ranking_of(own)
            self.scored += len(own)

    def accepts(self, group: Group, place: int) -> bool:
        """Whether the model's gate believes a completion to be right."""
        value = group.scores[self.name][place]
        return value is not None and bool(self.model.accepts(str(group.rows[0]["family"]), value))

    def figures(self) -> dict[str, Any]:
        """See `Ranker`."""
        return {"scores": self.scored}


class People:
    """The people whose judgements stand in files of annotations.

    Raises:
        DataError: a file is missing or holds something else; the message says how such a file is made.
    """

    kind = "people"

    def __init__(self, files: Sequence[str], table: Table) -> None:
        paths = [Path(file).expanduser() for file in files]
        if missing := [path for path in paths or [Path("annotations.jsonl")] if not path.is_file()]:
            folder = table.files[0].parent.parent
            raise DataError(
                f"rank: there are no annotations yet ({missing[0]}); a person makes them with\n"
                f"    align rank --serve completions={folder} out={missing[0]}\n"
                "or they are read from another tool's file with `align rank --import`. Then set "
                f"annotations=[{missing[0]}], and run the same command again"
            )
        self.standing, self.torn = read_all(paths)
        annotators = dict.fromkeys(name for name, _ in self.standing)
        self.names = {_person(name): "person" for name in annotators}
        self.by_prompt: dict[str, list[str]] = {}
        for name, prompt_id in self.standing:
            self.by_prompt.setdefault(prompt_id, []).append(name)
        self.counts: Counter[str] = Counter()
        self.table = table.name

    def rank(self, groups: Sequence[Group]) -> None:
        """See `Ranker`."""
        for group in groups:
            prompt_id = group.rows[0]["prompt_id"]
            for name in self.by_prompt.get(prompt_id, ()):
                said = self.standing[name, prompt_id]
                self.counts[said.did] += 1
                if said.did == "ranked":
                    ranks = [said.ranks.get(each) for each in group.ids]
                    self.counts["completions that are not in the table"] += len(set(said.ranks) - set(group.ids))
                    group.rankings[_person(name)] = ranking_of([None if rank is None else -rank for rank in ranks])
                    group.good[name] = said.good

    def figures(self) -> dict[str, Any]:
        """See `Ranker`.

        Raises:
            DataError: none of the judgements is of a prompt of the table.
        """
        if self.standing and not self.counts:
            raise DataError(
                f"rank: none of the {len(self.standing)} judgements is of a prompt of {self.table}; were they made of "
                "other completions? `align rank --serve` shows which folder it is given"
            )
        found: dict[str, Any] = {"annotators": len(self.names)} | {k: n for k, n in self.counts.items() if n}
        found["of other prompts"] = len(self.standing) - self.counts["ranked"] - self.counts["skipped"]
        if self.torn:
            found["torn"] = self.torn
        return {key: value for key, value in found.items() if value}


def _person(name: str) -> str:
    return f"person {name}"


def judge_names(engines: Sequence[Engine]) -> list[str]:
    """A name for each judge; a number tells those apart that are of one model."""
    names: list[str] = []
    for engine in engines:
        name = f"judge {engine.generator}"
        same = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def judgement_text(said: Sequence[Mapping[str, Any]]) -> str | None:
    """What judges said of a completion, as the column `judgement` holds it."""
    return json.dumps(said, ensure_ascii=False) if said else None


def judge_seed(seed: int, number: int) -> int:
    """The seed of a judge: two of one model must not say the same of necessity."""
    return seed if number == 0 else int(stable_hash(f"{seed}/judge/{number}", 4), 16) >> 1
