"""Rankings of one prompt's completions: who is better than whom, how that becomes a score, how far rankers agree.

Whatever ranks (a judge, a reward model, a person) comes to the same thing: for some pairs of completions which one is
better, or a tie. A completion's score is the share of its comparisons that it won, a tie counting half: Copeland's
score, moved to 0 to 1. Over all pairs of n completions it has the steps of 1/(n - 1) that the ranks have.

A judge may contradict itself: A over B, B over C, C over A. Such circular triads are counted (Kendall and Babington
Smith 1940); none is a perfect ranking, a quarter of all triads is what coins would give.

Agreement is Cohen's kappa (1960) over the pairs that both rankers compared, with the categories first, second and tie.
Which completion stands first means nothing, so each pair is counted both ways round, which makes the margins, and so
the agreement by chance, the same whatever the order. Of more than two rankers it is the mean over their pairs (Light
1971), which needs no ranker to have seen everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from reward.agreement import cohens_kappa

Ranking = Mapping[tuple[int, int], float]
"""By a pair of places (i, j), i < j: 1 where i is better, 0 where j is, 0.5 for a tie."""


def ranking_of(scores: Sequence[float | None]) -> dict[tuple[int, int], float]:
    """The ranking that scores give, higher being better; a place without a score is not compared."""
    return {
        (i, j): 0.5 if a == b else float(a > b)
        for (i, a), (j, b) in combinations(enumerate(scores), 2)
        if a is not None and b is not None
    }


def win_rates(count: int, rankings: Iterable[Ranking]) -> list[float | None]:
    """Each completion's share of comparisons won, over all rankings; None where it was never compared."""
    won, compared = [0.0] * count, [0] * count
    for ranking in rankings:
        for (i, j), outcome in ranking.items():
            won[i] += outcome
            won[j] += 1 - outcome
            compared[i] += 1
            compared[j] += 1
    return [wins / n if n else None for wins, n in zip(won, compared, strict=True)]


def ranks_of(scores: Sequence[float | None]) -> list[int | None]:
    """Ranks by score, 1 for the highest; equal scores share one, and the next rank counts them all (1, 1, 3)."""
    given = [score for score in scores if score is not None]
    return [None if score is None else 1 + sum(other > score for other in given) for score in scores]


def circular_triads(count: int, ranking: Ranking) -> tuple[int, int]:
    """How many triads go in a circle, and how many were decided: all three pairs compared, none a tie."""
    circular = decided = 0
    for i, j, k in combinations(range(count), 3):
        outcomes = [ranking.get(pair) for pair in ((i, j), (j, k), (i, k))]
        if not any(outcome is None or outcome == 0.5 for outcome in outcomes):
            decided += 1
            circular += outcomes[0] == outcomes[1] != outcomes[2]  # i over j over k over i, or all the other way
    return circular, decided


class Agreement:
    """Counts how every two rankers agree.

    Args:
        kinds: by ranker, what it is: judge, person, reward model.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = dict(kinds)
        self.pairs: dict[tuple[str, str], Counter[tuple[str, str]]] = {}

    def count(self, rankings: Mapping[str, Ranking]) -> None:
        """Takes in what rankers said of one prompt's completions; each ranker is one of `kinds`."""
        for one, other in combinations([ranker for ranker in self.kinds if ranker in rankings], 2):
            tally = self.pairs.setdefault((one, other), Counter())
            for pair, outcome in rankings[one].items():
                if pair in rankings[other]:
                    tally[_SAID[outcome], _SAID[rankings[other][pair]]] += 1

    def summary(self) -> dict[str, Any]:
        """By what the rankers are ("judge and person"): each two of them, and the mean of their kappas.

        `n` is the pairs of completions that both compared, `agreed` the share on which they said the same.
        """
        found: dict[str, Any] = {}
        for (one, other), tally in self.pairs.items():
            n = tally.total()
            if not n:
                continue
            kappa = cohens_kappa(_both_ways(tally))
            of_kind = found.setdefault(" and ".join(sorted((self.kinds[one], self.kinds[other]))), {"between": []})
            of_kind["between"].append(
                {
                    "rankers": [one, other],
                    "n": n,
                    "agreed": round(sum(c for (a, b), c in tally.items() if a == b) / n, 4),
                    "kappa": None if kappa is None else round(kappa, 4),
                }
            )
        for of_kind in found.values():
            kappas = [each["kappa"] for each in of_kind["between"] if each["kappa"] is not None]
            of_kind["n"] = sum(each["n"] for each in of_kind["between"])
            of_kind["kappa"] = round(fmean(kappas), 4) if kappas else None
        return found


_SAID = {1.0: "first", 0.0: "second", 0.5: "tie"}
_TURNED = {"first": "second", "second": "first", "tie": "tie"}


def _both_ways(tally: Mapping[tuple[str, str], int]) -> Counter[tuple[str, str]]:
    """The counts with each pair of completions seen from either side."""
    turned: Counter[tuple[str, str]] = Counter(tally)
    for (a, b), count in tally.items():
        turned[_TURNED[a], _TURNED[b]] += count
    return turned
