"""Label Studio's tasks as JSON (labelstud.io/guide/task_format, labelstud.io/tags/ranker, /tags/rating): a list of

    {"id": …, "data": {…}, "annotations": [{"completed_by": …, "result": [{"type": …, "value": {…}}], …}]}

A ranking is one task a prompt; `data.items` are the completions, with `id`, `title` and `body`, shown by the tag `List`
and ordered by `Ranker`. Its value is `{"ranker": {NAME: [ids, best first]}}`, or with buckets `{"ranker": {BUCKET:
[ids], …}}`, where our buckets are named by their rank, so that ties can be said. A rating is one task a completion,
with the tag `Rating`, whose value is `{"rating": n}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from align.annotate.desk import Item
from align.annotate.exchange import HIGHEST, Question, Spoken, Votes, prompt_text, rating_of, text_of
from align.core.errors import DataError
from reward.annotations import Annotation, dense

_UNSORTED = "_"
"""What Label Studio calls the items that lie in no bucket."""


def config(items: Sequence[Item], question: Question) -> str:
    """The labelling configuration that goes with an export."""
    if question == "rating":
        asked = (
            '  <Text name="completion" value="$completion"/>\n'
            f'  <Rating name="rating" toName="completion" maxRating="{HIGHEST}" required="true"/>'
        )
    else:
        most = max(len(item.completions) for item in items)
        buckets = "\n".join(f'    <Bucket name="{rank}" title="{_title(rank)}"/>' for rank in range(1, most + 1))
        asked = (
            '  <List name="completions" value="$items" title="Answers"/>\n'
            f'  <Ranker name="rank" toName="completions">\n{buckets}\n  </Ranker>'
        )
    return f'<View>\n  <Text name="prompt" value="$prompt"/>\n{asked}\n</View>\n'


def _title(rank: int) -> str:
    return "1, the best" if rank == 1 else str(rank)


def export(items: Sequence[Item], said: Mapping[str, Sequence[Annotation]], question: Question) -> list[dict[str, Any]]:
    """The tasks of some items with what was said of them, by prompt."""
    make = _rating if question == "rating" else _ranking
    tasks = [task for item in items for task in make(item, said.get(item.prompt_id, ()))]
    return [{"id": number, **task} for number, task in enumerate(tasks, start=1)]


def _ranking(item: Item, said: Iterable[Annotation]) -> Iterator[dict[str, Any]]:
    shown = [
        {"id": each, "title": f"Answer {number}", "body": text_of(completion)}
        for number, (each, completion) in enumerate(item.completions.items(), start=1)
    ]
    annotations = []
    for one in said:
        buckets: dict[str, list[str]] = {str(rank): [] for rank in range(1, len(item.completions) + 1)}
        for each, rank in one.ranks.items():
            buckets[str(rank)].append(each)
        result = {"from_name": "rank", "to_name": "completions", "type": "ranker", "value": {"ranker": buckets}}
        annotations.append(_annotation(one, [] if one.did == "skipped" else [result]))
    data = {"prompt_id": item.prompt_id, "prompt": prompt_text(item), "items": shown}
    yield {"data": data, "annotations": annotations}


def _rating(item: Item, said: Iterable[Annotation]) -> Iterator[dict[str, Any]]:
    said = [one for one in said if one.did == "ranked"]
    for each, completion in item.completions.items():
        results = [
            _annotation(
                one,
                [{"from_name": "rating", "to_name": "completion", "type": "rating",
                  "value": {"rating": rating_of(one, each)}}],
            )
            for one in said if each in one.ranks
        ]  # fmt: skip
        data = {"prompt_id": item.prompt_id, "completion_id": each}
        yield {"data": {**data, "prompt": prompt_text(item), "completion": text_of(completion)}, "annotations": results}


def _annotation(said: Annotation, result: Any) -> dict[str, Any]:
    time = {} if said.seconds is None else {"lead_time": said.seconds}
    by = {"email": said.annotator}
    return {"completed_by": by, "result": result, "was_cancelled": said.did == "skipped", **time}


def spoken(found: Any, items: Mapping[str, Item], where: str) -> Iterator[Spoken]:
    """What stands in exported tasks, annotation by annotation.

    Raises:
        DataError: it is no list of tasks, or a result is no ranking and no rating of an item's completions.
    """
    if not isinstance(found, list) or not all(isinstance(t, dict) and isinstance(t.get("data"), dict) for t in found):
        raise DataError(
            f"{where}: no list of Label Studio tasks (objects with `data` and `annotations`); export as JSON"
        )
    votes = Votes()
    for number, task in enumerate(found, start=1):
        item = items.get(str(task["data"].get("prompt_id")))
        if item is None:
            votes.unknown += 1
            continue
        for annotation in task.get("annotations") or ():
            user, at = _user(annotation.get("completed_by")), f"{where}: task {number}"
            seconds = annotation.get("lead_time")
            if annotation.get("was_cancelled"):
                yield Spoken(item.prompt_id, user, None, seconds)
                continue
            for result in annotation.get("result") or ():
                value = result.get("value") or {}
                if result.get("type") == "rating":
                    votes.rate(item, user, str(task["data"].get("completion_id")), value.get("rating"), at)
                elif result.get("type") == "ranker":
                    yield Spoken(item.prompt_id, user, _ranks(value.get("ranker"), item, at), seconds)
                else:
                    raise DataError(f"{at}: a result of type {result.get('type')!r}; ranker and rating are known")
    yield from votes.spoken()
    votes.check(where, len(found))


def _user(by: Any) -> str:
    """Who made an annotation: an id, or an object with an e-mail address, whichever way it was exported."""
    return str(by.get("email") or by.get("id")) if isinstance(by, dict) else str(by)


def _ranks(value: Any, item: Item, where: str) -> dict[str, int]:
    if isinstance(value, dict) and len(value) == 1 and not next(iter(value)).isdigit():
        (value,) = value.values()
    buckets = dict(enumerate(([each] for each in value), start=1)) if isinstance(value, list) else value
    if not isinstance(buckets, dict):
        raise DataError(f"{where}: found {value!r:.60}; the ranker's lists of ids were expected")
    ranks: dict[str, float] = {}
    for name, ids in buckets.items():
        if name == _UNSORTED:
            continue
        if not str(name).isdigit():
            raise DataError(f"{where}: the bucket {name!r}; buckets are named by their rank: 1 for the best, 2, …")
        for each in ids:
            if each not in item.completions:
                raise DataError(f"{where}: {each!r} is the id of none of the completions of that prompt")
            ranks[each] = int(name)
    if not ranks:
        raise DataError(f"{where}: the ranking is empty")
    return dense(ranks)
