"""Which of several right completions are kept, so that they differ: RFT's rules (arXiv:2308.01825 and its code)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rapidfuzz.distance import Levenshtein


def distinct_paths(keys: Iterable[str], texts: Sequence[str]) -> list[int]:
    """Places of one path for each key, as RFT's code chooses them: streaming and greedy.

    Of two paths with one key the one farther from the other kept paths stays, by summed Levenshtein distance; the first
    one when they are equally far.
    """
    kept: dict[str, int] = {}
    for place, key in enumerate(keys):
        if key not in kept:
            kept[key] = place
            continue
        others = [texts[other] for other_key, other in kept.items() if other_key != key]
        distance, before = (
            sum(Levenshtein.distance(text, other) for other in others) for text in (texts[place], texts[kept[key]])
        )
        if distance > before:
            kept[key] = place
    return list(kept.values())


def most_distinct(places: Sequence[int], texts: Sequence[str], keep: int | None) -> list[int]:
    """At most `keep` of the places: the first, then each time the one farthest from those chosen so far.

    By summed Levenshtein distance, RFT's measure; the first one when several are equally far.
    """
    if keep is None or len(places) <= keep:
        return list(places)
    chosen = [places[0]]
    distance = dict.fromkeys(places[1:], 0)
    while len(chosen) < keep:
        for place in distance:
            distance[place] += Levenshtein.distance(texts[place], texts[chosen[-1]])
        chosen.append(max(distance, key=lambda place: distance[place]))
        del distance[chosen[-1]]
    return chosen
