"""The 25 instructions of IFEval (arXiv:2311.07911), one function each, and the table that names them.

A check takes a text and its instruction's arguments, and gives None where the text follows the instruction, otherwise
what was found instead. The semantics are the reference checkers', quirks included (`**bold**` and `*italic*` both
highlight; "P.S" without a second period is no "P.S."; a language that can't be told is right), because a score is only
comparable if it is the same score. Every check is linear in the length of the text: a completion can't hang it.

Differs from the paper: keywords, section and postscript markers are literal; the reference takes them as regular
expressions, which is the same for every prompt of the benchmark. A `letter` may be any character; the first version of
the reference drew a random letter in place of the "#" and "!" that two of its prompts ask for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from reward.ifeval.language import LANGUAGES, detect
from reward.ifeval.sentences import count_sentences
from reward.ifeval.words import count_capital_words, count_words

ArgumentKind = Literal["count", "place", "relation", "text", "texts", "letter", "language"]


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of instruction.

    Attributes:
        found: None where the text follows the instruction, otherwise what was found instead.
        arguments: the arguments it must be given, and what each must be.
    """

    found: Callable[..., str | None]
    arguments: Mapping[str, ArgumentKind] = field(default_factory=dict)


def argument_problem(kind: ArgumentKind, value: Any) -> str | None:
    """What is wrong with an argument's value, or None."""
    if kind in ("count", "place"):
        least = 0 if kind == "count" else 1
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
        return None if whole and value >= least else f"expected a whole number of at least {least}, found {value!r}"
    if kind == "relation":
        return None if value in ("at least", "less than") else f"expected 'at least' or 'less than', found {value!r}"
    if kind == "texts":
        words = isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v.strip() for v in value)
        return None if words else f"expected a list of one or more texts, found {value!r}"
    if not isinstance(value, str) or not value.strip():
        return f"expected a text, found {value!r}"
    if kind == "letter" and len(value) != 1:
        return f"expected one character, found {value!r}"
    if kind == "language" and value not in LANGUAGES:
        return f"expected one of the language codes {', '.join(sorted(LANGUAGES))}, found {value!r}"
    return None


def _compare(actual: int, relation: str, wanted: int, what: str) -> str | None:
    holds = actual < wanted if relation == "less than" else actual >= wanted
    return None if holds else f"{actual} {what}, expected {relation} {wanted}"


def _when(holds: bool, otherwise: str) -> str | None:
    return None if holds else otherwise


def _existence(text: str, keywords: list[str]) -> str | None:
    missing = [k for k in sorted(keywords) if not re.search(re.escape(k), text, re.IGNORECASE)]
    return _when(not missing, f"without {', '.join(map(repr, missing))}")


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> str | None:
    actual = len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))
    return _compare(actual, relation, frequency, f"times {keyword.strip()!r}")


def _forbidden_words(text: str, forbidden_words: list[str]) -> str | None:
    for word in sorted(set(forbidden_words)):
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE):
            return f"the word {word!r}"
    return None


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> str | None:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency, f"times {letter!r}")


def _response_language(text: str, language: str) -> str | None:
    actual = detect(text)
    return _when(actual in (language, None), f"language {actual!r}, expected {language!r}")


def _number_sentences(text: str, num_sentences: int, relation: str) -> str | None:
    return _compare(count_sentences(text), relation, num_sentences, "sentences")


def _number_words(text: str, num_words: int, relation: str) -> str | None:
    return _compare(count_words(text), relation, num_words, "words")


def _number_paragraphs(text: str, num_paragraphs: int) -> str | None:
    """Paragraphs stand between ***; the outermost may be empty and then don't count, an empty one inside fails."""
    paragraphs = [p.strip() for p in text.split("***")]
    if "" in paragraphs[1:-1]:
        return "an empty paragraph between two ***"
    actual = len(paragraphs) - (not paragraphs[0]) - (len(paragraphs) > 1 and not paragraphs[-1])
    return _when(actual == num_paragraphs, f"{actual} paragraphs, expected {num_paragraphs}")


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> str | None:
    """Paragraphs stand between blank lines; empty ones don't count, but they do hold a place in the numbering."""
    paragraphs = [p.strip() for p in text.split("\n\n")]
    actual = sum(bool(p) for p in paragraphs)
    if actual != num_paragraphs:
        return f"{actual} paragraphs, expected {num_paragraphs}"
    if nth_paragraph > actual or not paragraphs[nth_paragraph - 1]:
        return f"no paragraph {nth_paragraph}"
    opening = paragraphs[nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", opening, maxsplit=1)[0].lower()
    return _when(word == first_word.lower(), f"paragraph {nth_paragraph} begins with {word!r}, expected {first_word!r}")


def _number_placeholders(text: str, num_placeholders: int) -> str | None:
    actual = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            actual += 1
            start = line.find("[", end)
    return _compare(actual, "at least", num_placeholders, "placeholders in square brackets")


def _postscript(text: str, postscript_marker: str) -> str | None:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(marker, re.escape(marker.lower()))
    return _when(re.search(pattern, text.lower()) is not None, f"no {marker!r}")


def _number_bullet_lists(text: str, num_bullets: int) -> str | None:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    actual = len(stars) + len(dashes)
    return _when(actual == num_bullets, f"{actual} bullets, expected exactly {num_bullets}")


def _constrained_response(text: str) -> str | None:
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return _when(any(option in text for option in options), f"none of {', '.join(options)}")


def _number_highlighted_sections(text: str, num_highlights: int) -> str | None:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    actual = sum(bool(section.strip()) for section in single + double)
    return _compare(actual, "at least", num_highlights, "highlighted sections")


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> str | None:
    actual = len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text))
    return _compare(
        actual, "at least", num_sections, f"sections that begin with {section_spliter.strip()!r} and a number"
    )


def _json_format(text: str) -> str | None:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return "no valid JSON"
    return None


def _title(text: str) -> str | None:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return None
    return "no title in <<double angular brackets>>"


def _two_responses(text: str) -> str | None:
    parts = [p.strip() for p in text.split("******")]
    if "" in parts[1:-1]:
        return "an empty response between two ******"
    responses = [p for p in parts if p]
    if len(responses) != 2:
        return f"{len(responses)} responses separated by ******, expected 2"
    return _when(responses[0] != responses[1], "twice the same response")


def _repeat_prompt(text: str, prompt_to_repeat: str) -> str | None:
    repeats = text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return _when(repeats, "a beginning other than the repeated prompt")


def _end_checker(text: str, end_phrase: str) -> str | None:
    ends = text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    return _when(ends, f"an end other than {end_phrase.strip()!r}")


def _quotation(text: str) -> str | None:
    text = text.strip()
    return _when(len(text) > 1 and text[0] == text[-1] == '"', "no double quotation marks around it")


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> str | None:
    return _compare(count_capital_words(text), capital_relation, capital_frequency, "words in capitals")


def _english_capital(text: str) -> str | None:
    if not text.isupper():
        return "letters that are not capitals"
    return _response_language(text, "en")


def _english_lowercase(text: str) -> str | None:
    if not text.islower():
        return "letters that are not lower case"
    return _response_language(text, "en")


def _no_comma(text: str) -> str | None:
    return _when("," not in text, f"{text.count(',')} commas")


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(_existence, {"keywords": "texts"}),
    "keywords:frequency": Check(_frequency, {"keyword": "text", "frequency": "count", "relation": "relation"}),
    "keywords:forbidden_words": Check(_forbidden_words, {"forbidden_words": "texts"}),
    "keywords:letter_frequency": Check(
        _letter_frequency, {"letter": "letter", "let_frequency": "count", "let_relation": "relation"}
    ),
    "language:response_language": Check(_response_language, {"language": "language"}),
    "length_constraints:number_sentences": Check(_number_sentences, {"num_sentences": "count", "relation": "relation"}),
    "length_constraints:number_paragraphs": Check(_number_paragraphs, {"num_paragraphs": "count"}),
    "length_constraints:number_words": Check(_number_words, {"num_words": "count", "relation": "relation"}),
    "length_constraints:nth_paragraph_first_word": Check(
        _nth_paragraph_first_word, {"num_paragraphs": "count", "nth_paragraph": "place", "first_word": "text"}
    ),
    "detectable_content:number_placeholders": Check(_number_placeholders, {"num_placeholders": "count"}),
    "detectable_content:postscript": Check(_postscript, {"postscript_marker": "text"}),
    "detectable_format:number_bullet_lists": Check(_number_bullet_lists, {"num_bullets": "count"}),
    "detectable_format:constrained_response": Check(_constrained_response),
    "detectable_format:number_highlighted_sections": Check(_number_highlighted_sections, {"num_highlights": "count"}),
    "detectable_format:multiple_sections": Check(
        _multiple_sections, {"section_spliter": "text", "num_sections": "count"}
    ),
    "detectable_format:json_format": Check(_json_format),
    "detectable_format:title": Check(_title),
    "combination:two_responses": Check(_two_responses),
    "combination:repeat_prompt": Check(_repeat_prompt, {"prompt_to_repeat": "text"}),
    "startend:end_checker": Check(_end_checker, {"end_phrase": "text"}),
    "startend:quotation": Check(_quotation),
    "change_case:capital_word_frequency": Check(
        _capital_word_frequency, {"capital_frequency": "count", "capital_relation": "relation"}
    ),
    "change_case:english_capital": Check(_english_capital),
    "change_case:english_lowercase": Check(_english_lowercase),
    "punctuation:no_comma": Check(_no_comma),
}
"""IFEval's instruction ids. An id that is not here is an error, never a pass."""
