"""Sentences and words as IFEval counts them. The expected counts are those of nltk 3.9.1 and its English model."""

import pytest

from reward.ifeval.sentences import count_sentences
from reward.ifeval.words import count_capital_words, count_words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n ", 0),
        ("No mark at all", 1),
        ("One. Two? Three!", 3),
        ("One.\n\nTwo.", 2),
        ("One.Two.", 1),
        ("What?! No.", 2),
        ("Dr. Smith met Mr. Jones at 5 p.m. in Washington D.C. on Monday.", 1),
        ("It costs 3.50 dollars. Really.", 2),
        ('He said "stop." Then he left.', 2),
        ('"Stop."', 1),
        ("(It works.) Fine.", 2),
        ("**Bold.** Next.", 2),
        ("1. First\n2. Second\n3. third", 3),
        ("3. Review the text. 4. Edit it.", 3),
        ("Wait... However, it rains.", 2),
        ("Wait... what is it?", 1),
        ("I met J. Smith.", 1),
        ("I. Introduction", 2),
        ("Use tools, e.g. hammers.", 2),
        ("Apples etc. are fruit.", 2),
        ("The U.S. However big. The U.K. economy.", 3),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("I am", 1),
        ("I'm", 1),
        ("I'M", 2),
        ("DON'T", 2),
        ("DON'T.", 2),
        ("CANNOT", 2),
        ("GIMME", 2),
        ("WELL-KNOWN", 1),
        ("COVID-19 A/B", 2),
        ("U.S. NATO.", 2),
        ("**BOLD** #TAG", 2),
        ("TIME: 5PM", 2),
        ("A,B;C", 3),
        ("YES--NO", 2),
        ("SHI'A", 2),
        ("“HELLO”", 1),
        ("Ok IBMer eBay 42 !", 0),
    ],
)
def test_words_in_capitals(text: str, count: int) -> None:
    assert count_capital_words(text) == count


def test_words_are_runs_of_letters_digits_and_underscores() -> None:
    assert count_words("It's well-known: snake_case, 3.5 über!") == 8
