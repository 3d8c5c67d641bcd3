from typing import Any

from reward.pairs import Pair, Scored, Strategy, fates, make_pairs


def passed(text: str, reward: float = 1.0, **more: Any) -> Scored:
    return Scored(text, reward, "passed", **more)


def failed(text: str, reward: float = 0.0, **more: Any) -> Scored:
    return Scored(text, reward, "failed", **more)


def test_max_min_pairs_the_best_with_the_worst() -> None:
    """Rewards 0.2, 0.9, -0.5, 0.4: the best is at 1, the worst at 2, the margin 0.9 − (−0.5) = 1.4."""
    scored = [Scored("a", 0.2), Scored("b", 0.9), Scored("c", -0.5), Scored("d", 0.4)]
    pairs, counts = make_pairs(scored)
    assert pairs == [Pair(1, 2, 1.4)]
    assert counts == {"paired": 1}


def test_equal_rewards_are_a_tie_and_give_no_pair() -> None:
    strategies: tuple[Strategy, ...] = ("max_min", "random")
    for strategy in strategies:
        pairs, counts = make_pairs([Scored("a", 0.5), Scored("b", 0.5), Scored("c", 0.5)], strategy)
        assert pairs == []
        assert counts == {"tie": 1}


def test_a_margin_below_the_least_one_gives_no_pair_and_the_least_one_itself_does() -> None:
    scored = [Scored("a", 0.75), Scored("b", 0.5)]
    assert make_pairs(scored, min_margin=0.25)[0] == [Pair(0, 1, 0.25)]
    pairs, counts = make_pairs(scored, min_margin=0.26)
    assert pairs == [] and counts == {"below_margin": 1}


def test_errors_are_never_paired() -> None:
    scored = [passed("a"), Scored("b", None, "error"), Scored("c", -9.0, "error"), Scored("d", float("nan"))]
    pairs, counts = make_pairs(scored)
    assert pairs == [] and counts == {"dropped_error": 3, "too_few": 1}
    pairs, counts = make_pairs([*scored, failed("e")])
    assert pairs == [Pair(0, 4, 1.0)] and counts == {"dropped_error": 3, "paired": 1}


def test_equal_texts_are_never_a_pair_whatever_their_rewards() -> None:
    pairs, counts = make_pairs([Scored("same", 0.9), Scored(" same\n", 0.1)])
    assert pairs == [] and counts == {"dropped_identical": 1, "too_few": 1}


def test_a_truncated_completion_is_never_chosen_but_may_be_rejected() -> None:
    pairs, _ = make_pairs([Scored("a", 0.9, truncated=True), Scored("b", 0.5), Scored("c", 0.1, truncated=True)])
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 2)]
    pairs, counts = make_pairs([Scored("a", 0.9, truncated=True), Scored("b", 0.5, truncated=True)])
    assert pairs == [] and counts == {"none_chosen": 1}


def test_a_failed_completion_is_chosen_only_when_that_is_asked_for() -> None:
    """Graded rewards: two failed programs with 0.75 and 0.25 of the tests; without a passed one there is no pair."""
    scored = [failed("a", 0.75), failed("b", 0.25)]
    assert make_pairs(scored)[1] == {"none_chosen": 1}
    assert make_pairs(scored, chosen_passes=False)[0] == [Pair(0, 1, 0.5)]


def test_a_completion_marked_as_not_choosable_can_still_be_rejected() -> None:
    scored = [passed("a", 1.0, choosable=False), passed("b", 2.0)]
    assert make_pairs(scored)[0] == [Pair(1, 0, 1.0)]


def test_of_equally_bad_completions_one_that_runs_is_rejected() -> None:
    scored = [failed("a", runs=False), failed("b", runs=False), passed("c"), failed("d")]
    for seed in range(20):
        assert make_pairs(scored, seed=seed)[0] == [Pair(2, 3, 1.0)]


def test_all_walks_winners_and_losers_side_by_side_and_cycles_the_shorter_list() -> None:
    """Winners 0, 2; losers 1, 3, 4: (0,1), (2,3), then the winners start again: (0,4)."""
    scored = [passed("a"), failed("b"), passed("c"), failed("d"), failed("e")]
    pairs, counts = make_pairs(scored, "all")
    assert [(p.chosen, p.rejected) for p in pairs] == [(0, 1), (2, 3), (0, 4)]
    assert counts == {"paired": 1}
    assert len(make_pairs(scored, "all", max_pairs=2)[0]) == 2


def test_all_takes_losers_that_run_first() -> None:
    scored = [passed("a"), failed("b", runs=False), failed("c")]
    assert [(p.chosen, p.rejected) for p in make_pairs(scored, "all", max_pairs=1)[0]] == [(0, 2)]


def test_all_drops_a_prompt_with_an_empty_side() -> None:
    assert make_pairs([passed("a"), passed("b")], "all")[1] == {"one_sided": 1}
    assert make_pairs([failed("a"), failed("b")], "all")[1] == {"one_sided": 1}
    assert make_pairs([passed("a", truncated=True), failed("b")], "all")[1] == {"one_sided": 1}


def test_random_draws_among_all_pairs_with_a_margin_and_never_the_wrong_way_round() -> None:
    """Rewards 3, 2, 1: the allowed pairs are (0,1), (0,2), (1,2); many seeds draw each of them, and no other."""
    scored = [Scored("a", 3.0), Scored("b", 2.0), Scored("c", 1.0)]
    drawn = {(p.chosen, p.rejected) for seed in range(60) for p in make_pairs(scored, "random", seed=seed)[0]}
    assert drawn == {(0, 1), (0, 2), (1, 2)}


def test_the_seed_decides_between_equal_rewards_and_the_same_seed_decides_the_same() -> None:
    scored = [passed("a"), passed("b"), failed("c"), failed("d")]
    first = [make_pairs(scored, seed=seed)[0] for seed in range(40)]
    assert first == [make_pairs(scored, seed=seed)[0] for seed in range(40)]
    assert {(p.chosen, p.rejected) for pairs in first for p in pairs} == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_one_completion_or_none_gives_no_pair() -> None:
    assert make_pairs([])[1] == {"too_few": 1}
    assert make_pairs([passed("a")])[1] == {"too_few": 1}


def test_max_random_sets_the_best_against_any_that_it_beats_by_enough() -> None:
    """Rewards 3, 2.9, 1, 0 and a least margin of 0.5: the best is always 0, and 1 is too near to it."""
    scored = [Scored("a", 3.0), Scored("b", 2.9), Scored("c", 1.0), Scored("d", 0.0)]
    drawn = [make_pairs(scored, "max_random", min_margin=0.5, seed=seed)[0] for seed in range(40)]
    assert {(p.chosen, p.rejected) for pairs in drawn for p in pairs} == {(0, 2), (0, 3)}
    assert drawn == [make_pairs(scored, "max_random", min_margin=0.5, seed=seed)[0] for seed in range(40)]
    assert make_pairs(scored[:2], "max_random", min_margin=0.5)[1] == {"below_margin": 1}


def test_all_without_verdicts_gives_any_two_with_a_margin_the_greatest_first() -> None:
    """Rewards 4, 3, 1: margins 3 (0,2), 2 (1,2), 1 (0,1). One that was cut off loses to others and never wins."""
    scored = [Scored("a", 4.0), Scored("b", 3.0), Scored("c", 1.0)]
    pairs, counts = make_pairs(scored, "all")
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [(0, 2, 3.0), (1, 2, 2.0), (0, 1, 1.0)]
    assert counts == {"paired": 1}
    assert len(make_pairs(scored, "all", max_pairs=2)[0]) == 2
    assert [p.margin for p in make_pairs(scored, "all", min_margin=2.0)[0]] == [3.0, 2.0]
    cut_off = [Scored("a", 4.0, truncated=True), *scored[1:]]
    assert [(p.chosen, p.rejected) for p in make_pairs(cut_off, "all")[0]] == [(1, 2)]


def test_a_penalty_decides_among_completions_of_one_verdict() -> None:
    """All right, penalties 0.5, 0.1, 0.3: the least penalised is chosen, the most penalised rejected, margin 0.4."""
    scored = [passed("a", penalty=0.5), passed("b", penalty=0.1), passed("c", penalty=0.3)]
    assert make_pairs(scored)[0] == [Pair(1, 0, 0.4)]
    # Of rewards alone: 2 - 1.5 = 0.5 is worse than 1 by 0.5.
    assert make_pairs([Scored("long", 2.0, penalty=1.5), Scored("short", 1.0)])[0] == [Pair(1, 0, 0.5)]


def test_a_penalty_never_turns_a_verdict_around() -> None:
    """Right ones penalised by 5 and 3, a wrong one by nothing: 1 is chosen, and beats the wrong one by 1 as ever."""
    scored = [passed("a", penalty=5.0), passed("b", penalty=3.0), failed("c"), failed("d", penalty=2.0)]
    assert make_pairs(scored)[0] == [Pair(1, 3, 1.0)]
    assert [(p.chosen, p.rejected) for p in make_pairs(scored, "all", max_pairs=1)[0]] == [(1, 3)]


def test_a_failed_completion_of_higher_reward_gives_no_pair() -> None:
    """Verdict and reward are at odds, as they may be where several parts make one reward."""
    pairs, counts = make_pairs([passed("a", -0.5), failed("b", 0.25)])
    assert pairs == [] and counts == {"at_odds": 1}


def test_every_completion_has_a_fate() -> None:
    scored = [
        Scored("best", 3.0), Scored(" best", 3.0), Scored("worst", 0.0), Scored("lost", None),
        Scored("cut", 1.0, truncated=True), Scored("middle", 2.0),
    ]  # fmt: skip
    pairs, _ = make_pairs(scored)
    assert fates(scored, pairs) == ["chosen", "identical", "rejected", "error", "truncated", "unpaired"]
    pairs, _ = make_pairs(scored, "all")
    assert fates(scored, pairs)[4:] == ["rejected", "chosen_and_rejected"]
