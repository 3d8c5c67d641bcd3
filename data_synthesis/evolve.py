"""Stage `evolve`: instructions made harder and more various by a model (the Qwen2 report, arXiv:2407.10671, 4.1.1).

The report adds constraints or requirements to instructions, so that levels of difficulty are spread. Two ways of doing
it are here, and each evolution draws one operation:

- Evol-Instruct (arXiv:2304.12244): five operations in depth (`constraints`, `deepen`, `concretise`, `reasoning`,
  `complicate`) and one in breadth, `breadth`, which writes a new instruction. Several rounds; an evolution that an
  elimination rule stops leaves its instruction unchanged for the next round.
- Tree-Instruct (arXiv:2308.05696): `tree`, the instruction parsed to a tree that grows by N nodes, and written anew. It
  gains 12 words at least and has 100 at most.

An evolved instruction is a prompt of its own: `parent_id` names the one it was made from, the split is inherited, and
task, reference and answer are gone, since they no longer hold. The rules (data_synthesis/eliminations.py) and, where
there is a judge, its verdict see to it that an instruction asks for more, and that it was not answered instead.

Differs from the papers: the growth of Tree-Instruct is asked of every operation in depth; the judge also tells whether
an instruction was answered or broken; all operations are asked for one JSON object.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from align.core.asking import Question, ask_each, load_template, load_templates
from align.core.engines.base import SamplingParams
from align.core.errors import DataError
from align.core.records import Kind, Messages, Row, Split, message_text
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.core.text import normalise, prompt_id_of, stable_hash
from data_synthesis.answers import RULED, read_instruction, read_word, schema_of, why_lost
from data_synthesis.eliminations import Limits, elimination
from data_synthesis.sampling import ErrorBudget, last_user_text
from data_synthesis.spread import Spread, scored, tagged
from data_synthesis.tag import TEMPLATES as TAG_TEMPLATES
from reward.judge import filled, verdict_schema

TEMPLATES = Path(__file__).parent / "templates" / "evolve"
Operation = Literal["constraints", "deepen", "concretise", "reasoning", "complicate", "tree", "breadth"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OPERATIONS, ("instruction",)),
    **dict.fromkeys(("judge_depth", "judge_breadth"), ("original", "instruction")),
    "judge_difficulty": ("instruction",),
}
"""The templates of a set, and the placeholders that each must have."""

BLOCK = 512
"""Prompts whose rounds run together."""
GONE = ("task", "reference", "answer", "tags", "raw_tags", "difficulty")
"""Columns that no longer hold of an evolved instruction."""
MADE = ("level", "round", "operation", "parent_id", "root_id", "evolved_by", "raw_evolution")
"""Columns that say how a prompt came about."""
TWIN = "the same as another prompt"
VERDICTS = {
    "gained": None,
    "equal": "nothing gained",
    "answered": "answered, says the judge",
    "broken": "makes no sense",
}
"""What the judge may say, and what it eliminates for."""


class EvolveConfig(StageConfig):
    """Settings of `evolve`."""

    operations: list[Operation] = Field(
        list(OPERATIONS), min_length=1, description="each evolution draws one of these: constraints, deepen, "
        "concretise, reasoning, complicate (Evol-Instruct, in depth), tree (Tree-Instruct), breadth (a new one)",
    )  # fmt: skip
    rounds: int = Field(4, ge=1, description="rounds of evolution, one operation a round")
    nodes: list[int] = Field(
        [3, 6, 10], min_length=1, description="tree: nodes to add, one of these drawn each time (Tree-Instruct's)"
    )
    min_growth: int = Field(
        12, ge=1, description="words that an instruction must gain in depth; 12 is Tree-Instruct's. In a script "
        "without spaces a character is a word",
    )  # fmt: skip
    max_words: int = Field(
        100, ge=2, description="most words of an evolved instruction; 100 is Tree-Instruct's. One that can't gain "
        "min_growth any more is left as it is",
    )  # fmt: skip
    give: Literal["all", "evolved", "last"] = Field(
        "all", description="all: the prompts that came in, and after each what was made of it; evolved: only those; "
        "last: only the last of each prompt, of those that were evolved at all",
    )  # fmt: skip
    holds: bool = Field(
        False, description="an evolved prompt keeps task, reference and answer: only where no operation changes them"
    )
    templates: str = Field(
        "default", description="what writer and judge are asked: a shipped set (default, tiny), or a folder with some "
        "of its files; {context} is what was said before the instruction",
    )  # fmt: skip
    writer_json: bool = Field(
        False, description="let writer and judge write nothing but the JSON object that the templates ask for; only "
        "for engines with structured output",
    )  # fmt: skip
    temperature: float = Field(1.0, ge=0, le=5, description="sampling temperature of the writer")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling of the writer; 1 is off")
    max_tokens: int = Field(1024, ge=1, description="most new tokens of the writer's answer; one cut off is not read")
    attempts: int = Field(
        2, ge=1, description="samples of an evolution until one passes the rules; then its instruction stays as it is"
    )
    difficulty: bool = Field(True, description="with a judge, have every prompt's difficulty scored from 1 to 10")
    judge_max_tokens: int = Field(256, ge=1, description="most new tokens of a judgement, or of a tagger's answer")
    judge_attempts: int = Field(3, ge=1, description="samples of a judgement, or of tags, until one can be read")
    tag_template: str = Field(
        "tag", description="with a tagger: what it is asked, as in the stage `tag`; with {instruction}"
    )
    splits: list[Split] = Field(["train"], min_length=1, description="prompts of these splits are evolved")
    max_error_share: float = Field(
        0.1, ge=0, le=1,
        description="the stage fails when a larger share of answers (writer, judge, tagger) can't be had or read",
    )  # fmt: skip


@dataclass
class Lineage:
    """A prompt that came in, and what has become of it.

    Attributes:
        root: as it came in.
        head: the latest of it, what the next round begins with.
        evolved: all that was made of it, in order.
    """

    root: Row
    head: Row
    evolved: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Evolution:
    """One operation on the head of a lineage, and what the writer is asked."""

    lineage: Lineage
    operation: Operation
    prompt: Messages


def run(config: EvolveConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives prompts, each after the one it was made from; `operation`, `round` and `level` say how it came about."""
    table = inputs["prompts"]
    assert isinstance(table, Table)
    evolving = Evolving(config, table, tools)
    return Result(evolving.rows(), evolving.summary)


class Evolving:
    """One run of the stage: its settings and engines, its counts, and the prompts that it has seen."""

    def __init__(self, config: EvolveConfig, table: Table, tools: Tools) -> None:
        self.config, self.table, self.tools = config, table, tools
        self.templates = load_templates(config.templates, TEMPLATES, NEEDS)
        self.tag_template = load_template(config.tag_template, TAG_TEMPLATES, ["instruction"])
        self.limits = Limits(config.min_growth, config.max_words)
        self.judge = tools.engines.get("judge")
        self.judging = SamplingParams(max_tokens=config.judge_max_tokens, temperature=0.0, seed=tools.seed)
        self.budget = ErrorBudget("evolve", config.max_error_share)
        self.steps = dict.fromkeys(("prompts", "evolutions", "readable", "passed the rules", "kept"), 0)
        self.lost: Counter[str] = Counter()
        self.passed_by: Counter[str] = Counter()
        self.by_operation: dict[str, Counter[str]] = defaultdict(Counter)
        self.before, self.after = Spread(), Spread()
        self.seen: set[int] = set()
        self.summary: dict[str, Any] = {}

    def rows(self) -> Iterator[Row]:
        """All rounds of a block of prompts, then the next block."""
        self.seen = {_key(row["prompt"]) for row in self.table.rows(["prompt"])}  # held-out ones among them
        self.tools.progress.start(len(self.table), "prompts")
        prompts = self.table.rows()
        while block := list(islice(prompts, BLOCK)):
            lineages = [Lineage(root, root) for root in map(_rooted, block)]
            evolving = [one for one in lineages if one.root["split"] in self.config.splits]
            self.passed_by.update(f"split {row['split']}" for row in block if row["split"] not in self.config.splits)
            self.steps["prompts"] += len(evolving)
            for number in range(1, self.config.rounds + 1):
                for evolution, row in self.judged(self.written(self.evolutions(evolving, number), number)):
                    evolution.lineage.head = row
                    evolution.lineage.evolved.append(row)
                    self.steps["kept"] += 1
                    self.by_operation[evolution.operation]["kept"] += 1
            yield from self.finished(lineages)
            self.tools.progress.advance(len(block), evolved=self.steps["kept"])
            self.summary.update(
                {"yield": dict(self.steps)}, lost=dict(self.lost), passed_by=dict(self.passed_by),
                by_operation={name: dict(self.by_operation[name]) for name in OPERATIONS if name in self.by_operation},
                spread={"before": self.before.whole(), "after": self.after.whole()}, levels=self.after.levels(),
            )  # fmt: skip
        self.budget.check()
        if not self.steps["kept"]:
            why = ", ".join(f"{reason}: {count}" for reason, count in (self.lost + self.passed_by).most_common())
            raise DataError(
                f"evolve: nothing came of the {len(self.table)} prompts of {self.table.name} "
                f"({why or 'the table is empty'}); take another writer or template, give it more attempts, or loosen "
                "min_growth and max_words"
            )

    def evolutions(self, lineages: Iterable[Lineage], number: int) -> Iterator[Evolution]:
        """Draws an operation for the head of each lineage that can still grow."""
        config = self.config
        for lineage in lineages:
            rng = random.Random(f"{self.tools.seed}/{lineage.root['prompt_id']}/{number}")
            operation, nodes = rng.choice(config.operations), rng.choice(config.nodes)
            instruction = last_user_text(lineage.head)
            if operation != "breadth" and self.limits.full(instruction):
                self.passed_by["too long to gain min_growth"] += 1
                continue
            limits = {"min_growth": config.min_growth, "max_words": config.max_words, "nodes": nodes}
            prompt = self.prompt(operation, lineage.head, {"instruction": instruction}, limits)
            yield Evolution(lineage, operation, prompt)

    def prompt(
        self, name: str, row: Row, values: Mapping[str, str], numbers: Mapping[str, int] | None = None
    ) -> Messages:
        """A template filled for a prompt; what was said before stands in front where it has no place of its own."""
        template, context = self.templates[name], row["prompt"][:-1]
        if context and "{context}" not in template:
            template = "{context}\n\n" + template
        more = {name: str(number) for name, number in (numbers or {}).items()}
        return filled(template, {**values, "context": context}, more)

    def written(self, evolutions: Iterable[Evolution], number: int) -> Iterator[tuple[Evolution, Row]]:
        """Yields the evolutions whose instruction can be read and passes the rules, each with the row it makes."""
        config, engine = self.config, self.tools.engines["writer"]
        params = SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=self.tools.seed
        )

        def question(evolution: Evolution) -> Question[str]:
            head, operation = evolution.lineage.head, evolution.operation
            rule = partial(
                elimination, last_user_text(head), limits=self.limits, template=self.templates[operation],
                answer=message_text(head["answer"]) if head.get("answer") else "", breadth=operation == "breadth",
            )  # fmt: skip
            schema = schema_of(["tree", "instruction"] if operation == "tree" else ["instruction"])
            return Question(
                evolution.prompt, partial(read_instruction, rule=rule), schema if config.writer_json else None
            )

        asked = ((evolution, [question(evolution)]) for evolution in evolutions)
        for evolution, ((answer,),) in ask_each(engine, asked, params, config.attempts, whole=True):
            readable = answer.value is not None or answer.problem.startswith(RULED)
            self.budget.count(not readable, answer.problem)
            self.steps["evolutions"] += 1
            self.steps["readable"] += readable
            self.by_operation[evolution.operation]["evolutions"] += 1
            if answer.value is None:
                self.lose(evolution, why_lost(answer.problem))
                continue
            row = child(evolution, answer.value, answer.text, number, engine.generator, config.holds)
            if (key := _key(row["prompt"])) in self.seen:
                self.lose(evolution, TWIN)
                continue
            self.seen.add(key)
            self.steps["passed the rules"] += 1
            yield evolution, row

    def judged(self, made: Iterable[tuple[Evolution, Row]]) -> Iterator[tuple[Evolution, Row]]:
        """Yields those that the judge finds to have gained something; all, where there is no judge."""
        if self.judge is None:
            yield from made
            return

        def question(evolution: Evolution, row: Row) -> Question[str]:
            values = {"original": last_user_text(evolution.lineage.head), "instruction": last_user_text(row)}
            name = "judge_breadth" if evolution.operation == "breadth" else "judge_depth"
            schema = verdict_schema("verdict", {"enum": list(VERDICTS)}) if self.config.writer_json else None
            return Question(
                self.prompt(name, evolution.lineage.head, values), lambda said: read_word(said, VERDICTS), schema
            )

        asked = (((evolution, row), [question(evolution, row)]) for evolution, row in made)
        for (evolution, row), ((answer,),) in ask_each(
            self.judge, asked, self.judging, self.config.judge_attempts, whole=True
        ):
            self.budget.count(answer.value is None, answer.problem)
            problem = "the judge can't be read" if answer.value is None else VERDICTS[answer.value]
            if problem is None:
                yield evolution, row
            else:
                self.lose(evolution, problem)

    def lose(self, evolution: Evolution, reason: str) -> None:
        """Counts an evolution that failed."""
        self.lost[reason] += 1
        self.by_operation[evolution.operation][reason] += 1

    def finished(self, lineages: Sequence[Lineage]) -> Iterator[Row]:
        """Yields a block's rows that the settings ask for, with tags and difficulty where there is who finds them."""
        config, tools = self.config, self.tools
        rows: Iterable[Row] = [row for one in lineages for row in (one.root, *self.given(one))]
        if "tagger" in tools.engines:
            rows = tagged(
                rows, tools.engines["tagger"], self.tag_template, self.judging, config.judge_attempts, self.budget
            )
        if self.judge is not None and config.difficulty:

            def prompt_of(row: Row) -> Messages:
                return self.prompt("judge_difficulty", row, {"instruction": last_user_text(row)})

            rows = scored(
                rows, self.judge, prompt_of, self.judging, config.judge_attempts, self.budget, config.writer_json
            )
        for row in rows:
            is_wanted, is_root = row["split"] in config.splits, row["round"] == 0
            if is_wanted and is_root:
                self.before.count(row)
            if config.give == "all" or not is_root:
                if is_wanted:
                    self.after.count(row)
                yield {column: row.get(column) for column in dict.fromkeys((*self.table.columns, *MADE, *row))}

    def given(self, lineage: Lineage) -> list[Row]:
        """What is given of a lineage beside its root."""
        if self.config.give == "last":  # those between are in no table, so the root is named as the parent
            return [{**row, "parent_id": lineage.root["prompt_id"]} for row in lineage.evolved[-1:]]
        return lineage.evolved


def _rooted(row: Row) -> Row:
    """A row as it came in, with the columns that say how it came about."""
    level, root = row.get("level") or 0, row.get("root_id") or row["prompt_id"]
    return {**dict.fromkeys(MADE), **row, "level": level, "round": 0, "root_id": root}


def child(evolution: Evolution, instruction: str, raw: str, number: int, generator: str, holds: bool) -> Row:
    """The row of an evolved prompt: what came with its parent and still holds, and where it comes from."""
    parent = evolution.lineage.head
    prompt: Messages = [*parent["prompt"][:-1], {"role": "user", "content": instruction}]
    kept = parent if holds else {**{name: parent[name] for name in parent if name not in GONE}, "task": None}
    return {
        **kept,
        "reference": parent["reference"] if holds else None,
        "prompt_id": prompt_id_of(prompt),
        "prompt": prompt,
        "operation": evolution.operation,
        "parent_id": parent["prompt_id"],
        "round": number,
        "level": parent["level"] + (evolution.operation != "breadth"),
        "evolved_by": generator,
        "raw_evolution": raw,
    }


def _key(prompt: Messages) -> int:
    """What makes two prompts the same, as in `prompts`: who says what, normalised; 8 bytes of its hash."""
    return int(stable_hash("\n".join(f"{turn['role']}: {normalise(turn['content'])}" for turn in prompt)), 16)


def asks(config: EvolveConfig) -> dict[str, Asks]:
    """A rewriting a round, a verdict on it, and the tags and the difficulty of all that is there in the end."""
    given = config.rounds + 1
    return {
        "writer": Asks(config.rounds, config.max_tokens),
        "judge": Asks(config.rounds + config.difficulty * given, config.judge_max_tokens),
        "tagger": Asks(given, config.judge_max_tokens),
    }


STAGE = Stage(
    name="evolve",
    summary="instructions made harder, and new ones after their model, by a model",
    config=EvolveConfig,
    needs={"prompts": Need(Kind.PROMPTS, "instructions")},
    gives=Kind.PROMPTS,
    run=run,
    engines={
        "writer": "the model that rewrites instructions",
        "judge": "a model that says whether something was gained, and how difficult each instruction is",
        "tagger": "a model that tags the instructions, for the spread of difficulty",
    },
    optional_engines=("judge", "tagger"),
    reads=("templates", "tag_template"),
    asks=asks,
    adds=MADE,
)
