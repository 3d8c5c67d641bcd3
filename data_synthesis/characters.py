"""Characters and what they are asked: profiles read in pairs, lists of questions read strictly, what gives away."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.core.asking import MalformedError
from align.core.errors import DataError
from align.core.records import Row, Split
from align.core.stage import StageConfig
from align.core.store import Table
from align.core.text import normalise, split_of, stable_hash
from data_synthesis.leaks import LeakConfig, shared, units
from data_synthesis.passages import own_columns

AskedFor = Literal["known", "unknown"]
NOT_IN_PROFILE = "the evidence doesn't stand in the profile"
KNOWN_TO_BOTH = "the evidence is known to both"
TWICE = "the question came before"

_SCHEMA_OF_ONE = {
    "type": "object",
    "properties": {"evidence": {"type": "string"}, "question": {"type": "string"}},
    "required": ["evidence", "question"],
    "additionalProperties": False,
}
QUESTIONS_SCHEMA = json.dumps({"type": "array", "items": _SCHEMA_OF_ONE})
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_SENTENCE = re.compile(r".+?(?:[.!?؟।](?=\s|$)|[。！？]|$)", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class ProfileConfig(StageConfig):
    """Settings of reading profiles."""

    name: str = Field("name", description="the column with a character's name")
    facts: str = Field("facts", description="the column with all that is known of it: text, or a list of texts")
    brief: str = Field(
        "brief", description="the column with a brief profile, for the system prompt; where it isn't there, or is "
        "empty, the first sentence of the facts",
    )  # fmt: skip
    dev: float = Field(0.05, ge=0, lt=1, description="share of the characters held out as dev, by their facts' hash")
    test: float = Field(0.05, ge=0, lt=1, description="the same for test")
    splits: list[Split] = Field(["train"], min_length=1, description="characters of these splits are played")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.dev + self.test >= 1:
            raise ValueError(f"dev={self.dev:g} and test={self.test:g} leave nothing to train on; lower them")
        return self


@dataclass(frozen=True, slots=True)
class Profile:
    """A character.

    Attributes:
        id: a hash of name and facts.
        name: of the character.
        facts: all that is known of it.
        brief: what its system prompt says.
        split: inherited from its row where that is held out; else by the hash of name and facts.
        row: it came from.
        license: of its source, where it is stated.
    """

    id: str
    name: str
    facts: str
    brief: str
    split: str
    row: Row
    license: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to a character.

    Attributes:
        kind: whether its own profile answers it (known), or only the contrasting one's (unknown).
        question: the text.
        evidence: the words of that profile that do.
        raw: the model's words, of which it is a part.
    """

    kind: AskedFor
    question: str
    evidence: str
    raw: str


def pairs_of(
    table: Table, columns: ProfileConfig, block: int, seed: int, skipped: Counter[str]
) -> Iterator[tuple[Profile, Profile]]:
    """Yields every character with a contrasting one of the same split, drawn among `block` neighbours.

    Raises:
        DataError: a column isn't there.
    """
    missing = [column for column in (columns.name, columns.facts) if column not in table.columns]
    if missing:
        raise DataError(
            f"{table.name}: has no column {', '.join(map(repr, missing))}; it has {own_columns(table)}; name the "
            "columns with name=… and facts=…"
        )
    waiting: dict[str, list[Profile]] = {}
    last: dict[str, Profile] = {}

    def paired(group: list[Profile]) -> Iterator[tuple[Profile, Profile]]:
        pool = group if len(group) > 1 or group[0].split not in last else [*group, last[group[0].split]]
        for one in group:
            others = [other for other in pool if normalise(other.name) != normalise(one.name)]
            if others:
                yield one, random.Random(f"{seed}/{one.id}").choice(others)
            else:
                skipped["no other character to contrast it with"] += 1
        last[group[0].split] = group[-1]

    for profile in _profiles(table, columns, skipped):
        group = waiting.setdefault(profile.split, [])
        group.append(profile)
        if len(group) == block:
            yield from paired(waiting.pop(profile.split))
    for group in waiting.values():
        yield from paired(group)


def _profiles(table: Table, columns: ProfileConfig, skipped: Counter[str]) -> Iterator[Profile]:
    seen: set[str] = set()
    for row in table.rows():
        name = str(row[columns.name] or "").strip()
        facts = _facts(row[columns.facts])
        if not name or not facts:
            skipped["no name" if not name else "no facts"] += 1
            continue
        key = stable_hash(f"{normalise(name)}\n{normalise(facts)}")
        if key in seen:
            skipped["character seen before"] += 1
            continue
        seen.add(key)
        own = row.get("split")
        split = str(own) if own in ("dev", "test") else split_of(f"{name}\n{facts}", columns.dev, columns.test)
        if split not in columns.splits:
            skipped[f"character of split {split}"] += 1
            continue
        brief = str(row.get(columns.brief) or "").strip() or _first_sentence(facts)
        source = str(row.get("source"))
        license = row.get("license") or table.licenses.get(source, table.licenses.get(source.split("/")[0]))
        yield Profile(key, name, facts, brief, split, row, license)


def _facts(value: Any) -> str:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return str(value).strip()
    if isinstance(value, list):
        return "\n".join(str(fact).strip() for fact in value if str(fact).strip())
    return str(value or "").strip()


def _first_sentence(facts: str) -> str:
    found = _SENTENCE.match(facts.split("\n")[0])
    return found[0] if found else facts


def read_questions(text: str, kind: AskedFor, most: int, knows: Profile, other: Profile) -> list[Asked | str]:
    """The questions in a model's answer; in the place of one whose evidence is not what it must be, why.

    Args:
        text: a JSON list of objects with `question` and `evidence`, in a code fence or not.
        kind: what was asked for.
        most: how many were asked for.
        knows: whose profile must hold the evidence.
        other: whose profile must not.

    Raises:
        MalformedError: it is no such list, an empty one, or a longer one than was asked for.
    """
    body = text.strip()
    if found := _FENCE.fullmatch(body):
        body = found[1]
    try:
        items = json.loads(body, strict=False)
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"not JSON: {body[:80]!r}") from problem
    if not isinstance(items, list) or not 1 <= len(items) <= most:
        raise MalformedError(f"no JSON list of 1 to {most} questions: {body[:80]!r}")
    result: list[Asked | str] = []
    seen: set[str] = set()
    for item in items:
        pair = [item.get(key) for key in ("question", "evidence")] if isinstance(item, dict) else []
        if len(pair) != 2 or not all(isinstance(part, str) and part.strip() for part in pair):
            raise MalformedError(f"an item without question and evidence: {body[:80]!r}")
        question, evidence = (str(part).strip() for part in pair)
        if normalise(question) in seen:
            result.append(TWICE)
        elif normalise(evidence) not in normalise(knows.facts):
            result.append(NOT_IN_PROFILE)
        elif normalise(evidence) in normalise(other.facts):
            result.append(KNOWN_TO_BOTH)
        else:
            result.append(Asked(kind, question, evidence, text))
        seen.add(normalise(question))
    return result


def usable_questions(text: str, kind: AskedFor, most: int, knows: Profile, other: Profile) -> list[Asked | str]:
    """The same, but a list without a question that can be used is asked for again.

    Raises:
        MalformedError: as `read_questions`, or no question can be used.
    """
    result = read_questions(text, kind, most, knows, other)
    if not any(isinstance(each, Asked) for each in result):
        raise MalformedError(f"no question can be used: {result[0]}")
    return result


def refused_questions(text: str, kind: AskedFor, most: int, one: Profile, other: Profile) -> list[Asked | str]:
    """What is wrong with the questions of a list that could be read; empty where it couldn't.

    Args:
        text: the model's words.
        kind: what was asked for.
        most: how many were asked for.
        one: who is asked.
        other: the contrasting character.
    """
    try:
        return read_questions(text, kind, most, *((one, other) if kind == "known" else (other, one)))
    except MalformedError:
        return []


def gives_away(answer: str, asked: Asked, facts: str, config: LeakConfig) -> str | None:
    """What an answer shows of evidence that the character can't know; None where it shows nothing.

    A number of the evidence that neither the question nor the character's own facts have, or a run of its words as long
    as the leak check's limit. Names and single words are left to the judge.
    """
    allowed = {*_NUMBER.findall(asked.question), *_NUMBER.findall(facts)}
    numbers = [n for n in _NUMBER.findall(asked.evidence) if n not in allowed and n in _NUMBER.findall(answer)]
    if numbers:
        return f"says {numbers[0]}, which only the other knows"
    found = shared(units(answer), units(asked.evidence), config.leak_words, config.leak_characters)
    return f"says {found.run!r:.60}, which only the other knows" if found.weight >= 1 else None
