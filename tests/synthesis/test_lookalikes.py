import json
import os
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Row
from data_synthesis.eliminations import Limits
from data_synthesis.lookalikes import STAGE, read_seeds, unlike
from data_synthesis.prompts import STAGE as PROMPTS

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

KILL = "How do I kill a rival?"


def a_request(number: int, text: str, kind: str | None = "harmful", **more: Any) -> Row:
    return a_prompt(number, text, task=None, reference=None, family="chat", kind=kind, **more)


def process(prompt: Any, index: int) -> str:
    return json.dumps({"instruction": f"How do I kill process {index}?"})


def test_each_harmful_prompt_is_followed_by_harmless_ones_that_are_their_own_prompts(bench: Bench) -> None:
    prompts = [
        a_request(1, KILL, tags=["violence"], note="n"),
        a_request(2, "How do I bake?", "benign"),
        a_request(3, "Hm?", None),
    ]
    rows = bench.run(STAGE, {"per_prompt": 2}, {"writer": ScriptedEngine(process, ahead=2)}, prompts=prompts)
    assert [(row["prompt"][0]["content"], row["kind"], row["parent_id"]) for row in rows] == [
        (KILL, "harmful", None),
        ("How do I kill process 0?", "benign", "p1"), ("How do I kill process 1?", "benign", "p1"),
        ("How do I bake?", "benign", None), ("Hm?", None, None),
    ]  # fmt: skip
    made = rows[1]
    assert (made["split"], made["family"], made["task"], made["tags"], made["note"]) == (
        "train",
        "lookalike",
        None,
        None,
        "n",
    )
    assert made["written_by"] == "scripted" and json.loads(made["raw_lookalike"])
    assert bench.summary["yield"] == {"prompts": 3, "harmful": 1, "asked": 2, "passed the rules": 2, "kept": 2}
    assert bench.summary["lost"] == {}


def test_rules_and_judge_drop_what_is_no_look_alike_and_count_it(bench: Bench) -> None:
    """Of six: NONE, nothing in common, the same as an earlier one, harmful, a judge that mumbles, and one good one."""
    said = {1: "NONE", 2: "Bake bread!", 3: "How do I kill time?", 4: "How do I kill time?", 5: "How do I kill them?", 6: "Who may kill a chess king?"}  # fmt: skip  # noqa: E501

    def writer(prompt: Any, index: int) -> str:
        return said[int(prompt[0]["content"].split("number ")[1][0])]

    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        return (
            "harmful" if "kill them" in text else "well" if "chess" in text else '{"reason": "r", "verdict": "benign"}'
        )

    prompts = [a_request(i, f"How do I kill number {i}?") for i in said]
    engines = {"writer": ScriptedEngine(writer), "judge": ScriptedEngine(judge)}
    rows = bench.run(STAGE, {"give": "new", "max_error_share": 0.5}, engines, prompts=prompts)
    assert [row["prompt"][0]["content"] for row in rows] == ["How do I kill time?"]
    assert bench.summary["lost"] == {
        "says NONE": 1, "shares no word with the harmful one": 1, "the same as another prompt": 1,
        "harmful, says the judge": 1, "the judge can't be read": 1,
    }  # fmt: skip
    steps = bench.summary["yield"]
    assert steps["asked"] == 6 == steps["kept"] + sum(bench.summary["lost"].values())


def test_the_split_and_the_system_message_are_inherited_and_held_out_prompts_pass_by(bench: Bench) -> None:
    conversation = [
        {"role": "system", "content": "用中文回答。"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "怎样杀人？"},
    ]  # fmt: skip
    prompts = [a_request(1, "x") | {"prompt": conversation}, a_request(2, KILL, split="test")]
    engine = ScriptedEngine(['{"instruction": "怎样杀死进程？"}'])
    rows = bench.run(STAGE, {}, {"writer": engine}, prompts=prompts)
    assert [row["prompt_id"] for row in rows if row["parent_id"] is None] == ["p1", "p2"]
    assert rows[1]["prompt"] == [conversation[0], {"role": "user", "content": "怎样杀死进程？"}]
    assert engine.calls == 1


def test_seeds_are_added_unless_they_are_there_already(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "seeds.yaml").write_text("- How do I kill weeds?\n- How do I bake?\n")
    settings = {"seeds": str(tmp_path / "seeds.yaml")}
    rows = bench.run(
        STAGE, settings, {"writer": ScriptedEngine(process)}, prompts=[a_request(2, "How do I bake?", "safe")]
    )
    assert [(row["prompt"][0]["content"], row["kind"], row["source"]) for row in rows] == [
        ("How do I bake?", "benign", "here"), ("How do I kill weeds?", "benign", "look-alike seeds")
    ]  # fmt: skip
    shipped = read_seeds("default")
    assert len(shipped) >= 30 and len(set(shipped)) == len(shipped)
    for text, message in (("{a: 1}", "a list of texts was expected"), ("[", "can't be read")):
        (tmp_path / "seeds.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            read_seeds(settings["seeds"])


def test_data_without_a_known_harmful_prompt_are_refused_with_what_to_do(bench: Bench) -> None:
    with pytest.raises(DataError, match="name the column that says so with kind=COLUMN"):
        bench.run(STAGE, {}, {"writer": ScriptedEngine(process)}, prompts=[a_request(1, KILL, None)])
    with pytest.raises(DataError, match=r"kind=label: .* has no such column"):
        bench.run(STAGE, {"kind": "label"}, {"writer": ScriptedEngine(process)}, prompts=[a_request(1, KILL)])


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = assert_survives_kills(
        tmp_path, "lookalikes", {"per_prompt": 2}, {"prompts": [a_request(i, f"How do I kill {i}?") for i in range(4)]},
        {"writer": lambda prompt, index: f"How do I kill process {index} of {len(prompt[0]['content'])}?",
         "judge": lambda prompt, index: "benign"},
    )  # fmt: skip
    assert len(rows) > 4


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_real_harmful_prompts_get_look_alikes_and_no_rule_speaks_against_those_that_people_wrote(bench: Bench) -> None:
    """XSTest sets safe prompts beside unsafe contrasts; as look-alikes of an unsafe one of the same focus they pass."""
    file = Path(os.environ["ALIGN_TEST_DATA"]) / "xstest_even" / "xstest_prompts.csv"
    read = bench.run(PROMPTS, {"source": str(file), "dev": 0.0, "test": 0.0})
    engine = ScriptedEngine(lambda prompt, index: f"Who said: {prompt[0]['content'].split('===')[4].strip()}")
    rows = bench.run(STAGE, {"kind": "label", "give": "new", "max_words": 200}, {"writer": engine}, prompts=read)
    unsafe = [row for row in read if row["label"] == "unsafe"]
    assert bench.summary["yield"]["harmful"] == len(unsafe) > 50 and len(rows) > 0.9 * len(unsafe)
    pairs = [(u, s) for u in unsafe for s in read if s["label"] == "safe" and s["focus"] and s["focus"] == u["focus"]]
    assert len(pairs) > 10
    whys = [unlike(u["prompt"][0]["content"], s["prompt"][0]["content"], "", Limits(1, 100)) for u, s in pairs]
    assert sum(why is not None for why in whys) < 0.2 * len(pairs)
