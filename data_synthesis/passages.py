"""Passages: pieces of text that are answers to instructions nobody has written yet; read, cut, and told where from.

A document is cut at its own paragraphs. Paragraphs that follow one another become one passage, whose length is drawn
between two limits, so that a model doesn't learn to answer always as long; a paragraph that is too long is cut at its
sentences. What is no prose (headings, tables of contents, rules, a distributor's header and footer) is passed by and
counted, and no passage runs across it. A passage is the document's text as it stands, from `start` to `end`.

Differs from the report (arXiv:2407.10671, 4.1.2): it says nothing of how its passages were cut; all of this is ours.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind, Row, Split, message_text
from align.core.stage import StageConfig
from align.core.store import Table
from align.core.text import normalise, split_of, stable_hash, words


class PassageConfig(StageConfig):
    """Settings of the stages that read passages. A word is also one character of Chinese or kana."""

    text: str = Field(
        "text", description="the column with the text: text, or messages, of which the assistant's count; a file of "
        "text has its content there",
    )  # fmt: skip
    whole: bool = Field(False, description="take each row's text as one passage, as it is, and cut nothing")
    min_words: int = Field(40, ge=1, description="shorter passages are passed by")
    max_words: int = Field(
        400, ge=1, description="no passage is longer; where texts are cut, lengths are drawn between the two limits"
    )
    min_letters: float = Field(
        0.6, ge=0, le=1, description="a paragraph with a smaller share of letters is a table, a rule or code, and is "
        "passed by (not where whole=true)",
    )  # fmt: skip
    share: float = Field(1.0, gt=0, le=1, description="share of the passages that is taken, by their hash")
    count: int | None = Field(None, ge=1, description="most passages, the first ones taken; all by default")
    dev: float = Field(
        0.05, ge=0, lt=1, description="share of the passages that is held out as dev, by their hash; passages of a row "
        "that is held out itself stay so",
    )  # fmt: skip
    test: float = Field(0.05, ge=0, lt=1, description="the same for test")
    splits: list[Split] = Field(
        ["train"], min_length=1, description="passages of these splits are worked on, others passed by"
    )

    @model_validator(mode="after")
    def _limits_make_sense(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words={self.min_words} must not be above max_words={self.max_words}; swap them")
        if self.dev + self.test >= 1:
            raise ValueError(f"dev={self.dev:g} and test={self.test:g} leave nothing to train on; lower them")
        return self


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document.

    Attributes:
        text: as it stands there.
        start, end: where in the row's text, in characters.
        split: inherited from a row that is held out; else by the passage's own hash.
        row: the document's.
        license: of its source, where it is stated.
    """

    text: str
    start: int
    end: int
    split: str
    row: Row
    license: str | None

    def columns(self) -> Row:
        """What rows made from it say of where it comes from."""
        return {
            "split": self.split,
            "source": self.row.get("source"),
            "family": self.row.get("family"),
            "source_row": self.row.get("source_row"),
            "parent_id": self.row.get("prompt_id") if self.row.get("prompt") else None,
            "passage_id": stable_hash(self.text),
            "start": self.start,
            "end": self.end,
            "license": self.license,
        }


def passages_of(table: Table, config: PassageConfig, skipped: Counter[str]) -> Iterator[Passage]:
    """Yields the passages of all rows, in order, each text once; counts what is passed by, and why.

    Raises:
        DataError: the column with the text isn't there, or holds something else.
    """
    if config.text not in table.columns:
        raise DataError(
            f"{table.name}: has no column {config.text!r} with the passages' text; it has {own_columns(table)}; "
            "name one of them with text=…"
        )
    seen: set[int] = set()
    for row in table.rows():
        text = _text(row[config.text], config.text, table.name)
        for start, end in _whole(text, config, skipped) if config.whole else cut(text, config, skipped):
            key = int(stable_hash(normalise(text[start:end])), 16)
            split = _split(row, text[start:end], config)
            if key in seen:
                skipped["passage seen before"] += 1
            elif key / 2**64 >= config.share:
                skipped["passage not drawn (share)"] += 1
            elif split not in config.splits:
                skipped[f"passage of split {split}"] += 1
            else:
                seen.add(key)
                yield Passage(text[start:end], start, end, split, row, _license(row, table))
                if len(seen) == config.count:
                    return


def own_columns(table: Table) -> str:
    """The columns of a table that are not those of a kind, for a message."""
    known = set(COLUMNS[Kind.COMPLETIONS]) - {"completion"}
    return ", ".join(name for name in table.columns if name not in known)


def _text(value: Any, column: str, name: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return message_text(value)
    raise DataError(f"{name}: the column {column!r} holds {value!r:.60}; text or messages were expected")


def _split(row: Row, text: str, config: PassageConfig) -> str:
    if row.get("split") in ("dev", "test"):
        return str(row["split"])
    return split_of(normalise(text), config.dev, config.test)


def _license(row: Row, table: Table) -> str | None:
    """A row's own licence, or its source's (a file's is its folder's)."""
    own = row.get("license")
    source = str(row.get("source"))
    return str(own) if own else table.licenses.get(source, table.licenses.get(source.split("/")[0]))


def _whole(text: str, config: PassageConfig, skipped: Counter[str]) -> Iterator[tuple[int, int]]:
    start, end = _trimmed(text, 0, len(text))
    size = len(words(text[start:end]))
    if start == end:
        skipped["empty"] += 1
    elif size < config.min_words:
        skipped["shorter than min_words"] += 1
    elif size > config.max_words:
        skipped["longer than max_words"] += 1
    else:
        yield start, end


def cut(text: str, config: PassageConfig, skipped: Counter[str]) -> Iterator[tuple[int, int]]:
    """Yields where the passages of a document begin and end; the same for the same text and settings."""
    rng = random.Random(stable_hash(text))
    pieces: list[tuple[int, int]] = []
    size, target = 0, rng.randint(config.min_words, config.max_words)

    def taken() -> Iterator[tuple[int, int]]:
        nonlocal size, target
        if size >= config.min_words:
            yield pieces[0][0], pieces[-1][1]
            target = rng.randint(config.min_words, config.max_words)
        elif pieces:
            skipped["shorter than min_words"] += 1
        pieces.clear()
        size = 0

    if not text.strip():
        skipped["empty"] += 1
    for start, end in _paragraphs(text, skipped):
        reason = no_prose(text[start:end], config.min_letters)
        if reason is not None:
            skipped[reason] += 1
            yield from taken()
            continue
        for piece in _pieces(text, start, end, config.max_words):
            length = len(words(text[slice(*piece)]))
            full = size + length > (config.max_words if size < config.min_words else target)
            if full:
                yield from taken()
            if length > config.max_words:
                skipped["longer than max_words, and no sentence ends"] += 1
                continue
            pieces.append(piece)
            size += length
    yield from taken()


# A distributor's lines around a public-domain text.
_BEGINS = re.compile(r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)
_ENDS = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$", re.MULTILINE
)
_FENCE = re.compile(r"\s{0,3}(?:```|~~~)")
_CHAPTER = r"(?:chapter|part|book|volume|section|appendix|canto|act|scene)\s+(?:\d+|[ivxlcdm]+|one|two|three|the)\b"
_TITLE_LINE = re.compile(
    rf"\s{{0,3}}(?:#{{1,6}}\s+\S.*|(?:{_CHAPTER})[^.!?]{{0,60}}\.?|第.{{1,5}}[章回节節卷部篇].{{0,30}})\s*",
    re.IGNORECASE,
)
_RULE = re.compile(r"\s*([=\-~^\"'*+#_.`])\1{2,}\s*")
_CONTENTS_LINE = re.compile(
    rf"\s*(?:.*(?:\.{{3,}}|…+|(?:\. ){{3,}}|\s{{3,}}|\t)\s*(?:\d+|[ivxlc]+)|(?:[-*+]|\d+[.)])\s*\[.+\]\(#.*\)"
    rf"|{_CHAPTER}.*|第.{{1,5}}[章回节節卷部篇].*|\d+(?:\.\d+)*\.?\s+\S.{{0,60}}?\s\d+)\s*",
    re.IGNORECASE,
)
_TITLE_WORDS = 12
"""A line alone of so many words at most, without a mark of its end, is a heading [our choice]."""
_SENTENCE_MARK = tuple(".!?…:;,。！？：；，、؟۔।»”\"’')]」』）—-")
_SENTENCE_END = re.compile(r"[.!?…؟۔।]+[\"'”’)\]»]*(?=\s)|[。！？…]+[\"”’」』）]*|\n[ \t\r]*(?=\n)")


def _paragraphs(text: str, skipped: Counter[str]) -> Iterator[tuple[int, int]]:
    """Where the paragraphs begin and end: parted by blank lines, but not within a fence; a title's line is its own."""
    begin, stop = 0, len(text)
    if found := _BEGINS.search(text):
        begin = found.end()
    if found := _ENDS.search(text, begin):
        stop = found.start()
    if begin > 0 or stop < len(text):
        skipped["a distributor's header and footer"] += 1
    start = place = begin
    fenced = False
    for line in text[begin:stop].splitlines(keepends=True):
        is_title = not fenced and _TITLE_LINE.fullmatch(line) is not None
        if _FENCE.match(line):
            fenced = not fenced
        elif (not line.strip() and not fenced) or is_title:
            if text[start:place].strip():
                yield _trimmed(text, start, place)
            start = place
            if is_title:
                yield _trimmed(text, place, place + len(line))
                start = place + len(line)
        place += len(line)
    if text[start:stop].strip():
        yield _trimmed(text, start, stop)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The same place without the blanks around it."""
    piece = text[start:end].rstrip()
    return start + len(piece) - len(piece.lstrip()), start + len(piece)


def no_prose(paragraph: str, min_letters: float = 0.6) -> str | None:
    """Why a paragraph is no prose; None where it is."""
    lines = [line for line in paragraph.splitlines() if line.strip()]
    contents = sum(_CONTENTS_LINE.fullmatch(line) is not None for line in lines)
    if len(lines) >= 3 and contents > len(lines) / 2:
        return "table of contents"
    titled = [line for line in lines if not _RULE.fullmatch(line)]
    if len(titled) == 1 and (len(lines) > 1 or _is_title(titled[0])):
        return "heading"
    signs = [sign for sign in paragraph if not sign.isspace() and sign not in _SENTENCE_MARK]
    letters = sum(unicodedata.category(sign)[0] in "LM" for sign in signs)
    if letters < min_letters * len(signs):
        return "few letters"
    return None


def _is_title(line: str) -> bool:
    if _TITLE_LINE.fullmatch(line):
        return True
    return 1 <= len(words(line)) <= _TITLE_WORDS and not line.rstrip().endswith(_SENTENCE_MARK)


def _pieces(text: str, start: int, end: int, max_words: int) -> Iterator[tuple[int, int]]:
    """The paragraph; or its sentences where it is longer than a passage may be."""
    if len(words(text[start:end])) <= max_words:
        yield start, end
        return
    for found in _SENTENCE_END.finditer(text, start, end):
        if text[start : found.end()].strip():
            yield _trimmed(text, start, found.end())
            start = found.end()
    if text[start:end].strip():
        yield _trimmed(text, start, end)
