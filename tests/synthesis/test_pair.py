import pytest

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind
from align.core.store import Table
from data_synthesis.pair import STAGE

from .conftest import Bench, a_completion, a_prompt


def test_a_prompts_best_and_worst_become_a_preference_with_the_way_back(bench: Bench) -> None:
    rows = bench.run(
        STAGE,
        {},
        completions=[
            a_completion(1, 0, "wrong", False, generator="old"),
            a_completion(1, 1, "right", True),
            a_completion(1, 2, "broken", None),
        ],
    )
    (row,) = rows
    assert set(COLUMNS[Kind.PREFERENCES]) <= set(row)
    assert row["chosen"] == [{"role": "assistant", "content": "right"}]
    assert row["rejected"] == [{"role": "assistant", "content": "wrong"}]
    assert (row["prompt_id"], row["split"], row["margin"]) == ("p1", "train", 1.0)
    assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0)
    assert (row["generator"], row["rejected_generator"]) == ("policy", "old")
    assert (row["chosen_index"], row["rejected_index"]) == (1, 0)


def test_the_summary_says_what_became_of_every_prompt(bench: Bench) -> None:
    """Of six prompts: one pair, one all right (a tie), one all wrong, one of one text, one truncated, one held out."""
    completions = [
        a_completion(1, 0, "yes", True), a_completion(1, 1, "no", False),
        a_completion(2, 0, "yes", True), a_completion(2, 1, "YES", True),
        a_completion(3, 0, "no", False), a_completion(3, 1, "NO", False),
        a_completion(4, 0, "yes", True), a_completion(4, 1, "yes", True),
        a_completion(5, 0, "yes", True, finish_reason="length"), a_completion(5, 1, "no", False),
        a_completion(6, 0, "yes", True, split="test"), a_completion(6, 1, "no", False, split="test"),
    ]  # fmt: skip
    assert len(bench.run(STAGE, {}, completions=completions)) == 1
    assert bench.summary == {
        "prompts": 6,
        "pairs": 1,
        "by_family": {"exact": 1},
        "outcome": {
            "paired": 1, "tie": 1, "none_chosen": 2, "dropped_identical": 1, "too_few": 1, "split_test": 1
        },
        "mean_margin": 1.0,
        "yield": {"prompts": 6, "prompts with a pair": 1, "pairs": 1},
        "lost": {
            "prompt without a completion that may be chosen": 2, "prompt whose completions are equally good": 1,
            "completion with the text of another": 1, "prompt with fewer than two usable completions": 1,
            "prompt of the split test": 1,
        },
    }  # fmt: skip


def test_a_right_path_that_its_stage_did_not_keep_is_not_chosen(bench: Bench) -> None:
    completions = [
        a_completion(1, 0, "right by a false equation", True, kept=False),
        a_completion(1, 1, "right", True, kept=True),
        a_completion(1, 2, "wrong", False, kept=False),
    ]
    for seed in range(8):
        (row,) = bench.run(STAGE, {}, seed=seed, completions=completions)
        assert (row["chosen_index"], row["rejected_index"]) == (1, 2)


def test_a_gold_answer_wins_where_nothing_else_may_and_only_there(bench: Bench) -> None:
    gold = [{"role": "assistant", "content": "gold"}]
    completions = [
        a_completion(1, 0, "no", False, answer=gold), a_completion(1, 1, "never", False, answer=gold),
        a_completion(2, 0, "yes", True, answer=gold), a_completion(2, 1, "no", False, answer=gold),
    ]  # fmt: skip
    first, second = bench.run(STAGE, {"answers": True, "strategy": "all", "max_pairs": 1}, completions=completions)
    assert first["chosen"] == gold and first["generator"] == "answer" and first["chosen_index"] is None
    assert second["chosen"] == [{"role": "assistant", "content": "yes"}]


def test_completions_of_one_prompt_from_several_steps_meet(bench: Bench) -> None:
    """Two steps sampled the same two prompts: only together has each prompt a right and a wrong completion."""
    small = bench.table([a_completion(1, 0, "no", False), a_completion(2, 0, "yes", True)], Kind.COMPLETIONS)
    large = bench.table([a_completion(1, 0, "yes", True), a_completion(2, 0, "no", False)], Kind.COMPLETIONS)
    both = Table([*small.files, *large.files], "both", "f")
    rows = bench.run(STAGE, {}, completions=both)
    assert [row["prompt_id"] for row in rows] == ["p1", "p2"]


def test_human_rankings_enter_as_rewards_without_verdicts(bench: Bench) -> None:
    completions = [a_completion(1, i, f"text {i}", None, verdict=None, reward=r) for i, r in enumerate((2.0, 3.0, 1.0))]
    (row,) = bench.run(STAGE, {}, completions=completions)
    assert (row["chosen_index"], row["rejected_index"], row["margin"]) == (1, 2, 2.0)


def test_no_pair_at_all_is_an_error_that_says_why(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"no pair came of the 1 prompts.*tie: 1.*higher temperature"):
        bench.run(STAGE, {}, completions=[a_completion(1, 0, "yes", True), a_completion(1, 1, "YES", True)])


def test_gold_answers_asked_for_but_not_there_are_an_error(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"needs a column `answer`"):
        bench.run(STAGE, {"answers": True}, completions=[a_completion(1, 0, "yes", True)])


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="margin_min"):
        STAGE.config(margin_min=0.1)  # type: ignore[call-arg]


def test_a_prompt_row_helper_matches_the_contract() -> None:
    assert set(COLUMNS[Kind.PROMPTS]) == set(a_prompt(1))


def test_a_penalty_for_a_missing_end_makes_the_cut_off_one_of_equal_completions_the_rejected_one(bench: Bench) -> None:
    """Graded 0.5, 0.5 and 0.5 without verdicts: a tie but for the penalty of 1, which is the margin."""
    texts = {"short": "stop", "shorter": "stop", "and so on and": "length"}
    completions = [
        a_completion(1, index, text, True, finish_reason=reason) | {"verdict": None, "reward": 0.5}
        for index, (text, reason) in enumerate(texts.items())
    ]
    (row,) = bench.run(STAGE, {"missing_end_penalty": 1.0}, completions=completions)
    assert (row["rejected_index"], row["margin"], row["rejected_reward"]) == (2, 1.0, 0.5)
    with pytest.raises(DataError, match="tie: 1"):
        bench.run(STAGE, {}, completions=completions)
