"""What is ranked on the page: prompts with their completions, blind and shuffled, and what was said of them so far."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Kind, Message
from align.core.sources import open_source
from reward.annotations import Annotation, AnnotationFile, completion_id, dense

LATEST = 20
"""Judgements whose time tells how long the others will take."""

MOST_SECONDS = 600.0
"""A judgement that took longer was a break."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its distinct completions; nothing tells what wrote them.

    Attributes:
        prompt_id: of the prompt.
        prompt: its messages.
        completions: messages by the completion's id.
    """

    prompt_id: str
    prompt: Sequence[Message]
    completions: Mapping[str, Sequence[Message]]


def read_items(completions: str, most: int | None = None) -> Iterator[Item]:
    """Yields the prompts of a table of completions that have at least two different ones.

    Args:
        completions: a step's folder, or any data of completions.
        most: of the table's prompts only the first so many.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = open_source(completions, Kind.COMPLETIONS, Path(folder))
        for rows in islice(by_prompt(table, Path(folder)), most):
            sampled = [row["completion"] for row in rows if row.get("finish_reason") != "error" and row["completion"]]
            distinct = {completion_id(completion): completion for completion in sampled}
            if len(distinct) > 1:
                yield Item(rows[0]["prompt_id"], rows[0]["prompt"], distinct)


class RefusedError(ValueError):
    """What the page sent is no judgement of what it was shown."""


class Desk:
    """The items, and one annotator's judgements of them.

    Args:
        items: what is to be ranked.
        file: where judgements go.
        annotator: who ranks.
        seed: decides the order in which completions are shown, another one for each annotator.

    Raises:
        DataError: there is nothing to rank.
    """

    def __init__(self, items: Sequence[Item], file: AnnotationFile, annotator: str, seed: int = 0) -> None:
        if not items:
            raise DataError("there is no prompt with two different completions; people rank at least two")
        self.items = {item.prompt_id: item for item in items}
        self.file, self.annotator, self.seed = file, annotator, seed
        self.lock = Lock()

    def _said(self) -> dict[str, Annotation]:
        """This annotator's standing judgements of these items, in the order in which they were made."""
        return {
            prompt_id: said
            for (annotator, prompt_id), said in self.file.standing.items()
            if annotator == self.annotator and prompt_id in self.items
        }

    def state(self, prompt_id: str | None = None, before: Annotation | None = None) -> dict[str, Any]:
        """What the page shows: progress, and an item (the first that nothing was said of, unless one is asked for)."""
        said = self._said()
        chosen = prompt_id or next((each for each in self.items if each not in said), None)
        return {"progress": self._progress(said), "item": None if chosen is None else self._shown(chosen, before)}

    def skipped(self) -> dict[str, Any]:
        """The same with the first item that was skipped."""
        return self.state(next((each for each, said in self._said().items() if said.did == "skipped"), None))

    def _progress(self, said: Mapping[str, Annotation]) -> dict[str, Any]:
        ranked = [each for each in said.values() if each.did == "ranked"]
        times = [each.seconds for each in ranked if each.seconds is not None][-LATEST:]
        left = len(self.items) - len(said)
        return {
            "annotator": self.annotator,
            "all": len(self.items),
            "ranked": len(ranked),
            "skipped": len(said) - len(ranked),
            "minutes_left": round(fmean(times) * left / 60, 1) if times and left else None,
        }

    def _shown(self, prompt_id: str, before: Annotation | None) -> dict[str, Any]:
        item = self.items[prompt_id]
        ids = sorted(item.completions)
        random.Random(f"{self.seed}/{self.annotator}/{prompt_id}").shuffle(ids)
        known = before is not None and before.did == "ranked"
        return {
            "prompt_id": prompt_id,
            "number": list(self.items).index(prompt_id) + 1,
            "prompt": shown_turns(item.prompt),
            "answers": [{"id": each, "turns": shown_turns(item.completions[each])} for each in ids],
            "ranks": dict(before.ranks) if before is not None and known else {},
            "good": before.good if before is not None and known else True,
        }

    def rank(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a ranking, and gives what comes next.

        Raises:
            RefusedError: it doesn't rank just the completions of an item.
            RunError: it could not be kept.
        """
        item = self._item(sent)
        ranks = sent.get("ranks")
        if not isinstance(ranks, dict) or set(ranks) != set(item.completions):
            raise RefusedError("a ranking has a rank for every completion of the prompt")
        if any(isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 99 for rank in ranks.values()):
            raise RefusedError("ranks are whole numbers from 1")
        if not isinstance(sent.get("good"), bool):
            raise RefusedError("good is true or false")
        said = Annotation(item.prompt_id, self.annotator, "ranked", dense(ranks), sent["good"], _seconds(sent), _now())
        self.file.add(said)
        return self.state()

    def skip(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps that an item was skipped, and gives what comes next; see `rank` for the errors."""
        self.file.add(Annotation(self._item(sent).prompt_id, self.annotator, "skipped", at=_now()))
        return self.state()

    def undo(self) -> dict[str, Any]:
        """Takes the last judgement back, and gives its item as it was judged; see `rank` for the errors."""
        said = self._said()
        if not said:
            raise RefusedError("nothing was judged yet")
        last = list(said.values())[-1]
        self.file.add(Annotation(last.prompt_id, self.annotator, "undone", at=_now()))
        return self.state(last.prompt_id, last)

    def _item(self, sent: Mapping[str, Any]) -> Item:
        item = self.items.get(str(sent.get("prompt_id")))
        if item is None:
            raise RefusedError("there is no such prompt here; reload the page")
        return item


def _seconds(sent: Mapping[str, Any]) -> float | None:
    seconds = sent.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MOST_SECONDS:
        return None
    return round(float(seconds), 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def shown_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as a person reads them: role and text, calls of tools as JSON below the text."""
    return [{"role": each["role"], "text": shown_text(each)} for each in messages]


def shown_text(message: Message) -> str:
    """A message's content, and the calls of tools in it as JSON."""
    calls = message.get("tool_calls")
    text = message["content"]
    return f"{text}\n{json.dumps(calls, ensure_ascii=False)}".lstrip("\n") if calls else text
