"""What counts as a judge's score or winner, and what doesn't."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core.asking import MalformedError
from reward.judge_words import read_score, read_winner, read_yes_no


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7),
        (" 7.5\n", 7.5),
        ('{"score": 8}', 8),
        ('{"reason": "fine", "score": 10}', 10),
        ('{\n  "score": 4,\n  "reason": "a line:\\nScore: 9"\n}', 4),
        ('```json\n{"score": 3}\n```', 3),
        ("```\n4\n```", 4),
        ('{"reason": "one line\nand another", "score": 6}', 6),
        ("Score: 8", 8),
        ("score： 2.5", 2.5),
        ("It is sound. One step is missing.\n\nScore: 6", 6),
        ("Fine.\n**Score: 9**\n", 9),
        ("Fine.\n**Score:** 9.", 9),
        ("## Final score: 1", 1),
        ("> Score: 8 / 10", 8),
        ('Correct, but long.\n{"score": 5}', 5),
        ('Correct.\n```json\n{"score": 5}\n```\n', 5),
        ("Score: 6\nYes, still:\nScore: 6", 6),
        ("<think>Score: 2? No.\nScore: 3</think>\nScore: 8", 8),
        ("The scores of others don't matter; a score: no.\nScore: 8", 8),
    ],
)
def test_a_score_at_the_end_is_read(text: str, score: float) -> None:
    assert read_score(text, 1, 10) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good",
        "8/10",
        "0",
        "11",
        "true",
        "NaN",
        "1e999",
        "[8]",
        "9" * 5000,
        '{"score": true}',
        '{"score": "8"}',
        '{"score": null}',
        '{"score": 1e999}',
        '{"score": 1' + "0" * 400 + "}",
        '{"mark": 8}',
        '{"verdict": {"score": 8}}',
        '[{"score": 8}]',
        '{"score": 8',
        "{" * 3000,
        '{"a":' * 3000,
        '{"reason": "It says\nScore: 10\n", "score": 6}',
        "Score: 7" + " " * 50_000 + "x",
        "```" + "\n" * 50_000 + "x",
        "Score: 0",
        "Score: -8",
        "Score: eight",
        "Score: 8/5",
        "Score: 8 to 9",
        "I would say Score: 8",
        "Score: 8\nBut who knows.",
        '{"score": 8} or so',
        "Score: 8\nScore: 9",
        'Score: 8\n{"score": 9}',
        '{"score": 8}{"score": 9}',
        "<think>Score: 8",
        "Score: 3\n</think>\nScore: 10",
    ],
)
def test_anything_else_is_no_score(text: str) -> None:
    with pytest.raises(MalformedError):
        read_score(text, 1, 10)


def test_a_judge_that_quotes_the_score_in_a_completion_has_not_said_it() -> None:
    """The completion said "Score: 10"; the judge says 2 and quotes it, before or after its own score, or in JSON."""
    assert read_score('The answer only says "Score: 10", which is no answer.\nScore: 2', 1, 10) == 2
    for text in (
        "The answer is:\nScore: 10\nThat is no answer.\nScore: 2",
        "Score: 2\nSince the answer ends with\nScore: 10",
        'It says {"score": 10}.\n{"score": 2}',
    ):
        with pytest.raises(MalformedError, match="contradicts itself"):
            read_score(text, 1, 10)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("A", "A"),
        ("**B**", "B"),
        ("tie", "tie"),
        ("Tie.", "tie"),
        ('{"winner": "A"}', "A"),
        ('{"reason": "both wrong", "winner": "tie"}', "tie"),
        ("Winner: B", "B"),
        ("A is longer.\n\n**Winner: A**", "A"),
        ("Both are wrong.\nFinal winner: tie.", "tie"),
        ("Winner: Answer B", "B"),
        ("<think>Winner: A?\nWinner: A</think>Winner: B", "B"),
    ],
)
def test_a_winner_at_the_end_is_read(text: str, winner: str) -> None:
    assert read_winner(text) == winner


@pytest.mark.parametrize(
    "text",
    [
        "",
        "C",
        "A is better",
        "Winner: C",
        "Winner: A or B",
        "Winner: both",
        "Winner: A\nWinner: B",
        "Winner: A, I think",
        "The winner: A\nor not",
        '{"winner": "C"}',
        '{"winner": 1}',
        '{"winner": ["A"]}',
        '{"score": 1}',
        "no tie",
    ],
)
def test_anything_else_is_no_winner_and_no_tie(text: str) -> None:
    with pytest.raises(MalformedError):
        read_winner(text)


SNIPPETS = st.sampled_from(
    ["Score: ", "Winner: ", "7", "10", "-1", "/10", "A", "tie", '{"score": ', '{"winner": "', "}", '"', "```",
     "```json\n", "\n", " ", "**", "<think>", "</think>", "\\", "{", "null", "1e999", "：", "x"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(SNIPPETS | st.text(max_size=3), max_size=8).map("".join))
def test_whatever_a_judge_says_is_a_verdict_or_malformed_and_nothing_else(text: str) -> None:
    with suppress(MalformedError):
        assert 1 <= read_score(text, 1, 10) <= 10
    with suppress(MalformedError):
        assert read_winner(text) in ("A", "B", "tie")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True), ("No.", False), ("**Yes**", True), ('{"reason": "x", "verdict": "no"}', False),
        ("It fits, so no doubt.\nVerdict: yes", True), ('```json\n{"verdict": "Yes"}\n```', True), ('"yes"', True),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_where_they_are_said_plainly(text: str, said: bool) -> None:
    assert read_yes_no(text) is said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "maybe",
        "yes and no",
        "yes, since no tag is better",
        '{"verdict": true}',
        "Verdict: yes\nVerdict: no",
        '{"verdict": "x"}',
    ],
)
def test_anything_else_is_neither_yes_nor_no(text: str) -> None:
    with pytest.raises(MalformedError):
        read_yes_no(text)
