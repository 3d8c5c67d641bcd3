"""Words as IFEval counts them: `\\w+` for lengths, Penn Treebank tokens for words in capitals."""

from __future__ import annotations

import re

_ALONE = re.compile(
    r"""\.{2,}|(?<!\.)\.(?=[\])}>"'»”’]*(?:\s|\Z))|--|''|``|[\]\[(){}<>;@#$%&?!*"`«»“”„‘’]|[:,](?!\d)"""
)
_QUOTED = re.compile(r"'(?!re|ve|ll|[mtsdn])(?=\w\b)", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=[^' ])('(?:[sSmMdD]|ll|LL|re|RE|ve|VE)?|n't|N'T)(?= )")
_FUSED = re.compile(
    r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b"
    r"|\b(wan)(na)(?=\s)|(?<= )('t)(is)\b|(?<= )('t)(was)\b",
    re.IGNORECASE,
)


def count_words(text: str) -> int:
    """Maximal runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_capital_words(text: str) -> int:
    """Treebank tokens whose letters are all capitals: "I'M" is two ("I", "'M"), "WELL-KNOWN" one, "I'm" one ("I").

    Any period before white space is split off, not only a sentence's last one: it shows only behind an abbreviation,
    which is in capitals or not with and without it.
    """
    candidates = " ".join(chunk for chunk in text.split() if chunk != chunk.lower())  # the others hold no capital
    spaced = " " + _ALONE.sub(r" \g<0> ", candidates) + " "
    spaced = re.sub(r"\s+", " ", _QUOTED.sub("' ", spaced))
    for _ in range(2):  # "I'D'VE"
        spaced = _CLITIC.sub(r" \1", spaced)
    spaced = _FUSED.sub(lambda m: " ".join(part for part in m.groups() if part), spaced)
    return sum(token.isupper() for token in spaced.split())
