"""Near-duplicate texts by MinHash over word 5-grams, with bounded memory (Broder 1997; banding as in LSH).

The signatures lie in a file, 512 bytes a text; the bands are compared one at a time by sorting. 10 million texts take
5.1 GB of disk and under 1 GB of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from align.core.text import stable_hash
from align.core.word_hashes import run_hashes, run_places, word_hashes

HASHES = 128
BANDS = 32
GRAM = 5
BATCH_CHARACTERS = 500_000
"""Texts are hashed so many characters at a time, so that all hashes of a batch stay in the processor's cache."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


def signatures(texts: Iterable[str], file: Path) -> int:
    """Writes the MinHash signature of each text, (HASHES,) uint32, to a file and gives the number of texts."""
    rng = np.random.default_rng(20240715)
    factors = rng.integers(0, 2**31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = rng.integers(0, 2**32, HASHES, dtype=np.uint32)
    count = 0
    with file.open("wb") as out:
        for batch in _batches(texts):
            grams, starts = _grams(batch)
            signature = np.empty((len(batch), HASHES), dtype=np.uint32)
            hashed = np.empty_like(grams)
            for number in range(HASHES):  # a·x + b (mod 2^32): one function after the other stays in the cache
                np.multiply(grams, factors[number], out=hashed)
                hashed += offsets[number]
                signature[:, number] = np.minimum.reduceat(hashed, starts)
            out.write(signature.tobytes())
            count += len(batch)
    return count


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _grams(texts: list[str]) -> tuple[U32, npt.NDArray[np.int64]]:
    """The hashes of the runs of GRAM words of all texts, and where each text's begin.

    A text of fewer words has one run, all of its words; a text without words has its own hash.
    """
    hashes, bounds = word_hashes(texts)
    lengths = np.diff(bounds)
    runs = np.maximum(lengths - GRAM + 1, 1)
    starts = np.cumsum(runs) - runs
    grams = np.empty(int(runs.sum()), dtype=np.uint64)
    places, owners = run_places(bounds, GRAM)
    grams[starts[owners] + places - bounds[:-1][owners]] = run_hashes(hashes, GRAM)[places]
    for number in np.flatnonzero(lengths < GRAM).tolist():
        mine = hashes[bounds[number] : bounds[number + 1]]
        grams[starts[number]] = run_hashes(mine, len(mine))[0] if len(mine) else int(stable_hash(texts[number]), 16)
    return (grams >> np.uint64(32)).astype(np.uint32), starts


def later_duplicates(file: Path, rank: npt.NDArray[np.uint8], threshold: float) -> npt.NDArray[np.bool_]:
    """Which texts have a near-duplicate before them.

    Texts that share a band are compared with the band's first text and with the one before them. The share of equal
    hashes estimates the Jaccard similarity of their 5-grams (standard error at most 0.045).

    Args:
        file: what `signatures` wrote, N texts.
        rank: (N,); texts of a lower rank come before those of a higher, then the file's order counts.
        threshold: from which estimated similarity on texts are duplicates.

    Returns:
        (N,) bool.
    """
    count = len(rank)
    found = np.zeros(count, dtype=np.bool_)
    if count < 2:
        return found
    table = np.memmap(file, dtype=np.uint32, mode="r", shape=(count, HASHES))
    for keys in _band_keys(table):
        order = np.lexsort((rank, keys))  # stable: the file's order within a rank
        new = np.append(True, keys[order][1:] != keys[order][:-1])
        firsts = order[np.maximum.accumulate(np.where(new, np.arange(count), 0))]
        for others in (firsts, np.append(order[:1], order[:-1])):
            open_pairs = np.flatnonzero(~new & ~found[order])
            for start in range(0, len(open_pairs), 100_000):
                at = open_pairs[start : start + 100_000]
                alike = (table[order[at]] == table[others[at]]).mean(axis=1) >= threshold
                found[order[at][alike]] = True
    return found


def _band_keys(table: npt.NDArray[np.uint32]) -> Iterator[U64]:
    """One key for each text, (N,), for one band after the other."""
    width = HASHES // BANDS
    for band in range(BANDS):
        key = np.zeros(len(table), dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = (key ^ table[:, column].astype(np.uint64)) * _MIX
            key ^= key >> np.uint64(31)
        yield key
