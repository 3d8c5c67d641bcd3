"""What the formats of other annotation tools have in common: texts of items, and votes that become rankings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from align.annotate.desk import Item, shown_text
from align.core.errors import DataError
from reward.annotations import Annotation, dense

Question = Literal["ranking", "rating"]
HIGHEST = 10
"""The highest rating in an export."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one user of another tool said of one prompt.

    Attributes:
        prompt_id: of the prompt.
        user: as the tool calls them.
        ranks: by completion; None where the user passed the prompt by.
        seconds: how long it took, where known.
    """

    prompt_id: str
    user: str
    ranks: Mapping[str, int] | None
    seconds: float | None = None


def text_of(completion: Any) -> str:
    """A completion as one text; roles stand above the messages where there are several."""
    if len(completion) == 1:
        return shown_text(completion[0]).strip()
    return "\n\n".join(f"[{turn['role']}]\n{shown_text(turn)}" for turn in completion).strip()


def prompt_text(item: Item) -> str:
    """The prompt of an item as one text."""
    return text_of(item.prompt)


def rating_of(said: Annotation, completion: str) -> int:
    """A rank as a rating: the best gets `HIGHEST`, every further rank one less.

    Raises:
        DataError: there are more ranks than ratings.
    """
    rank = said.ranks[completion]
    if rank > HIGHEST:
        raise DataError(f"the prompt {said.prompt_id} has more than {HIGHEST} ranks, and ratings go up to {HIGHEST}")
    return HIGHEST + 1 - rank


@dataclass
class Votes:
    """Ratings of single completions, gathered until they make a ranking.

    Attributes:
        ratings: by prompt and user, the rating of each completion.
        unknown: records about no item.
        drafts: answers that were not submitted.
    """

    ratings: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    unknown: int = 0
    drafts: int = 0

    def rate(self, item: Item, user: str, completion: str, rating: Any, where: str) -> None:
        """Takes a rating in.

        Raises:
            DataError: it is no number, or of no completion of the item.
        """
        if completion not in item.completions:
            raise DataError(f"{where}: completion_id {completion!r} is of none of the completions of that prompt")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)):
            raise DataError(f"{where}: the rating {rating!r:.60}; a number was expected")
        self.ratings.setdefault((item.prompt_id, user), {})[completion] = rating

    def spoken(self) -> Iterator[Spoken]:
        """Yields the rankings that the ratings make: the higher, the better; equal ones tie."""
        for (prompt_id, user), ratings in self.ratings.items():
            yield Spoken(prompt_id, user, dense({each: -rating for each, rating in ratings.items()}))

    def check(self, where: str, records: int) -> None:
        """Refuses a file that is about other prompts.

        Raises:
            DataError: no record was about an item.
        """
        if records and self.unknown == records:
            raise DataError(
                f"{where}: none of {records} records is about a prompt of these completions; import what was exported "
                "of the same ones, with ids and `data` as they were"
            )
