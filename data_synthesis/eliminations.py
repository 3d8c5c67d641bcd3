"""What makes an evolved instruction fail, by rule; see `evolve`.

Evol-Instruct (arXiv:2304.12244, 3.2) eliminates an evolution that leaks words of its prompt, is an apology, or is only
punctuation; Tree-Instruct (arXiv:2308.05696) one that says NONE, leaks the procedure, grows too little or too much,
loses the format or the language, or answers the instruction. Each rule has a name, which is what is counted.

Differs from the papers: Evol-Instruct looks for apologies and punctuation in the response to the evolved instruction;
no response is there yet, so these rules read the instruction, and a verifier or judge reads responses later on. A copy,
and an answer by the signs of one, are rules of ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from align.core.text import ngrams, normalise, words
from reward.ifeval.language import detect

NONE = "says NONE"
EMPTY = "only punctuation, or nothing"
APOLOGY = "an apology"
LEAK = "words of the prompt"
COPY = "a copy"
SHORT, LONG = "grows too little", "grows too long"
LANGUAGE = "another language"
FORMAT = "format lost"
ANSWERED = "answers the instruction"

APOLOGY_WORDS = 80
"""An apology is shorter than this (Evol-Instruct)."""
LEAKED_RUN = 8
"""So many words in a row of the writer's prompt are a leak, wherever they come from [our choice]."""
BREADTH = (0.5, 2.0)
"""An instruction in breadth is of about the length of its model: between these shares of its words [our choice]."""
TELLING = 40
"""From so many letters on, a text in Latin script has a language that can be told [our choice]."""
SHARED = 0.3
"""Texts that share this much of the shorter one's words are in one language [our choice]."""

_NONE = re.compile(r"\W*(?:none|null|n/?a)\W*", re.IGNORECASE)
_SORRY = re.compile(
    r"\b(?:i'?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai|i can(?:no|')t (?:help|assist|rewrite|comply))"
    r"|抱歉|对不起|很遗憾|je suis désolé|lo siento|es tut mir leid|آسف|عذرا",
    re.IGNORECASE,
)
_LEAKS = re.compile(
    r"#\w[\w ]+#|=== \w+ ===|\b(?:given|rewritten|original|new|evolved|created|previous|earlier) "
    r"(?:prompt|instruction|version)s?\b|\bsemantic tree\b|\b(?:noun|verb|tree) nodes?\b|\bprompt rewriter\b"
    r"|\bhere(?:'s| is) (?:the|a|your) (?:new|rewritten|harder|revised)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"(?:^|[.?!]\s+)\W*(?:answer|solution|response|output|assistant|回答|答案|答|الإجابة)\s*[:：]"
    r"|^#### |\\boxed\{|^(?:sure|certainly|of course)[,.!]|\b(?:the|final) answer is\b|<<[^<>]*=[^<>]*>>"
    r"|^\W*\d+(?:\.\d+)? [-+*/×÷] \d+(?:\.\d+)? = \d",
    re.IGNORECASE | re.MULTILINE,
)
_FORMATS = {
    "a code block": re.compile(r"```"),
    "a table": re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE),
    "a list": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE),
    "a link": re.compile(r"https?://\S+"),
    "a formula": re.compile(r"\$[^$\n]+\$|\\\[|\\\("),
    "a gap to be filled": re.compile(r"_{3,}|\[[A-Z][A-Z _]+\]|\{\{\w+\}\}"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an instruction may grow, in words (one a character where a script has no spaces).

    Attributes:
        min_growth: words that it must gain in depth.
        max_words: most words of it in all.
    """

    min_growth: int
    max_words: int

    def full(self, original: str) -> bool:
        """Whether an instruction is so long already that it can't grow."""
        return len(words(original)) + self.min_growth > self.max_words


def elimination(
    original: str, evolved: str, limits: Limits, template: str = "", answer: str = "", breadth: bool = False
) -> str | None:
    """Why an evolved instruction fails; None where no rule speaks against it.

    Args:
        original: the instruction before.
        evolved: the instruction after.
        limits: how much it may grow.
        template: what the writer was asked with, for its words.
        answer: the answer of the original, where one is known.
        breadth: a new instruction, and not the same made harder.
    """
    if _NONE.fullmatch(evolved):
        return NONE
    if not words(evolved):
        return EMPTY
    if _new(_SORRY, original, evolved) and len(words(evolved)) < APOLOGY_WORDS:
        return APOLOGY
    if _new(_LEAKS, original, evolved) or _quotes(template, original, evolved):
        return LEAK
    if words(original) == words(evolved):
        return COPY
    if _new(_ANSWER, original, evolved) or _gives_away(answer, original, evolved):
        return ANSWERED
    return _by_length(original, evolved, limits, breadth) or _by_form(original, evolved, breadth)


def _by_length(original: str, evolved: str, limits: Limits, breadth: bool) -> str | None:
    before, after = len(words(original)), len(words(evolved))
    least, most = (BREADTH[0] * before, BREADTH[1] * before) if breadth else (before + limits.min_growth, after)
    if after < least:
        return SHORT
    return LONG if after > max(most, limits.min_growth) or after > limits.max_words else None


def _by_form(original: str, evolved: str, breadth: bool) -> str | None:
    if not same_language(original, evolved):
        return LANGUAGE
    lost = [name for name, form in _FORMATS.items() if form.search(original) and not form.search(evolved)]
    return f"{FORMAT}: {lost[0]}" if lost and not breadth else None


def _new(pattern: re.Pattern[str], original: str, evolved: str) -> bool:
    """Whether the evolved instruction has what the pattern finds, and the original had nothing of the kind."""
    return bool(pattern.search(evolved)) and not pattern.search(original)


def _quotes(template: str, original: str, evolved: str) -> bool:
    """Whether a run of the template's own words stands in the evolved instruction, but not in the original."""
    own = set(ngrams(words(template), LEAKED_RUN)) - set(ngrams(words(original), LEAKED_RUN))
    return any(run in own for run in ngrams(words(evolved), LEAKED_RUN))


def _gives_away(answer: str, original: str, evolved: str) -> bool:
    """Whether a known answer of some length stands in the evolved instruction."""
    said = normalise(answer)
    return len(words(said)) >= 4 and said in normalise(evolved) and said not in normalise(original)


def same_language(one: str, other: str) -> bool:
    """Whether two texts are in one language, as far as a program can tell: by script, and by words where enough stand.

    Texts without letters, and short ones of one script, count as of one language.
    """
    scripts = script(one), script(other)
    if None in scripts or scripts[0] != scripts[1]:
        return None in scripts
    if scripts[0] != "LATIN":
        return True  # one script is nearly one language; kana are told from Chinese above
    said, again = set(words(one)), set(words(other))
    if len(said & again) >= SHARED * min(len(said), len(again)):
        return True
    enough = min(sum(c.isalpha() for c in text) for text in (one, other)) >= TELLING
    # only where a second look agrees: a text about another language's words is still in its own
    return not enough or detect(one) == detect(other) or detect(_prose(one)) == detect(_prose(other))


def _prose(text: str) -> str:
    """The text without code, quotations and names: what tells its language."""
    text = re.sub(r"```.*?```|`[^`]*`|\"[^\"]*\"|“[^”]*”|«[^»]*»|「[^」]*」", " ", text, flags=re.DOTALL)
    return re.sub(r"(?<=[a-z,] )[A-Z]\w+", " ", text)


def script(text: str) -> str | None:
    """The writing system of most letters, by their Unicode names (LATIN, ARABIC, CJK, …); kana count as Japanese's."""
    counts = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * counts.total():
        return "KANA"
    return counts.most_common(1)[0][0] if counts else None
