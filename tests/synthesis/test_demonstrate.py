from typing import Any

import pytest

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.demonstrate import STAGE

from .conftest import Bench, a_completion, a_prompt

GOLD = [{"role": "assistant", "content": "gold"}]


def texts(rows: list[Row]) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def test_only_passed_kept_finished_training_completions_are_learned_from(bench: Bench) -> None:
    rows = bench.run(
        STAGE,
        {},
        completions=[
            a_completion(1, 0, "good", True, kept=True),
            a_completion(1, 1, "same path", True, kept=False),
            a_completion(1, 2, "bad", False, kept=False),
            a_completion(1, 3, "unknown", None, kept=False),
            a_completion(1, 4, "cut", True, kept=True, finish_reason="length"),
            a_completion(1, 5, " good ", True, kept=True),
            a_completion(2, 0, "held out", True, kept=True, split="dev"),
        ],
    )
    assert texts(rows) == ["good"]
    assert set(COLUMNS[Kind.DEMONSTRATIONS]) <= set(rows[0])
    assert (rows[0]["family"], rows[0]["generator"], rows[0]["sample_index"]) == ("exact", "policy", 0)
    assert bench.summary == {
        "prompts": 2,
        "demonstrations": 1,
        "by_family": {"exact": 1},
        "yield": {"prompts": 2, "rows": 7, "demonstrations": 1},
        "lost": {"not kept": 1, "not passed": 1, "error": 1, "truncated": 1, "same text": 1, "split dev": 1},
    }


def test_unfiltered_self_training_takes_wrong_ones_too_but_never_errors(bench: Bench) -> None:
    rows = bench.run(
        STAGE,
        {"only_passed": False},
        completions=[a_completion(1, 0, "good", True), a_completion(1, 1, "bad", False), a_completion(1, 2, "?", None)],
    )
    assert texts(rows) == ["good", "bad"]


def test_a_least_reward_alone_decides_where_no_verifier_spoke(bench: Bench) -> None:
    ranked = [a_completion(1, i, f"text {i}", None, verdict=None, reward=r) for i, r in enumerate((0.4, 0.5, 0.9))]
    rows = bench.run(STAGE, {"only_passed": False, "min_reward": 0.5}, completions=ranked)
    assert texts(rows) == ["text 1", "text 2"]


@pytest.mark.parametrize(("best_of", "expected"), [(True, ["b", "c"]), (False, ["a", "b"])])
def test_per_prompt_takes_the_first_or_the_best(bench: Bench, best_of: bool, expected: list[str]) -> None:
    completions = [
        a_completion(1, i, t, True, reward=r) for i, (t, r) in enumerate((("a", 0.1), ("b", 0.9), ("c", 0.5)))
    ]
    assert texts(bench.run(STAGE, {"per_prompt": 2, "best_of": best_of}, completions=completions)) == expected
    assert bench.summary["lost"] == {"prompt full": 1}


def test_gold_answers_are_added_before_the_samples_and_not_counted_in_per_prompt(bench: Bench) -> None:
    completions: list[dict[str, Any]] = [
        a_completion(1, 0, "mine", True, answer=GOLD), a_completion(1, 1, "more", True, answer=GOLD),
        a_completion(2, 0, "wrong", False, answer=GOLD), a_completion(3, 0, "gold", True, answer=GOLD),
    ]  # fmt: skip
    rows = bench.run(STAGE, {"answers": "add", "per_prompt": 1}, completions=completions)
    assert [(row["prompt_id"], text) for row, text in zip(rows, texts(rows), strict=True)] == [
        ("p1", "gold"), ("p1", "mine"), ("p2", "gold"), ("p3", "gold"),
    ]  # fmt: skip
    assert rows[0]["generator"] == "answer" and rows[0]["sample_index"] is None and rows[0]["reward"] is None


def test_prompts_with_gold_answers_become_demonstrations_without_any_sampling(bench: Bench) -> None:
    prompts = bench.table([a_prompt(1, answer=GOLD), a_prompt(2, answer=None), a_prompt(3, answer=GOLD)], Kind.PROMPTS)
    rows = bench.run(STAGE, {"answers": "only"}, completions=prompts)
    assert [row["prompt_id"] for row in rows] == ["p1", "p3"]


def test_a_family_has_its_most_demonstrations(bench: Bench) -> None:
    completions = [a_completion(i, 0, "yes", True, family="ab"[i > 3]) for i in range(1, 6)]
    rows = bench.run(STAGE, {"max_per_family": 2}, completions=completions)
    assert [row["prompt_id"] for row in rows] == ["p1", "p2", "p4", "p5"]
    assert bench.summary["by_family"] == {"a": 2, "b": 2}


def test_prompts_without_completions_are_refused_with_the_way_out(bench: Bench) -> None:
    prompts = bench.table([a_prompt(1)], Kind.PROMPTS)
    with pytest.raises(DataError, match="answers=only"):
        bench.run(STAGE, {}, completions=prompts)


def test_nothing_to_learn_from_is_an_error_that_says_why(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows.*not passed: 1"):
        bench.run(STAGE, {}, completions=[a_completion(1, 0, "bad", False)])
