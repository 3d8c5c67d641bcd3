"""Text as the stages compare it: normalised, cut into words and n-grams, hashed the same way on every machine."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from align.core.records import Split

WORDS_BY_THEMSELVES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FFFF))
"""Chinese and kana: characters that are a word each, from and to."""
_ALONE = "".join(f"{chr(low)}-{chr(high)}" for low, high in WORDS_BY_THEMSELVES)
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_as_json = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode
_ASCII_BLANKS = {code: " " for code in range(128) if not chr(code).isalnum()}
_ASCII = bytes(range(128))
_BLANKS = frozenset("‘’‚“”„«»‹›–—―•·′″€£¥§©®°×÷←→≤≥≠≈✓\u00a0\u200b\ufeff")
"""Common symbols that NFKC turns into no letter and no digit: in an English text they are as good as blanks."""


def normalise(text: str) -> str:
    """The text in Unicode's NFKC form, lower-cased (case-folded), runs of whitespace made one space, ends stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of the normalised text, punctuation left out.

    A script written without spaces (Chinese, Japanese kana) gives one word a character.
    """
    plain = plain_ascii(text)
    if plain is not None:
        return plain.decode().lower().translate(_ASCII_BLANKS).split()  # the same, several times as fast
    return _WORD.findall(normalise(text))


def plain_ascii(text: str) -> bytes | None:
    """The bytes of a text that has ASCII letters only, other symbols in it made ?; None where it has other letters."""
    if text.isascii():
        return text.encode()
    others = text.encode("utf-8", "surrogatepass").translate(None, _ASCII).decode("utf-8", "surrogatepass")
    return text.encode("ascii", "replace") if _BLANKS.issuperset(others) else None


def ngrams(items: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of `n` neighbours; none where there are fewer than `n` items."""
    return (tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def stable_hash(text: str, size: int = 8) -> str:
    """A hexadecimal hash of the text (BLAKE2b, `size` bytes) that is the same in every process and on every machine."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def prompt_id_of(prompt: Sequence[Any]) -> str:
    """The id of a prompt that came without one: the hash of its roles and contents."""
    turns = [[turn["role"], turn["content"]] for turn in prompt]
    return stable_hash(_as_json(turns))


def root_text(prompt: Sequence[Any]) -> str:
    """The text whose hash decides a prompt's split: what the user says, normalised.

    Prompts that differ only in case, spacing or system message fall into one split.
    """
    return normalise("\n".join(turn["content"] for turn in prompt if turn["role"] == "user"))


def split_of(root: str, dev: float, test: float, seed: int = 0) -> Split:
    """The split of everything made from a root prompt.

    Args:
        root: the root prompt's text (see `root_text`), or its id.
        dev: share of the root prompts that go to the development split.
        test: share that goes to the test split; the rest is train.
        seed: another seed, another division.
    """
    place = int(stable_hash(f"{seed}\n{root}"), 16) / 2**64
    if place < test:
        return "test"
    return "dev" if place < test + dev else "train"
