"""Tags as open-set taggers give them, made up: for measuring `ontology` at any size.

Frequencies follow Zipf's law. An instruction is of one subject, has tags of that subject and a few of any; about one
tag in twelve is written in another way than usual (case, plural, hyphen, a slip of the pen, a word more), and some tags
always come with another one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_STARTS = (
    "ba be bi bo bu da de di do du fa fe fi fo ga ge gi go ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe"
).split()
_ENDS = "ction ment ity ness ing tion ance ology ics er or al ism graphy tics ture ship age ry".split()
SUBJECTS = 400


def vocabulary(size: int, rng: np.random.Generator) -> list[str]:
    """Distinct made-up English-like words."""
    words: dict[str, None] = {}
    while len(words) < size:
        middle = "".join(rng.choice(_STARTS, size=rng.integers(1, 4)))
        words[middle + str(rng.choice(_ENDS))] = None
    return list(words)


def concepts(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct tags of one to three words, the words' frequencies Zipf's too."""
    words = vocabulary(6000, rng)
    shares = 1 / np.arange(1, len(words) + 1) ** 0.8
    drawn = rng.choice(len(words), size=(count * 2, 3), p=shares / shares.sum())
    lengths = rng.choice([1, 2, 3], p=[0.1, 0.6, 0.3], size=count * 2)
    found: dict[str, None] = {}
    for places, length in zip(drawn.tolist(), lengths.tolist(), strict=True):
        found[" ".join(words[place] for place in places[:length])] = None
        if len(found) == count:
            break
    return list(found)


def variant(tag: str, rng: np.random.Generator) -> str:
    """The tag as somebody else writes it."""
    kind = int(rng.integers(0, 6))
    if kind == 0:
        return tag.title()
    if kind == 1:
        return tag + "s"
    if kind == 2:
        return tag.replace(" ", "-")
    if kind == 3:
        return tag.replace(" ", "_").upper()
    if kind == 4:
        place = int(rng.integers(0, len(tag)))
        return tag[:place] + tag[place + 1 :]
    return tag + " task"


def instructions(count: int, unique: int, seed: int) -> Iterator[list[str]]:
    """Yields the tags of each instruction, 4.4 on average, of about `unique` different strings in all."""
    rng = np.random.default_rng(seed)
    names = concepts(int(unique * 0.6), rng)
    shares = 1 / np.arange(3, len(names) + 3) ** 0.85
    cumulated = np.cumsum(shares / shares.sum())
    subject = rng.integers(0, SUBJECTS, size=len(names))
    of_subject = [np.flatnonzero(subject == number) for number in range(SUBJECTS)]
    inside = []
    for places in of_subject:
        local = np.cumsum(shares[places])
        inside.append(local / local[-1])
    partner = {
        int(n): int(of_subject[subject[n]][0])
        for n in rng.choice(len(names) // 20, size=min(300, len(names) // 20), replace=False)
    }
    for _ in range(count):
        first = int(np.searchsorted(cumulated, rng.random()))
        own = int(subject[first])
        tags = [first]
        for place in np.searchsorted(inside[own], rng.random(int(rng.integers(1, 4)))):
            tags.append(int(of_subject[own][place]))
        tags += np.searchsorted(cumulated, rng.random(int(rng.integers(1, 3)))).tolist()
        tags += [partner[tag] for tag in tags if tag in partner]
        written = [variant(names[tag], rng) if rng.random() < 0.08 else names[tag] for tag in dict.fromkeys(tags)]
        yield list(dict.fromkeys(written))
