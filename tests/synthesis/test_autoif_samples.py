"""The sample that AutoIF's authors released, through the middle steps: what we keep of it, against what they kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.scripted import ScriptedEngine
from align.core.records import Row
from align.core.sandbox import Sandbox
from data_synthesis.constraint_answers import read_sentence
from data_synthesis.constraints import STAGE as CONSTRAINTS
from data_synthesis.follow import FollowConfig, judged
from data_synthesis.pair import STAGE as PAIR
from data_synthesis.sampling import ErrorBudget
from reward.constraint_library import outcomes
from reward.verifiers import Verifiers

from .conftest import Bench, a_completion

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder"),
]


def sample(name: str) -> list[Row]:
    file = Path(os.environ["ALIGN_TEST_DATA"], "autoif_samples", f"{name}.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(cpu_s=5) as started:
        yield started


@pytest.mark.parametrize(
    ("preset", "both", "kept"),
    [
        ("paper", False, {"Respond with a series": 8, "Use only words from a": 4, "Write your answer as ": 8,
                          "Use words that can be": 7, "Answer with words tha": 7}),
        ("paper", True, {"Use only words from a": 4, "Write your answer as ": 8, "Use words that can be": 7,
                         "Answer with words tha": 7}),
        ("code", False, {"Respond with a series": 2, "Use only words from a": 3, "Use words that can be": 3,
                         "Answer with words tha": 3}),
    ],
)  # fmt: skip
def test_the_functions_that_gpt_4_wrote_are_read_and_cross_validated(
    bench: Bench, preset: str, both: bool, kept: dict[str, int]
) -> None:
    """Eight answers to each of five constraints. 39 of the 40 can be read (the other has an invalid escape in its JSON;
    two spell Python's True, which we read and a plain JSON reader doesn't), and all 39 functions compile. 38 differ.

    Under the paper's numbers all cases that are left of the first constraint are false: a function that says false to
    all would do. The code's bar of 0.8 loses every function of the third, whose cases contradict one another; of more
    than three functions the three best are taken.
    """
    rows = sample("eval_func_rft")

    def writer(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        return next((str(r["gpt-answer"][index]) for r in rows if r["instruction"] in text), "A sentence.")

    engines = {"writer": ScriptedEngine(writer), "judge": ScriptedEngine(["neutral"])}
    settings = {
        "seeds": [r["instruction"] for r in rows], "new": 0, "attempts": 1, "preset": preset, "both_outcomes": both,
    }  # fmt: skip
    found = bench.run(CONSTRAINTS, settings, engines)
    assert {row["constraint"][:21]: len(row["functions"]) for row in found} == kept
    functions = bench.summary["functions"]
    assert (functions["asked for"], functions["could not be read"], functions["written"]) == (40, 1, 38)


def test_functions_and_cases_that_they_kept_get_the_very_accuracies_that_their_file_has(sandbox: Sandbox) -> None:
    """Their file has a function's accuracy beside it: 22 functions, 0.9 twice and else 1. Of one constraint ("words
    that end with '-ing'") every case that they kept is false, also that of "Running jumping laughing"."""
    one_sided = []
    for row in sample("back_trans"):
        texts, expected = zip(*row["cases"], strict=True)
        for function, theirs in row["eval_func"]:
            said = sandbox.run(lambda slot, f=function, t=texts: outcomes(slot, f, t))
            assert sum(a is b for a, b in zip(said, expected, strict=True)) / len(expected) == pytest.approx(theirs)
        one_sided += [row["instruction"]] * (len(set(expected)) < 2)
        assert all(read_sentence(back) == back for back in row["back_instruction"])
    assert one_sided == ["Use words that end with '-ing'"]


def test_of_their_sampled_responses_no_function_accepts_any() -> None:
    """16 responses to each of 20 queries, under two constraints; and 8 to each of 21 under one, whose function raises
    on all of them, since they hold more than numbers: that is no error but a response that fails."""
    with Verifiers({"cpu_s": 5.0}) as verifiers:
        for name, count in (("query_rft", 320), ("dpo_query_w_funcs", 168)):
            rows = [
                ("follow", text, {"functions": [function for function, _ in row["eval_func"]], "threshold": 0.0}, "")
                for row in sample(name)
                for text in row["gpt-answer"]
            ]
            verdicts = list(verifiers.verify_many(rows))
            assert [verdict.verdict for verdict in verdicts] == ["failed"] * count
    assert verdicts[0].detail.endswith("1 raised ValueError")


@pytest.mark.parametrize(("preset", "kept"), [("code", 16), ("paper", 19)])
def test_every_score_of_their_judge_is_read_and_the_code_s_bar_keeps_their_sixteen(preset: str, kept: int) -> None:
    """Of 20 scores three are 8: the paper keeps them, the code, whose bar is above 8, doesn't. One is 5."""
    rows = sample("query_rft_score")
    groups = [
        [{**a_completion(n, 0, row["response"], True), "query": row["query"], "constraint": row["instruction"],
          "lost": None, "score": None}]
        for n, row in enumerate(rows)
    ]  # fmt: skip
    said = {row["response"]: row["gen"][0] for row in rows}
    judge = ScriptedEngine(lambda prompt, index: next(v for k, v in said.items() if k in prompt[0]["content"]))  # type: ignore[index]
    config = FollowConfig.model_validate({"preset": preset})
    found = [row for (row,) in judged(groups, config, "{instruction} {completion}", judge, 0, ErrorBudget("x", 0.0))]
    left = [n for n, row in enumerate(found) if row["lost"] is None]
    assert len(left) == kept
    if preset == "code":
        assert [rows[n]["beam_unique_id"] for n in left] == [r["beam_unique_id"] for r in sample("query_score_filter")]


def test_pairs_of_their_scored_responses_come_of_the_three_queries_that_have_both_sides(bench: Bench) -> None:
    """20 queries, 8 responses each, some the same text. Three queries have responses of rate 1 and of rate 0."""
    completions = [
        a_completion(n, index, text, rate > 0.5) | {"reward": rate}
        for n, row in enumerate(sample("dpo_query_eval_score_results"))
        for index, (text, rate) in enumerate(row["response"])
    ]
    rows = bench.run(PAIR, {"strategy": "all", "max_pairs": 4, "max_rejected": 0.0}, completions=completions)
    assert len({row["prompt_id"] for row in rows}) == 3
    assert all((row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0) for row in rows)
