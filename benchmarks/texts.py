"""Made texts for the benchmarks of overlaps and duplicates: words by Zipf's law, and known near-copies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def vocabulary(size: int, rng: np.random.Generator) -> NDArray[np.str_]:
    """Distinct made-up words of 2 to 9 letters, the short ones first, as frequent words are."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words: dict[str, None] = {}
    while len(words) < size:
        length = 2 + min(7, int(len(words) ** 0.5) // 8 + int(rng.integers(0, 3)))
        words["".join(rng.choice(letters[:20], length))] = None
    return np.array(list(words))


def texts(count: int, rng: np.random.Generator, least: int = 20, most: int = 200) -> list[str]:
    """Texts of `least` to `most` words, drawn by Zipf's law from 20,000, with capitals and punctuation."""
    known = vocabulary(20_000, rng)
    chances = 1 / np.arange(1, len(known) + 1)
    sizes = rng.integers(least, most + 1, count)
    drawn = known[rng.choice(len(known), int(sizes.sum()), p=chances / chances.sum())].tolist()
    found, place = [], 0
    for size in sizes.tolist():
        words = drawn[place : place + size]
        place += size
        sentences = [" ".join(words[at : at + 12]).capitalize() + "." for at in range(0, size, 12)]
        found.append(" ".join(sentences))
    return found


def edited(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with a share of its words made other words."""
    words = text.split()
    for place in rng.choice(len(words), round(share * len(words)), replace=False).tolist():
        words[place] = f"edited{int(rng.integers(1_000_000))}"
    return " ".join(words)


def megabytes(found: list[str]) -> float:
    """Size in UTF-8, 10^6 bytes."""
    return sum(len(text.encode()) for text in found) / 1e6
