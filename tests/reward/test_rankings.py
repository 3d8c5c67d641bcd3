"""Rankings, scores and agreement, with values derived by hand."""

from __future__ import annotations

import pytest

from reward.rankings import Agreement, circular_triads, ranking_of, ranks_of, win_rates


def test_scores_make_a_ranking_with_ties_and_gaps() -> None:
    assert ranking_of([3.0, 1.0, 3.0, None]) == {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.0}


def test_a_win_rate_is_the_share_of_comparisons_won() -> None:
    """0 beats 1 and ties 2: 1.5 of 2. 1 loses both. 2: a tie and a win. 3 was never compared."""
    assert win_rates(4, [{(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.0}]) == [0.75, 0.0, 0.75, None]
    assert win_rates(2, [{(0, 1): 1.0}, {(0, 1): 0.0}, {(0, 1): 1.0}]) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_equal_scores_share_a_rank_and_the_next_one_counts_them() -> None:
    assert ranks_of([0.5, 1.0, None, 0.5, 0.1]) == [2, 1, None, 2, 4]


@pytest.mark.parametrize(
    ("ranking", "found"),
    [
        ({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0}, (1, 1)),
        ({(0, 1): 0.0, (1, 2): 0.0, (0, 2): 1.0}, (1, 1)),
        ({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 1.0}, (0, 1)),
        ({(0, 1): 1.0, (1, 2): 0.0, (0, 2): 0.0}, (0, 1)),
        ({(0, 1): 1.0, (1, 2): 0.5, (0, 2): 0.0}, (0, 0)),
        ({(0, 1): 1.0, (1, 2): 1.0}, (0, 0)),
    ],
)
def test_a_triad_is_circular_where_each_beats_the_next(
    ranking: dict[tuple[int, int], float], found: tuple[int, int]
) -> None:
    assert circular_triads(3, ranking) == found


def test_kappa_does_not_depend_on_which_completion_stands_first() -> None:
    """4 pairs: 3 alike, one the other way. Both ways round: agreed 3/4, chance 1/2, kappa 1/2, wherever they stand."""
    for flips in range(16):
        one = {(0, n + 1): float(flips >> n & 1) for n in range(4)}
        other = {**one, (0, 1): 1 - one[0, 1]}
        agreement = Agreement({"x": "person", "y": "person"})
        agreement.count({"x": one, "y": other})
        (found,) = agreement.summary().values()
        assert found == {
            "between": [{"rankers": ["x", "y"], "n": 4, "agreed": 0.75, "kappa": 0.5}], "n": 4, "kappa": 0.5,
        }  # fmt: skip


def test_of_three_rankers_the_mean_over_their_pairs_is_told_by_what_they_are() -> None:
    """x and y say the same (1), z the opposite of both (-1): people among themselves 1, each with the judge -1."""
    same, opposite = {(0, 1): 1.0, (0, 2): 0.0}, {(0, 1): 0.0, (0, 2): 1.0}
    agreement = Agreement({"x": "person", "z": "judge", "y": "person"})
    agreement.count({"x": same, "y": same, "z": opposite})
    agreement.count({"x": same})
    found = agreement.summary()
    assert (found["person and person"]["kappa"], found["judge and person"]["kappa"]) == (1.0, -1.0)
    assert (found["person and person"]["n"], found["judge and person"]["n"]) == (2, 4)


def test_where_all_is_a_tie_there_is_nothing_to_agree_on() -> None:
    agreement = Agreement({"x": "judge", "y": "judge"})
    agreement.count({"x": {(0, 1): 0.5}, "y": {(0, 1): 0.5}})
    assert agreement.summary()["judge and judge"]["kappa"] is None
