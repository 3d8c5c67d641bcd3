from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import Row
from data_synthesis.repurpose import STAGE
from data_synthesis.repurposed import other_script, points_at_text, read_instruction
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.kills import assert_survives_kills

MILL = "The old mill stood by the river, and nobody had lived there for years."
FOX = "老猎人在山里遇见一只狐狸，他们一起走过了漫长的冬天。"
ALL = {"min_words": 5, "whole": True, "text": "answer", "dev": 0.0, "test": 0.0}


def passages(*texts: str, **more: Any) -> list[Row]:
    return [
        a_prompt(n, **{"answer": [{"role": "assistant", "content": text}], "source_row": n, **more})
        for n, text in enumerate(texts)
    ]


def said(text: str) -> str:
    return json.dumps({"instruction": text}, ensure_ascii=False)


def level_of(prompt: Prompt) -> str:
    text = str(prompt[-1]["content"])  # type: ignore[index]
    return next(level for level in ("sparse", "medium", "high") if f"detail: {level}" in text)


def writer(answers: dict[str, str | list[str]]) -> ScriptedEngine:
    """Answers by level; of a list by sample index."""

    def answer(prompt: Prompt, index: int) -> str:
        found = answers[level_of(prompt)]
        return found if isinstance(found, str) else found[index]

    return ScriptedEngine(answer, generator="writer")


GOOD: dict[str, str | list[str]] = {
    "sparse": said("Tell of a deserted house."),
    "medium": said("Describe, in one sentence, a building that was left to itself."),
    "high": said("Write one calm sentence that sets a place before us: where it is and how long it has been empty."),
}


def test_a_passage_gets_an_instruction_of_each_level_and_is_the_completion_as_it_stands(bench: Bench) -> None:
    rows = bench.run(STAGE, ALL, {"writer": writer(GOOD)}, passages=passages(MILL, license="CC0"))
    assert [row["level"] for row in rows] == ["sparse", "medium", "detailed"]
    for row, level in zip(rows, ("sparse", "medium", "high"), strict=True):
        assert row["prompt"] == [{"role": "user", "content": json.loads(str(GOOD[level]))["instruction"]}]
        assert row["completion"] == [{"role": "assistant", "content": MILL}]
        assert (row["verdict"], row["kept"], row["generator"], row["written_by"]) == (
            "passed", True, "passage", "writer",
        )  # fmt: skip
        assert (row["parent_id"], row["source"], row["source_row"], row["license"]) == ("p0", "here", 0, "CC0")
        assert (row["start"], row["end"], row["split"], row["task"]) == (0, len(MILL), "train", None)
    assert len({row["prompt_id"] for row in rows}) == 3 and len({row["passage_id"] for row in rows}) == 1


def test_an_instruction_that_quotes_is_asked_for_again_and_the_last_refused_one_is_a_failed_row(bench: Bench) -> None:
    """Sparse quotes at the first attempt only; medium always; detailed speaks of "the passage above", always."""
    quoting = said("Write: the old mill stood by the river, and nobody had lived there.")
    answers = GOOD | {
        "sparse": [quoting, str(GOOD["sparse"])],
        "medium": quoting,
        "high": said("Write the passage above once more, with care."),
    }
    rows = bench.run(STAGE, {**ALL, "attempts": 2}, {"writer": writer(answers)}, passages=passages(MILL))
    assert [(row["verdict"], row["kept"], row["refused"]) for row in rows] == [
        ("passed", True, None),
        ("failed", False, "gives the passage away"),
        ("failed", False, "speaks of a text that isn't there"),
    ]
    assert rows[1]["reward"] == 0.0 and "quotes the passage: 'the old mill" in rows[1]["detail"]
    assert bench.summary["yield"] == {"passages": 1, "asked": 3, "written": 3, "not_refused": 1, "kept": 1}
    assert bench.summary["lost"] == {"gives the passage away": 1, "speaks of a text that isn't there": 1}


def test_the_yields_add_up_and_unreadable_answers_are_no_rows(bench: Bench) -> None:
    """Two passages, six instructions: two unreadable (medium), two poor by the judge (detailed), two kept."""
    judge = ScriptedEngine(
        lambda prompt, _: json.dumps({"reason": "r", "score": 3 if "calm sentence" in str(prompt) else 9})
    )
    answers = GOOD | {"medium": "Sure! Here is one."}
    settings = {**ALL, "attempts": 1, "max_error_share": 0.5, "system": "You write."}
    two = passages(MILL, MILL.replace("old", "new"))
    rows = bench.run(STAGE, settings, {"writer": writer(answers), "judge": judge}, passages=two)
    assert [(row["level"], row["kept"], row["score"]) for row in rows] == [
        ("sparse", True, 9.0), ("detailed", False, 3.0),
    ] * 2  # fmt: skip
    assert rows[0]["prompt"][0] == {"role": "system", "content": "You write."}
    assert bench.summary["yield"] == {"passages": 2, "asked": 6, "written": 4, "not_refused": 4, "kept": 2}
    assert bench.summary["lost"] == {
        "the instruction can't be read": 2, "the judge finds it no good answer": 2,
    }  # fmt: skip
    assert bench.summary["yield"]["asked"] - bench.summary["yield"]["kept"] == sum(bench.summary["lost"].values())
    assert bench.summary["kept_by_level"] == {"sparse": 2, "medium": 0, "detailed": 0}
    with pytest.raises(EngineError, match=r"2 of 6 answers are errors, more than max_error_share=0\.1"):
        bench.run(STAGE, settings | {"max_error_share": 0.1}, {"writer": writer(answers)}, passages=two)


def test_a_chinese_passage_wants_a_chinese_instruction(bench: Bench) -> None:
    answers = GOOD | {"medium": said("写一个关于友谊的短句。"), "high": said("老猎人在山里遇见一只狐狸，他们怎样了？")}
    rows = bench.run(STAGE, {**ALL, "attempts": 1}, {"writer": writer(answers)}, passages=passages(FOX))
    assert [(row["kept"], row["refused"]) for row in rows] == [
        (False, "in another script than the passage"),
        (True, None),
        (False, "gives the passage away"),
    ]
    assert rows[1]["completion"][0]["content"] == FOX


def test_two_levels_that_say_the_same_are_one_prompt_with_one_completion(bench: Bench) -> None:
    answers = GOOD | {"medium": GOOD["sparse"]}
    rows = bench.run(STAGE, ALL, {"writer": writer(answers)}, passages=passages(MILL))
    assert rows[0]["prompt_id"] == rows[1]["prompt_id"] != rows[2]["prompt_id"]


def test_a_failed_sample_is_counted_and_no_row(bench: Bench) -> None:
    engine = ScriptedEngine(lambda prompt, index: Completion("", (), "error", error="down"))
    settings = {**ALL, "attempts": 1, "max_error_share": 1.0}
    assert bench.run(STAGE, settings, {"writer": engine}, passages=passages(MILL)) == []
    assert bench.summary["lost"] == {"not sampled": 3}


def test_when_no_passage_is_long_enough_the_reasons_are_told(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"no passage to work on \(shorter than min_words: 1\); lower min_words"):
        bench.run(STAGE, {**ALL, "min_words": 60}, {"writer": writer(GOOD)}, passages=passages(MILL))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"instruction": "Say it."}', "Say it."),
        ('```json\n{"instruction": "Say\n it."}\n```', "Say\n it."),
        ("Instruction: Say it.", "Say it."),
        ("instruction:\nSay it.", "Say it."),
        ("Say it.", None),
        ('{"instruction": ["Say it."]}', None),
        ('{"request": "Say it."}', None),
        ('{"instruction": "Say it."', None),
        ("Instruction: ...", None),
        ("Instruction: one two three four five six", None),
    ],
)
def test_an_instruction_is_read_strictly(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(MalformedError):
            read_instruction(text, 5)
    else:
        assert read_instruction(text, 5) == value


def test_a_bare_text_is_an_instruction_only_where_a_backward_model_wrote_it() -> None:
    assert read_instruction(" Say it. ", 5, bare=True) == "Say it."


def test_what_speaks_of_a_text_that_is_not_there() -> None:
    assert points_at_text("Summarise the passage above.") and points_at_text("Use the provided text.")
    assert points_at_text("请总结上面这段文字。") and points_at_text("总结以下内容。")
    assert not points_at_text("Write a passage about a mill.") and not points_at_text("写一段关于磨坊的文字。")


def test_scripts_are_told_apart_where_there_are_letters() -> None:
    assert other_script("Write it.", FOX) == "LATIN"
    assert other_script("写", "ひらがなで書く") is None
    assert other_script("اكتب قصة", MILL) == "ARABIC"
    assert other_script("Count.", "1 + 1 = 2") is None


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    judge = lambda prompt, index: '{"reason": "fits", "score": 9}'  # noqa: E731
    answers = {"writer": lambda prompt, index: str(GOOD[level_of(prompt)]), "judge": judge}
    texts = [MILL.replace("years", f"{n} years") for n in range(5)]
    rows = assert_survives_kills(tmp_path, "repurpose", ALL, {"passages": passages(*texts)}, answers)
    assert len(rows) == 15 and all(row["kept"] for row in rows)
