"""A model as judge of two completions of one prompt: each is shown first once, and only what both orders say decides.

Judges favour a place: when the two are swapped, GPT-4's verdict stayed the same for 65% of the pairs, and those of
weaker judges for fewer (arXiv:2306.05685). So the question is put in both orders. Where both name the same completion,
it wins; otherwise it is a tie (that paper's conservative rule). How often the place decided is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.core.asking import Answer, Question
from align.core.records import Verdict
from reward.agreement import cohens_kappa, wilson
from reward.judge import Values, filled, too_few, verdict_schema
from reward.judge_words import Side, read_winner

Winner = Literal["completion", "other", "tie"]

_OF_ORDER: tuple[dict[Side, Winner], ...] = (
    {"A": "completion", "B": "other", "tie": "tie"},
    {"A": "other", "B": "completion", "tie": "tie"},
)
"""What A and B stand for in the first order, where the completion is A, and in the second."""

_REWARDS: dict[Winner, float] = {"completion": 1.0, "tie": 0.5, "other": 0.0}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing a completion with another.

    Attributes:
        verdict: passed where the completion wins, failed where it loses or ties, with reward 1, 0 and 0.5; error where
            an order has too few votes that could be read.
        winner: by both orders; None on error.
        orders: the winner by each order; None on error.
        sides: the votes that could be read, in each order: A is the completion that was shown first.
        answers: the judge's answers, one a vote, in each order.
    """

    verdict: Verdict
    winner: Winner | None
    orders: tuple[Winner, ...] | None
    sides: tuple[tuple[Side, ...], ...]
    answers: Sequence[Sequence[Answer[Side]]]

    def figures(self) -> dict[str, Any]:
        """All of it, for a row."""
        return {
            "winner": self.winner,
            "orders": self.orders,
            "votes": self.sides,
            "unreadable": sum(answer.value is None for answers in self.answers for answer in answers),
            "words": [[answer.text for answer in answers] for answers in self.answers],
        }


def pair_questions(
    template: str, values: Values, completion: Any, other: Any, as_json: bool, more: Mapping[str, str] | None = None
) -> list[Question[Side]]:
    """The two questions, one an order: the completion is A in the first and B in the second.

    Args:
        template: with {completion_a} and {completion_b}.
        values: what else fills it.
        completion: text or messages.
        other: the same, of the completion that it is compared with.
        as_json: whether the engine holds the answer to a JSON object.
        more: see `filled`.
    """
    orders = ({"completion_a": completion, "completion_b": other}, {"completion_a": other, "completion_b": completion})
    schema = verdict_schema("winner", {"enum": ["A", "B", "tie"]}) if as_json else None
    return [Question(filled(template, {**values, **order}, more), read_winner, schema) for order in orders]


def compare(answers: Sequence[Sequence[Answer[Side]]], attempts: int) -> Comparison:
    """The comparison that the votes of both orders come to."""
    sides = tuple(tuple(a.value for a in votes if a.value is not None) for votes in answers)
    for number, votes in enumerate(answers):
        problem = too_few(votes, "winner", attempts)
        if problem is not None:
            shown = "the completion first" if number == 0 else "the other first"
            return Comparison(Verdict.error(f"with {shown}, {problem}"), None, None, sides, answers)
    orders = tuple(meaning[most(votes)] for meaning, votes in zip(_OF_ORDER, sides, strict=True))
    winner: Winner = orders[0] if orders[0] == orders[1] else "tie"
    if orders[0] != orders[1]:
        detail = f"judge: a tie, since the orders disagree: {_spoken(orders[0])}, then {_spoken(orders[1])}"
    else:
        detail = f"judge: {_spoken(winner)}, in both orders"
    verdict = Verdict("passed" if winner == "completion" else "failed", _REWARDS[winner], detail)
    return Comparison(verdict, winner, orders, sides, answers)


def most(votes: Sequence[Side]) -> Side:
    """What most votes say; a tie where two things have as many."""
    (first, count), *others = Counter(votes).most_common(2)
    return "tie" if others and others[0][1] == count else first


def _spoken(winner: Winner) -> str:
    return {"completion": "the completion wins", "other": "the other wins", "tie": "a tie"}[winner]


class PairTally:
    """Counts comparisons: who won, how far places decided, and how far the judge agrees with labels."""

    def __init__(self) -> None:
        self.winners: Counter[str] = Counter()
        self.sides: Counter[Side] = Counter()
        self.orders: Counter[tuple[str, str]] = Counter()
        self.votes: Counter[tuple[str, str]] = Counter()
        self.labels: Counter[tuple[str, str]] = Counter()

    def count(self, comparison: Comparison, expected: Winner | None) -> None:
        """Takes one comparison in, with its label where there is one; an error says nothing of the rest."""
        if comparison.winner is None or comparison.orders is None:
            return
        self.winners[comparison.winner] += 1
        self.orders[comparison.orders[0], comparison.orders[1]] += 1
        for sides in comparison.sides:
            self.sides[most(sides)] += 1
            if len(sides) > 1:
                self.votes[sides[0], sides[1]] += 1
        if expected is not None:
            self.labels[comparison.winner, expected] += 1

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest.

        `first_position_share` is of the orders' verdicts that are no tie, a half where places mean nothing. The kappas
        are Cohen's: between the two orders, the first two votes of each order, the judge and the labels.
        """
        decided = self.sides["A"] + self.sides["B"]
        compared = self.winners.total()
        differing = sum(count for (one, other), count in self.orders.items() if one != other)
        found: dict[str, Any] = {
            "wins": self.winners["completion"],
            "losses": self.winners["other"],
            "ties": self.winners["tie"],
            "first_position_share": _share(self.sides["A"], decided),
            "inconsistent": differing,
            "inconsistent_share": _share(differing, compared),
            "order_kappa": _rounded(cohens_kappa(self.orders)),
        }
        if self.votes:
            found["vote_kappa"] = _rounded(cohens_kappa(self.votes))
        if self.labels:
            found["labels"] = self._agreement()
        return found

    def _agreement(self) -> dict[str, Any]:
        """Accuracy in percent with its 95% interval; a tie is wrong unless the label is one.

        Labels that are all the same, as those of preferences are, leave nothing to agree on beyond chance: no kappa.
        """
        right = sum(count for (winner, expected), count in self.labels.items() if winner == expected)
        labelled = self.labels.total()
        low, high = wilson(right, labelled)
        return {
            "n": labelled,
            "right": right,
            "tied": sum(count for (winner, _), count in self.labels.items() if winner == "tie"),
            "accuracy": round(100 * right / labelled, 2),
            "low": round(low, 2),
            "high": round(high, 2),
            "kappa": _rounded(cohens_kappa(self.labels)) if len({label for _, label in self.labels}) > 1 else None,
        }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
