"""Counting the sentences of a text with the rules of Punkt (Kiss and Strunk 2006), and no trained data to download.

IFEval counts sentences with the English Punkt model. The rules are here whole; of what that model learnt from newspaper
text, only the part that matters in practice: abbreviations, and which capitalised words begin a sentence.

Differs from the paper: the trained model's list of 20,000 words with the cases they were seen in is replaced by a short
list, which is consulted only after an abbreviation, an initial or an ellipsis. On the responses we hold, every count
needed for a verdict agrees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ABBREVIATIONS = _words(
    """
    mr mrs ms dr prof st jr sr messrs gen col maj lt adm sen rep inc ltd co corp bros vs ft ave jan feb aug sept
    sep oct nov dec tues wed fri a.m p.m a.d ph.d m.b.a u.s u.s.a u.k u.n d.c l.a n.y n.j n.h n.c n.d n.m s.c
    r.i w.va calif fla pa ga va wash ill ariz ore tenn ky conn mich minn wis okla kan nev colo ala vt j.p s.a
    n.v a.g j.b d.w l.p ok c d e f g h k l m n p r s t v w
    """
)
"""Words whose period need not end a sentence. Not "e.g", "i.e" or "etc": the reference breaks there."""

STARTERS = _words(
    """
    the but if so while when this these there it he they i in under since among however moreover thus meanwhile
    yet even some many most both instead which whom here him her them us your without within into onto between
    through were being does done yes always therefore hence furthermore finally tomorrow yesterday still either
    neither such same try remember please note consider think okay thanks thank sorry overall
    """
)
"""Words that begin a sentence when they are capitalised after an abbreviation or an ellipsis."""

EITHER = _words(
    """
    a an and or then because as where why how what who whose that those its his she their we our you me my on at
    by for from to of with over after before until during about against is are was be been am do did have has
    had having can could will would should may might must not no never also first second third next last later
    now today once again just only every each all any much more few several one two three another other let make
    use get go take give keep start see look come well hey oh sure alright interesting
    """
)
"""Words that newspapers capitalise inside a sentence too (titles, names), so that a capital proves nothing."""

AFTER_A_NUMBER = _words(
    """
    international commodities insider credit corrections financing business leisure dividend review who letters
    """
)
"""Headings of the newspaper that gave the model its data: "3. Review" is read as one thing, not as two sentences."""

NON_WORD = r"[)\";}\]*:@'({\[?!]"
_CANDIDATE = re.compile(rf"[.?!](?={NON_WORD}|\Z)")
_DASHES_OR_DOTS = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_TOKEN = re.compile(
    rf"{_DASHES_OR_DOTS}"
    rf"|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|\Z|{NON_WORD}|{_DASHES_OR_DOTS}|,(?=\Z|\s|{NON_WORD}|{_DASHES_OR_DOTS}))"
    r"|\S"
)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*\.?")
_CLOSING = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|\Z)")
_LONGEST_TOKEN = 200


def count_sentences(text: str) -> int:
    """How many sentences `text` has; 0 for a text of white space."""
    spans = list(_spans(text))
    count, skipped = 0, 0
    for i, (start, end) in enumerate(spans):
        start += skipped
        skipped = 0
        if i + 1 < len(spans):  # closing quotes and brackets after a break belong to the sentence before it
            closing = _CLOSING.match(text[slice(*spans[i + 1])])
            skipped = closing.end() if closing else 0
            if closing:
                end = max(end, spans[i + 1][0] + 1)
        count += start < end
    return count


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Sentences before closing quotes are moved, as (start, end) in `text`."""
    runs = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
    last = 0
    for i, (start, end) in enumerate(runs):
        marks = list(_CANDIDATE.finditer(text, start, end))
        if marks and marks[-1].end() == end and i + 1 == len(runs):
            marks.pop()  # nothing follows the last mark of the text
        if not marks:
            continue
        stop = marks[-1].end()
        inside = stop < end
        after = text[stop] if inside else " " + text[runs[i + 1][0] : runs[i + 1][1]][:_LONGEST_TOKEN]
        opens_line = start == 0 or text[start - 1] == "\n"
        if _has_break(text[max(start, stop - _LONGEST_TOKEN) : stop] + after, opens_line):
            yield last, stop
            last = stop if inside else runs[i + 1][0]
    yield last, len(text.rstrip())


class _Token(NamedTuple):
    text: str
    breaks: bool
    abbreviation: bool

    @property
    def type(self) -> str:
        """The token in lower case, any number as one type, without the period of a sentence's end."""
        lowered = _NUMBER.sub("##number##", self.text.lower())
        return lowered[:-1] if self.breaks and len(lowered) > 1 and lowered.endswith(".") else lowered


def _has_break(context: str, opens_line: bool) -> bool:
    """Whether a sentence ends within the words around a candidate mark."""
    tokens = [_first_look(t) for t in _TOKEN.findall(context)]
    return any(_second_look(a, b, opens_line) for a, b in pairwise(tokens))


def _first_look(text: str) -> _Token:
    """Marks the token by itself: an abbreviation's period does not end a sentence, any other does."""
    if text in (".", "?", "!"):
        return _Token(text, True, False)
    if text.endswith(".") and not text.endswith(".."):
        word = text[:-1].lower()
        abbreviation = word in ABBREVIATIONS or word.rsplit("-", 1)[-1] in ABBREVIATIONS
        return _Token(text, not abbreviation, abbreviation)
    return _Token(text, False, False)


def _second_look(token: _Token, following: _Token, opens_line: bool) -> bool:
    """Whether a sentence ends at `token`, now that the word after it is known."""
    if not token.text.endswith("."):
        return token.breaks
    if "##number##" in token.type and following.type in AFTER_A_NUMBER:
        return False
    initial = re.fullmatch(r"[^\W\d]\.", token.text) is not None
    ellipsis = re.match(r"\.\.+\Z", token.text) is not None
    capital = following.text[0].isupper()
    starts = _starts_sentence(following, ellipsis)
    if (token.abbreviation or ellipsis) and not initial:
        return starts is True or (capital and following.type in STARTERS) or token.breaks
    if initial or "##number##" in token.type:
        if starts is False:
            return False
        if initial and capital and not opens_line and following.type not in STARTERS | EITHER:
            return False  # "J. Smith", but not the heading "I. Introduction"
    return token.breaks


def _starts_sentence(token: _Token, after_ellipsis: bool) -> bool | None:
    """Whether the case of a word says that it begins a sentence; None when it says nothing."""
    if token.text in ";:,.!?" or token.text[0].islower():
        return False
    if not token.text[0].isupper():
        return None
    if token.type in STARTERS:
        return True
    return True if after_ellipsis and token.type.isalpha() and token.type not in EITHER else None
