"""Completions of constrained prompts: sampled, checked, judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.follow import STAGE, FollowConfig
from data_synthesis.pair import STAGE as PAIR
from reward.verifiers import Verifiers

from .conftest import Bench, a_completion, a_prompt
from .kills import assert_survives_kills

UPPER = "def evaluate(s): return s.isupper()"
SHORT = "def evaluate(s): return len(s) < 9"


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers({"cpu_s": 5.0}) as started:
        yield started


@pytest.fixture(autouse=True)
def one_sandbox(verifiers: Verifiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share one: starting it takes longer than all that runs in it."""
    monkeypatch.setattr("data_synthesis.follow.Verifiers", lambda *settings: nullcontext(verifiers))


def constrained(number: int, query: str = "Name a colour.", before: Any = (), **more: Any) -> Row:
    reference = json.dumps({"functions": [UPPER, SHORT], "constraint": "Shout.", "threshold": 0.5})
    prompt = [*before, {"role": "user", "content": f"{query} Shout."}]
    return a_prompt(
        number, prompt=prompt, task="follow", family="follow", reference=reference, query=query, constraint="Shout.",
        constraint_id="c1", parent_id="q1", **more,
    )  # fmt: skip


def a_judge(scores: dict[str, str], asked: list[str] | None = None) -> ScriptedEngine:
    def answer(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        if asked is not None:
            asked.append(text)
        return next(score for completion, score in scores.items() if f"\n{completion}\n" in text)

    return ScriptedEngine(answer)


def test_what_passes_the_functions_and_the_judge_is_kept_and_all_is_accounted_for(bench: Bench) -> None:
    """RED passes both functions and gets 8, BLUE 7, GREEN no score; red meets one of two, which is not above 0.5; the
    long one meets none; one fails to be sampled, one is cut off. 7 sampled = 1 kept + 6 lost.
    """
    answers = [
        "RED", "BLUE", "GREEN", "red", "it is a long one",
        Completion("", (), "error", error="down"), Completion("PINK", (1,), "length"),
    ]  # fmt: skip
    asked: list[str] = []
    judge = a_judge({"RED": "Score: 8", "BLUE": "Score: 7", "GREEN": "fine"}, asked)
    rows = bench.run(
        STAGE, {"samples": 7, "max_error_share": 0.5}, {"sampler": ScriptedEngine(answers), "judge": judge},
        prompts=[constrained(1)],
    )  # fmt: skip
    assert set(COLUMNS[Kind.COMPLETIONS]) <= set(rows[0])
    assert [row["verdict"] for row in rows] == ["passed"] * 3 + ["failed"] * 2 + ["error", "passed"]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 1.0, 0.5, 0.0, None, 1.0]
    assert [row["score"] for row in rows] == [8.0, 7.0, None, None, None, None, None]
    assert [row["kept"] for row in rows] == [True] + [False] * 6
    assert bench.summary["yield"] == {"prompts": 1, "sampled": 7, "passed": 4, "scored": 2, "kept": 1}
    assert bench.summary["lost"] == {
        "wrong": 2, "right, but the judge's score is too low": 1, "right, but the judge's score could not be read": 1,
        "not sampled": 1, "right, but cut off at max_tokens": 1,
    }  # fmt: skip
    assert len(asked) == 1 + 1 + 3 and all("Name a colour.\n" in text and "colour. Shout" not in text for text in asked)
    assert json.loads(rows[0]["judgement"]) == ["Score: 8"]


def test_paper_and_code_set_another_bar_for_the_score(bench: Bench) -> None:
    """8 is enough for the paper, which drops what is below; the code keeps what is above."""
    engines = {"sampler": ScriptedEngine(["RED", "BLUE"]), "judge": a_judge({"RED": "8", "BLUE": "9"})}
    for preset, kept in (("paper", [True, True]), ("code", [False, True])):
        rows = bench.run(STAGE, {"preset": preset, "samples": 2}, engines, prompts=[constrained(1)])
        assert [row["kept"] for row in rows] == kept
    assert FollowConfig.model_validate({"preset": "code", "judge_above": False}).judge_above is False
    assert FollowConfig().samples == 8


def test_several_samplers_answer_every_prompt_and_say_who_it_was(bench: Bench) -> None:
    engines = {
        "sampler": ScriptedEngine(["RED", "red"], generator="small"),
        "sampler-2": ScriptedEngine(["BLUE", "SKY"], generator="large"),
    }
    rows = bench.run(STAGE, {"samples": 2}, engines, prompts=[constrained(1), constrained(2)])
    assert [(row["prompt_id"], row["sample_index"], row["generator"]) for row in rows] == [
        (prompt, index, "small" if index < 2 else "large") for prompt in ("p1", "p2") for index in range(4)
    ]
    assert [row["kept"] for row in rows] == [True, False, True, True] * 2
    assert bench.summary["yield"] == {"prompts": 2, "sampled": 8, "passed": 6, "kept": 6}


def test_the_judge_sees_all_turns_and_the_query_without_the_constraint(bench: Bench) -> None:
    before = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"},
    ]  # fmt: skip
    asked: list[str] = []
    sampler_saw = []

    def sampler(prompt: Any, index: int) -> str:
        sampler_saw.append(prompt)
        return "RED"

    engines = {"sampler": ScriptedEngine(sampler), "judge": a_judge({"RED": "9"}, asked)}
    (row,) = bench.run(STAGE, {"samples": 1}, engines, prompts=[constrained(1, "说一种颜色。", before)])
    assert sampler_saw == [row["prompt"]] and row["prompt"][:3] == before
    assert all(text in asked[0] for text in ("Be kind.", "你好！", "说一种颜色。\n", "Shout."))


def test_other_tasks_and_splits_are_passed_by(bench: Bench) -> None:
    prompts = [constrained(1, split="test"), {**constrained(2), "task": "exact"}, constrained(3)]
    rows = bench.run(STAGE, {"samples": 1}, {"sampler": ScriptedEngine(["RED"])}, prompts=prompts)
    assert [row["prompt_id"] for row in rows] == ["p3"]
    assert bench.summary["skipped"] == {"split test": 1, "task exact": 1}
    with pytest.raises(DataError, match="no prompt to sample"):
        bench.run(STAGE, {}, {"sampler": ScriptedEngine(["RED"])}, prompts=prompts[:2])


def test_a_judge_that_can_t_be_read_stops_the_stage(bench: Bench) -> None:
    engines = {"sampler": ScriptedEngine(["RED"]), "judge": ScriptedEngine(["well"])}
    with pytest.raises(EngineError, match=r"follow \(judge\): 1 of 1"):
        bench.run(STAGE, {"samples": 1}, engines, prompts=[constrained(1)])


def test_pairs_of_autoif_reject_only_what_no_function_accepts(bench: Bench) -> None:
    """Rewards 1 (kept), 1 (not kept), 0.5, 0 and 0: the one kept is chosen, twice, over the two of reward 0."""
    rewards = [(1.0, True), (1.0, False), (0.5, False), (0.0, False), (0.0, False)]
    completions = [
        a_completion(1, index, f"text {index}", reward > 0.5, kept=kept) | {"reward": reward}
        for index, (reward, kept) in enumerate(rewards)
    ]
    settings = {"strategy": "all", "max_pairs": 4, "max_rejected": 0.0}
    rows = bench.run(PAIR, settings, completions=completions)
    assert [(row["chosen_index"], row["rejected_index"]) for row in rows] == [(0, 3), (0, 4)]
    rows = bench.run(PAIR, {"max_rejected": 0.0}, completions=completions)
    assert rows[0]["rejected_index"] in (3, 4)
    with pytest.raises(DataError, match="none_rejected: 1"):
        bench.run(PAIR, {"max_rejected": 0.0}, completions=completions[:3])


def test_a_killed_run_goes_on_without_sampling_anything_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a fork of this process can't use its sandbox

    def answer(prompt: Prompt, index: int) -> str:
        return ["RED", "red", "BLUE"][index % 3]

    rows = assert_survives_kills(
        tmp_path, "follow", {"samples": 3}, {"prompts": [constrained(n, f"Name {n}.") for n in range(3)]},
        {"sampler": answer, "sampler-2": answer, "judge": lambda prompt, index: "9"},
    )  # fmt: skip
    assert len(rows) == 18 and sum(row["kept"] for row in rows) == 12
