from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.asking import fill
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import Kind, Row
from align.tiny.chores.probe import CHORES
from data_synthesis.probe_tags import NEEDS, STAGE, TEMPLATES
from data_synthesis.tag_probes import Tagged, consistency_probes, precision_probes
from reward.agreement import wilson
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.kills import assert_survives_kills


def pool(count: int = 12) -> list[Row]:
    """Instructions 0, 3, 6, … have the tag x, the next ones y, the others z; the text names the tag."""
    return [a_prompt(i, f"{'xyz'[i % 3]} says {i}", tags=["xyz"[i % 3]]) for i in range(count)]


def honest(prompt: Any, index: int) -> str:
    """Yes, if every instruction begins with the tag."""
    lines = prompt[0]["content"].splitlines()
    tag = next(line for line in lines if line.startswith("Tag: "))[5:]
    shown = [line.split(". ")[-1].removeprefix("Instruction: ") for line in lines if " says " in line]
    return "yes" if all(text.startswith(tag) for text in shown) else "no"


TINY = {"templates": "tiny", "precision": 8, "consistency": 3, "group": 3}


def test_an_honest_judge_finds_right_tags_right_and_sees_through_every_counterfactual(bench: Bench):
    """8 probes of precision and, of the 3 tags, 3 of consistency, each with its counterfactual: 22 in all."""
    rows = bench.run(STAGE, TINY, {"judge": ScriptedEngine(honest)}, prompts=pool())
    assert len(rows) == 22 and {row["verdict"] for row in rows} == {"passed"}
    assert [row["counterfactual"] for row in rows] == [False, True] * 11
    assert {row["said"] for row in rows if row["counterfactual"]} == {"no"}
    summary = bench.summary
    assert (summary["yield"], summary["lost"]) == ({"probes": 22, "read": 22}, {})
    low, high = wilson(8, 8)
    all_right = {"probes": 8, "share": 100.0, "interval": [round(low, 1), round(high, 1)]}
    assert summary["precision"] == {**all_right, "judge_on_counterfactuals": all_right}
    assert summary["consistency"]["probes"] == 3
    assert summary["tags_found_wrong"] == {}


def test_a_judge_that_says_yes_to_everything_is_seen(bench: Bench):
    bench.run(
        STAGE,
        TINY,
        {"judge": ScriptedEngine(lambda prompt, index: '{"reason": "so", "verdict": "Yes"}')},
        prompts=pool(),
    )
    assert bench.summary["precision"]["share"] == 100.0
    assert bench.summary["precision"]["judge_on_counterfactuals"]["share"] == 0.0
    assert "so its yes says little" in bench.summary["precision"]["note"]


def test_wrong_tags_lower_precision_and_are_named(bench: Bench):
    """Of 12 instructions 3 have another's tag: the honest judge says no to those, 9 of 12 are right."""
    prompts = [{**row, "tags": ["x"]} if row["prompt_id"] in ("p1", "p4", "p7") else row for row in pool()]
    settings = {**TINY, "precision": 100, "consistency": 0}
    rows = bench.run(STAGE, settings, {"judge": ScriptedEngine(honest)}, prompts=prompts)
    assert bench.summary["precision"]["share"] == 75.0
    assert bench.summary["tags_found_wrong"] == {"x": 3}
    assert {row["parent_id"] for row in rows if row["verdict"] == "failed" and not row["counterfactual"]} == {
        "p1",
        "p4",
        "p7",
    }


def test_counterfactual_tags_lie_neither_above_nor_below_the_instructions_own(bench: Bench):
    parents = {"x": None, "y": "x", "z": None}
    ontology = bench.table(
        [{"tag": tag, "count": 1, "members": [tag], "parent": up, "examples": []} for tag, up in parents.items()],
        Kind.ONTOLOGY,
    )
    tagged = Tagged(bench.table(pool(), Kind.PROMPTS), ["train"], ontology)
    for probe in precision_probes(tagged, 12, np.random.default_rng(0)):
        own = "xyz"[probe.places[0] % 3]
        assert probe.tag == own if not probe.counterfactual else (own == "z") != (probe.tag == "z")
    for probe in consistency_probes(tagged, 3, 2, np.random.default_rng(0)):
        tags = ["xyz"[place % 3] for place in probe.places]
        assert tags.count(probe.tag) == (1 if probe.counterfactual else 2)


def test_the_default_templates_mark_instructions_off_and_multilingual_dialogues_work(bench: Bench):
    talk = [
        {"role": "system", "content": "用中文回答"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "写一首诗"},
    ]  # fmt: skip
    prompts = [
        a_prompt(1, prompt=talk, tags=["诗"]),
        a_prompt(2, "اكتب قصيدة", tags=["诗"]),
        a_prompt(3, "2+2?", tags=["数学"]),
    ]
    seen: list[str] = []

    def judge(prompt: Any, index: int) -> str:
        seen.append(prompt[0]["content"])
        return '```json\n{"reason": "", "verdict": "no"}\n```'

    rows = bench.run(STAGE, {"group": 2}, {"judge": ScriptedEngine(judge)}, prompts=prompts)
    assert any("写一首诗" in text and "Tag: 诗" in text for text in seen)
    group = next(text for text in seen if "instruction 2" in text)
    assert group.count("===") >= 4 and "{" + "instructions}" not in group
    assert {row["said"] for row in rows} == {"no"}


def test_answers_that_can_not_be_read_are_asked_again_counted_and_stop_the_stage_when_many(bench: Bench):
    shaky = ScriptedEngine(lambda prompt, index: "yes" if index == 1 else "perhaps")
    bench.run(STAGE, TINY, {"judge": shaky}, prompts=pool())
    assert bench.summary["precision"]["share"] == 100.0
    mute = ScriptedEngine(["perhaps"])
    with pytest.raises(EngineError, match="probe-tags: 22 of 22 answers are errors"):
        bench.run(STAGE, TINY, {"judge": mute}, prompts=pool())
    rows = bench.run(STAGE, {**TINY, "max_error_share": 1.0}, {"judge": mute}, prompts=pool())
    assert {row["verdict"] for row in rows} == {"error"} and bench.summary["lost"] == {"no readable answer": 22}
    assert rows[0]["completion"] == [{"role": "assistant", "content": "perhaps"}]


def test_nothing_to_probe_is_an_error(bench: Bench):
    with pytest.raises(DataError, match="no tagged instruction in the splits train"):
        bench.run(STAGE, TINY, {"judge": ScriptedEngine(honest)}, prompts=[a_prompt(1, tags=[])])


def test_it_survives_kills(tmp_path: Path):
    rows = assert_survives_kills(tmp_path, "probe-tags", TINY, {"prompts": pool()}, {"judge": honest})
    assert len(rows) == 22


def test_the_chores_are_the_tiny_templates_with_right_answers_of_both_kinds():
    for name, make in CHORES.items():
        template = (TEMPLATES / "tiny" / f"{name}.txt").read_text().removesuffix("\n")
        answers = []
        for seed in range(40):
            (message,), answer = make(random.Random(seed))
            answers.append(answer)
            blank = fill(template, dict.fromkeys(NEEDS[name], ""))
            assert message["content"].split("\n")[-1] == blank.split("\n")[-1] and len(message["content"]) < 520
        assert 10 < answers.count("yes") < 30 and {*answers} == {"yes", "no"}
