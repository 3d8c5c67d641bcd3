"""Argilla's records as JSON (`dataset.records.to_json`, `from_json`; docs.argilla.io): a list of objects

    {"id": …, "fields": {…}, "metadata": {…}, "suggestions": {…}, "responses": {QUESTION: [{"value": …, "user_id": …}]}}

A ranking is one record a prompt, with the fields `prompt`, `completion_1`, `completion_2`, … and the question
`ranking`, whose value is a list of those names, the best first (Argilla 2), or of objects with `value` and `rank`
(Argilla 1, and the server's own form), where equal ranks are a tie. A rating is one record a completion, with the
question `rating` (a whole number, higher is better).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from align.annotate.desk import Item
from align.annotate.exchange import Question, Spoken, Votes, prompt_text, rating_of, text_of
from align.core.errors import DataError
from reward.annotations import Annotation, dense

_USERS = uuid.UUID("6d2f1a0e-6f0b-5c1e-9a57-3f3c0a8f2b11")
"""Argilla's users have UUIDs; an annotator's is made of the name in this namespace."""


def user_id(annotator: str) -> str:
    """The id that stands for an annotator in an export."""
    return str(uuid.uuid5(_USERS, annotator))


def export(items: Sequence[Item], said: Mapping[str, Sequence[Annotation]], question: Question) -> list[dict[str, Any]]:
    """The records of some items with what was said of them, by prompt.

    Raises:
        DataError: the question can't hold them; the message says which can.
    """
    if question == "rating":
        return [record for item in items for record in _ratings(item, said.get(item.prompt_id, ()))]
    counts = sorted({len(item.completions) for item in items})
    if len(counts) > 1:
        raise DataError(
            f"prompts with {', '.join(map(str, counts))} completions, and an Argilla ranking has one number of answers "
            "for all records; say question=rating, which asks about each completion alone"
        )
    return [_ranking(item, said.get(item.prompt_id, ())) for item in items]


def _ranking(item: Item, said: Iterable[Annotation]) -> dict[str, Any]:
    names = {each: f"completion_{number}" for number, each in enumerate(item.completions, start=1)}
    texts = {name: text_of(item.completions[each]) for each, name in names.items()}
    responses = []
    for one in said:
        if one.did == "skipped":
            continue
        if len(set(one.ranks.values())) < len(one.ranks):
            raise DataError(
                f"{one.annotator} gave completions of the prompt {item.prompt_id} one rank, and an Argilla ranking has "
                "no ties; say question=rating"
            )
        order = sorted((each for each in one.ranks if each in names), key=lambda each: one.ranks[each])
        responses.append(_response([names[each] for each in order], one.annotator))
    return _record(item.prompt_id, {"prompt": prompt_text(item), **texts}, {}, {"ranking": responses})


def _ratings(item: Item, said: Iterable[Annotation]) -> Iterator[dict[str, Any]]:
    said = [one for one in said if one.did == "ranked"]
    for each, completion in item.completions.items():
        responses = [_response(rating_of(one, each), one.annotator) for one in said if each in one.ranks]
        fields = {"prompt": prompt_text(item), "completion": text_of(completion)}
        about = {"prompt_id": item.prompt_id, "completion_id": each}
        yield _record(f"{item.prompt_id}/{each}", fields, about, {"rating": responses})


def _record(name: str, fields: Any, metadata: Any, responses: Mapping[str, Any]) -> dict[str, Any]:
    given = {question: answers for question, answers in responses.items() if answers}
    return {"id": name, "fields": fields, "metadata": metadata, "suggestions": {}, "responses": given, "vectors": {}}


def _response(value: Any, annotator: str) -> dict[str, Any]:
    return {"value": value, "user_id": user_id(annotator), "status": "submitted"}


def spoken(found: Any, items: Mapping[str, Item], where: str) -> Iterator[Spoken]:
    """What stands in exported records, user by user; drafts are left out.

    Raises:
        DataError: it is no list of records, or a record is not about one of the items.
    """
    if not isinstance(found, list) or not all(isinstance(r, dict) and "fields" in r for r in found):
        raise DataError(f"{where}: no list of Argilla records (objects with `fields` and `responses`)")
    votes = Votes()
    for number, record in enumerate(found, start=1):
        at = f"{where}: record {number} ({record.get('id')})"
        about = record.get("metadata") or {}
        item = items.get(str(about.get("prompt_id", record.get("id"))))
        if item is None:
            votes.unknown += 1
            continue
        responses = record.get("responses") or {}
        if not isinstance(responses, dict):
            raise DataError(f"{at}: responses are a list; export with records.to_json, which has them by question")
        for question, answers in responses.items():
            for answer in answers:
                user, value, status = str(answer.get("user_id")), answer.get("value"), answer.get("status")
                if status == "discarded":
                    yield Spoken(item.prompt_id, user, None)
                elif status == "draft":
                    votes.drafts += 1
                elif isinstance(value, (int, float)) and not isinstance(value, bool):
                    votes.rate(item, user, str(about.get("completion_id")), value, at)
                else:
                    yield Spoken(item.prompt_id, user, _ranks(value, record["fields"], item, f"{at}: {question}"))
    yield from votes.spoken()
    votes.check(where, len(found))


def _ranks(value: Any, fields: Mapping[str, Any], item: Item, where: str) -> dict[str, int]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: found {value!r:.60}; a ranking (a list of fields' names) or a rating was expected")
    ranks: dict[str, float] = {}
    known = {text_of(completion): each for each, completion in item.completions.items()}
    for place, each in enumerate(value, start=1):
        name, rank = (each.get("value"), each.get("rank") or place) if isinstance(each, dict) else (each, place)
        text = fields.get(name) if isinstance(name, str) else None
        completion = known.get(text.strip()) if isinstance(text, str) else None
        if completion is None:
            raise DataError(f"{where}: the field {name!r} holds none of the completions of that prompt")
        ranks[completion] = rank
    return dense(ranks)
