"""Two completions, two orders: who wins, what a preference for a place does, and how agreement is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from align.core.asking import Answer
from reward.judge import TEMPLATES
from reward.judge_pairs import PairTally, Winner, compare, most, pair_questions
from reward.judge_words import Side


def votes(*sides: Side | None) -> list[Answer[Side]]:
    return [Answer(side, str(side), 1, "" if side else "no winner") for side in sides]


@pytest.mark.parametrize(
    ("first", "second", "winner", "reward"),
    [
        ("A", "B", "completion", 1.0),
        ("B", "A", "other", 0.0),
        ("tie", "tie", "tie", 0.5),
        ("A", "A", "tie", 0.5),
        ("B", "B", "tie", 0.5),
        ("A", "tie", "tie", 0.5),
        ("tie", "A", "tie", 0.5),
    ],
)
def test_only_what_both_orders_say_decides(first: Side, second: Side, winner: Winner, reward: float) -> None:
    """The completion is A in the first order and B in the second."""
    found = compare([votes(first), votes(second)], 3)
    assert (found.winner, found.verdict.reward) == (winner, reward)
    assert found.verdict.verdict == ("passed" if winner == "completion" else "failed")


def test_what_was_decided_is_said_for_a_person() -> None:
    assert compare([votes("A"), votes("B")], 3).verdict.detail == "judge: the completion wins, in both orders"
    assert compare([votes("tie"), votes("tie")], 3).verdict.detail == "judge: a tie, in both orders"
    assert compare([votes("A"), votes("A")], 3).verdict.detail == (
        "judge: a tie, since the orders disagree: the completion wins, then the other wins"
    )


@pytest.mark.parametrize(
    ("sides", "said"),
    [("AAB", "A"), ("ABB", "B"), ("AB", "tie"), ("AABBt", "tie"), ("Attt", "tie"), ("AAtt", "tie"), ("AAAtt", "A")],
)
def test_most_votes_decide_and_as_many_of_two_things_are_a_tie(sides: str, said: Side) -> None:
    names: dict[str, Side] = {"A": "A", "B": "B", "t": "tie"}
    assert most([names[side] for side in sides]) == said


def test_an_order_that_cannot_be_read_is_an_error_and_never_a_tie() -> None:
    found = compare([votes("A"), votes(None)], 3)
    assert found.winner is None and found.verdict.verdict == "error" and found.verdict.reward is None
    assert found.verdict.detail == "with the other first, the judge gave no winner in 3 attempts: no winner"
    assert compare([votes("A", None, None), votes("B", "B", "B")], 3).verdict.detail == (
        "with the completion first, only 1 of 3 votes of the judge could be read in 3 attempts each, 2 are needed: "
        "no winner"
    )
    enough = compare([votes("A", None, "A"), votes("B", "B", None)], 3)
    assert enough.winner == "completion" and enough.figures()["unreadable"] == 2


def test_each_completion_is_shown_first_once_and_the_two_are_told_apart_by_marks_of_their_own() -> None:
    template = (TEMPLATES / "judge_pair.txt").read_text(encoding="utf-8")
    first, second = pair_questions(
        template, {"instruction": "Add.", "reference": "5"}, "It is five.", [{"role": "assistant", "content": "Six."}],
        False, {"rubric": "Right?"},
    )  # fmt: skip
    texts = [str(question.prompt[0]["content"]) for question in (first, second)]  # type: ignore[index]
    assert [text.index("It is five.") < text.index("Six.") for text in texts] == [True, False]
    assert all("{m" not in text and "{r" not in text and "Right?" in text and "Add." in text for text in texts)
    assert [question.parse("Winner: B") for question in (first, second)] == ["B", "B"]


def tally(rows: Sequence[tuple[str, str, Winner | None]]) -> PairTally:
    """Rows: the votes of the first order, of the second, the label."""
    names: dict[str, Side | None] = {"A": "A", "B": "B", "t": "tie", "?": None}
    found = PairTally()
    for first, second, label in rows:
        found.count(compare([votes(*(names[s] for s in order)) for order in (first, second)], 3), label)
    return found


def test_a_judge_that_always_takes_the_first_wins_nothing_and_is_seen() -> None:
    summary = tally([("A", "A", "completion")] * 6 + [("A", "A", "other")] * 4).summary()
    assert summary["first_position_share"] == 1 and summary["inconsistent_share"] == 1
    assert (summary["wins"], summary["losses"], summary["ties"]) == (0, 0, 10)
    labels = summary["labels"]
    assert (labels["n"], labels["right"], labels["tied"], labels["accuracy"], labels["low"]) == (10, 0, 10, 0, 0)
    assert labels["high"] == pytest.approx(27.75, abs=0.01)  # z²/(n + z²) = 3.8415/13.8415
    assert labels["kappa"] == 0
    assert tally([("A", "A", "other"), ("A", "B", "other")]).summary()["labels"]["kappa"] is None


def test_agreement_is_counted_over_rows_that_could_be_judged() -> None:
    """Winners by both orders: completion, completion, other, tie (disagreeing), error. Verdicts that are no tie: A B,
    A B, B A, A A: 5 of 8 for the first place. Orders: 3 of 4 agree; by chance (3/4·2/4 + 1/4·2/4) = 1/2; kappa 1/2.
    Labels: 2 of 4 right. By chance: completion 2/4·1/4 + other 1/4·3/4 + tie 0 = 5/16; kappa (8/16 − 5/16)/(11/16).
    """
    rows: list[tuple[str, str, Winner | None]] = [
        ("A", "B", "completion"), ("A", "B", "other"), ("B", "A", "other"), ("A", "A", "other"), ("?", "B", "other"),
    ]  # fmt: skip
    summary = tally(rows).summary()
    assert summary == {
        "wins": 2, "losses": 1, "ties": 1, "first_position_share": 0.625, "inconsistent": 1, "inconsistent_share": 0.25,
        "order_kappa": 0.5,
        "labels": {"n": 4, "right": 2, "tied": 1, "accuracy": 50.0, "low": pytest.approx(15.0, abs=0.01),
                   "high": pytest.approx(85.0, abs=0.01), "kappa": pytest.approx(3 / 11, abs=1e-4)},
    }  # fmt: skip


def test_two_votes_of_an_order_are_compared_where_there_are_several() -> None:
    """First two votes of each order: A A, B B, A B, B B. 3 of 4 agree; by chance 1/2·1/4 + 1/2·3/4 = 1/2; kappa 1/2."""
    assert tally([("AAA", "BBB", None), ("ABA", "BBB", None)]).summary()["vote_kappa"] == 0.5
    assert "vote_kappa" not in tally([("A", "B", None)]).summary()
    assert "labels" not in tally([("A", "B", None)]).summary()


def test_a_label_that_is_a_tie_is_met_by_a_tie_alone() -> None:
    labels = tally([("A", "A", "tie"), ("A", "B", "tie")]).summary()["labels"]
    assert (labels["n"], labels["right"]) == (2, 1)


def test_nothing_compared_has_no_shares() -> None:
    summary = tally([("?", "?", None)]).summary()
    assert summary["first_position_share"] is None and summary["order_kappa"] is None
