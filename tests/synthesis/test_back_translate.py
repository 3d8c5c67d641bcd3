from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Row
from data_synthesis.back_translate import STAGE
from data_synthesis.demonstrate import STAGE as DEMONSTRATE
from data_synthesis.reverse import STAGE as REVERSE
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.kills import assert_survives_kills

TEXTS = ("Boil the rice for ten minutes.", "把水烧开，再放入面条煮三分钟。", "Log in | Home | About us")
ASKED = {TEXTS[0]: "How do I cook rice?", TEXTS[1]: "面条怎么煮？", TEXTS[2]: "What is this?"}
ALL = {"min_words": 3, "whole": True, "text": "answer", "dev": 0.0, "test": 0.0}


def texts(*found: str, **more: Any) -> list[Row]:
    return [
        a_prompt(n, **{"answer": [{"role": "assistant", "content": text}], "source_row": n, **more})
        for n, text in enumerate(found)
    ]


def asked(prompt: Prompt, index: int) -> str:
    return next(question for text, question in ASKED.items() if text in str(prompt[-1]["content"]))  # type: ignore[index]


def rates(**scores: Any) -> ScriptedEngine:
    """A judge that finds a pair by a word of its instruction; of a list of scores by sample index."""

    def rate(prompt: Prompt, index: int) -> str:
        found = next(score for word, score in scores.items() if word in str(prompt[-1]["content"]))  # type: ignore[index]
        score = found[index] if isinstance(found, list) else found
        return json.dumps({"reason": "so", "score": score}) if score else "no idea"

    return ScriptedEngine(rate)


SCORED = {
    "sample_index": 0, "completion": [{"role": "assistant", "content": "x"}], "reward": 1.0, "verdict": "passed",
    "detail": "", "generator": "x",
}  # fmt: skip
BACKWARD = ScriptedEngine(asked, generator="backward")


def test_a_text_gets_its_instruction_and_only_pairs_of_at_least_four_and_a_half_are_kept(bench: Bench) -> None:
    judge = rates(rice=5, 面条=4, this=1)
    rows = bench.run(STAGE, ALL, {"backward": BACKWARD, "judge": judge}, passages=texts(*TEXTS))
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": ASKED[text]}] for text in TEXTS]
    assert [row["completion"][0]["content"] for row in rows] == list(TEXTS)
    assert [(row["score"], row["reward"], row["verdict"], row["kept"]) for row in rows] == [
        (5.0, 1.0, "passed", True), (4.0, 0.75, "failed", False), (1.0, 0.0, "failed", False),
    ]  # fmt: skip
    assert rows[0]["written_by"] == "backward" and rows[0]["generator"] == "passage"
    assert bench.summary["yield"] == {"asked": 3, "written": 3, "kept": 1}
    assert bench.summary["lost"] == {"the judge finds it no good answer": 2}
    assert bench.summary["pairs_by_score"] == {1.0: 1, 4.0: 1, 5.0: 1}
    (demonstration,) = bench.run(DEMONSTRATE, {}, completions=rows)
    assert demonstration["completion"] == rows[0]["completion"]


def test_a_second_round_rates_the_same_pairs_again_with_a_newer_judge_and_no_backward_model(bench: Bench) -> None:
    """Round one keeps the rice alone, and can't read its third judgement; round two keeps the noodles too."""
    settings = {**ALL, "judge_attempts": 1, "max_error_share": 0.5}
    first = bench.run(
        STAGE, settings, {"backward": BACKWARD, "judge": rates(rice=5, 面条=3, this=None)}, passages=texts(*TEXTS)
    )
    assert [(row["verdict"], row["scores"]) for row in first] == [
        ("passed", [5.0]), ("failed", [3.0]), ("error", [None]),
    ]  # fmt: skip
    second = bench.run(STAGE, {}, {"judge": rates(rice=5, 面条=5, this=2)}, candidates=first)
    assert [(row["kept"], row["score"], row["scores"]) for row in second] == [
        (True, 5.0, [5.0, 5.0]), (True, 5.0, [3.0, 5.0]), (False, 2.0, [None, 2.0]),
    ]  # fmt: skip
    assert [row["prompt_id"] for row in second] == [row["prompt_id"] for row in first]
    assert bench.summary["yield"] == {"asked": 3, "written": 3, "kept": 2}


def test_several_ratings_are_averaged_and_a_system_prompt_marks_the_made_pairs(bench: Bench) -> None:
    """5, 5 and 4 make 4.67, which is kept; 5, 4 and 4 make 4.33, which is not."""
    settings = {**ALL, "judge_votes": 3, "judge_temperature": 0.7, "system": "From the web."}
    judge = rates(rice=[5, 5, 4], 面条=[5, 4, 4])
    rows = bench.run(STAGE, settings, {"backward": BACKWARD, "judge": judge}, passages=texts(*TEXTS[:2]))
    assert [(round(row["score"], 2), row["kept"]) for row in rows] == [(4.67, True), (4.33, False)]
    assert rows[0]["prompt"][0] == {"role": "system", "content": "From the web."}


def test_which_inputs_belong_together_is_told(bench: Bench) -> None:
    judge = rates(rice=5)
    pairs = [{**row, **SCORED} for row in texts(TEXTS[0])]
    for engines, inputs in (
        ({"judge": judge}, {"passages": texts(*TEXTS)}),
        ({"judge": judge, "backward": BACKWARD}, {}),
        ({"judge": judge, "backward": BACKWARD}, {"candidates": pairs}),
    ):
        with pytest.raises(DataError, match=r"give passages and the engine backward .* or candidates alone"):
            bench.run(STAGE, ALL, engines, **inputs)
    with pytest.raises(DataError, match="has no column `scores`, so it is no round of back-translate"):
        bench.run(STAGE, ALL, {"judge": judge}, candidates=pairs)


def test_demonstrations_are_turned_round_for_the_backward_model_in_the_words_that_it_is_asked_with(
    bench: Bench,
) -> None:
    """A system prompt is not what the instruction is made of and is left out; a dialogue can't be turned round."""
    rows: list[Row] = [
        {**a_prompt(0, "How?"), "completion": [{"role": "assistant", "content": "Thus."}]},
        {**a_prompt(1, "什么？"), "completion": [{"role": "assistant", "content": "这样。"}]},
        {**a_prompt(2, "Again?"), "completion": [{"role": "assistant", "content": "No."}]},
    ]
    rows[1]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    rows[2]["prompt"] = [
        {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, *rows[2]["prompt"],
    ]  # fmt: skip
    found = bench.run(REVERSE, {"template": "Asked for: {answer}"}, demonstrations=rows)
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in found] == [
        ("Asked for: Thus.", "How?"), ("Asked for: 这样。", "什么？"),
    ]  # fmt: skip
    assert [row["parent_id"] for row in found] == ["p0", "p1"] and found[0]["split"] == "train"
    assert bench.summary == {"reversed": 2, "left_out": 1}

    seen: list[str] = []
    backward = ScriptedEngine(lambda prompt, _: seen.append(prompt[-1]["content"]) or "How?", fingerprint="b")  # type: ignore
    settings = {**ALL, "min_words": 1, "template": "Asked for: {answer}"}
    bench.run(STAGE, settings, {"backward": backward, "judge": rates(How=5)}, passages=texts("Thus."))
    assert seen == ["Asked for: Thus."]


def test_demonstrations_of_dialogues_alone_can_not_be_turned_round(bench: Bench) -> None:
    row = {**a_prompt(0), "completion": [{"role": "assistant", "content": "Thus."}]}
    row["prompt"] = [*row["prompt"], {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(DataError, match=r"none of 1 rows .* give demonstrations of one turn"):
        bench.run(REVERSE, {}, demonstrations=[row])


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    rows = texts(*(TEXTS[0].replace("ten", str(n)) for n in range(6)))
    answers = {
        "backward": lambda prompt, index: "How do I cook rice?",
        "judge": lambda prompt, index: '{"reason": "so", "score": 5}',
    }
    found = assert_survives_kills(tmp_path, "back-translate", ALL, {"passages": rows}, answers)
    assert len(found) == 6
