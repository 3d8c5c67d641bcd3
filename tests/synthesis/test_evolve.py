import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Completion
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import Row
from data_synthesis.evolve import OPERATIONS, STAGE, TEMPLATES, EvolveConfig
from data_synthesis.spread import Spread

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

SEINE = [{"role": "assistant", "content": "the Seine"}]
SETTINGS: dict[str, Any] = {"min_growth": 2, "max_words": 20, "rounds": 1, "operations": ["constraints"]}


def shown(prompt: Any) -> list[str]:
    """What stands between the marks of a default template: earlier turns, then the instruction(s)."""
    text = prompt[-1]["content"]
    mark = re.search(r"^=== \w+ ===$", text, re.MULTILINE)
    assert mark is not None
    return [part.strip("\n") for part in text.split(mark[0])[2::2]]


def writer(change: Callable[[str, int], str]) -> ScriptedEngine:
    """A writer that changes the instruction it is shown."""
    return ScriptedEngine(lambda prompt, index: json.dumps({"instruction": change(shown(prompt)[1], index)}), ahead=3)


def and_why(text: str, index: int) -> str:
    return f"{text} and why"


def texts(rows: list[Row]) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows]


def test_each_round_makes_a_harder_prompt_of_the_last_one_with_its_lineage(bench: Bench) -> None:
    prompts = [a_prompt(1, "Name rivers", answer=SEINE, tags=["geography"], note="n"), a_prompt(2, "Name lakes")]
    rows = bench.run(STAGE, SETTINGS | {"rounds": 2}, {"writer": writer(and_why)}, prompts=prompts)
    assert texts(rows) == [
        "Name rivers", "Name rivers and why", "Name rivers and why and why",
        "Name lakes", "Name lakes and why", "Name lakes and why and why",
    ]  # fmt: skip
    root, once, twice = rows[:3]
    assert (root["prompt_id"], root["parent_id"], root["level"], root["reference"]) == (
        "p1",
        None,
        0,
        prompts[0]["reference"],
    )
    assert (once["parent_id"], twice["parent_id"]) == ("p1", once["prompt_id"])
    assert [row["root_id"] for row in rows[:3]] == ["p1"] * 3
    assert [(row["level"], row["round"], row["operation"]) for row in rows[1:3]] == [
        (1, 1, "constraints"), (2, 2, "constraints")
    ]  # fmt: skip
    for row in (once, twice):  # what no longer holds is gone, the rest travels on
        assert [row[name] for name in ("task", "reference", "answer", "tags")] == [None] * 4
        assert (row["split"], row["family"], row["source"], row["note"], row["evolved_by"]) == (
            "train", "exact", "here", "n", "scripted"
        )  # fmt: skip
    assert json.loads(twice["raw_evolution"]) == {"instruction": "Name rivers and why and why"}
    assert bench.summary["yield"] == {
        "prompts": 2, "evolutions": 4, "readable": 4, "passed the rules": 4, "kept": 4
    }  # fmt: skip


def test_one_that_fails_goes_unchanged_into_the_next_round_and_each_reason_is_counted(bench: Bench) -> None:
    """Round 1: `Name rivers` is answered NONE twice, and again in round 2; `Name lakes` fails once."""

    def change(text: str, index: int) -> str:
        if "rivers" in text:
            return "NONE"
        return "Sorry, I can't help with that." if index == 0 and text == "Name lakes" else and_why(text, index)

    engine = writer(change)
    rows = bench.run(
        STAGE,
        SETTINGS | {"rounds": 2},
        {"writer": engine},
        prompts=[a_prompt(1, "Name rivers"), a_prompt(2, "Name lakes")],
    )
    assert texts(rows) == ["Name rivers", "Name lakes", "Name lakes and why", "Name lakes and why and why"]
    assert engine.calls == 4 + 3  # attempts=2: rivers 2 + 2, lakes 2 + 1
    assert bench.summary["lost"] == {"says NONE": 2}
    steps = bench.summary["yield"]
    assert steps["evolutions"] == 4 == steps["kept"] + sum(bench.summary["lost"].values())
    assert bench.summary["by_operation"] == {"constraints": {"evolutions": 4, "says NONE": 2, "kept": 2}}


def test_an_instruction_that_can_grow_no_more_is_not_asked_about(bench: Bench) -> None:
    engine = writer(and_why)
    rows = bench.run(
        STAGE, SETTINGS | {"max_words": 6, "rounds": 4}, {"writer": engine}, prompts=[a_prompt(1, "Name rivers")]
    )
    assert texts(rows)[-1] == "Name rivers and why and why" and engine.calls == 2
    assert bench.summary["passed_by"] == {"too long to gain min_growth": 2}


def test_every_operation_is_drawn_and_asked_in_its_own_words(bench: Bench) -> None:
    seen: dict[str, str] = {}

    def answer(prompt: Any, index: int) -> str:
        text = shown(prompt)[1]
        seen[text] = prompt[0]["content"].split("\n\n")[1]
        return json.dumps({"tree": "+ x", "instruction": f"Tell of {text[-2:]} in verse now"})

    prompts = [a_prompt(i, f"Tell me all about number {i}") for i in range(10, 90)]
    rows = bench.run(
        STAGE, {"rounds": 1, "min_growth": 1, "nodes": [4]}, {"writer": ScriptedEngine(answer)}, prompts=prompts
    )
    assert len(set(seen.values())) == len(OPERATIONS) and any("4 meaningful nodes" in text for text in seen.values())
    made = [row for row in rows if row["operation"]]
    assert {row["operation"] for row in made} == {"breadth"}  # the others did not grow
    assert {row["level"] for row in made} == {0}
    assert set(bench.summary["by_operation"]) == set(OPERATIONS)
    assert bench.summary["lost"] == {"grows too little": 80 - len(made)}


def test_the_judge_eliminates_what_is_equal_answered_or_broken(bench: Bench) -> None:
    said = {"Name 1": "gained", "Name 2": "equal", "Name 3": "answered", "Name 4": "broken", "Name 5": "perhaps"}

    def judge(prompt: Any, index: int) -> str:
        parts = shown(prompt)
        if "score" in prompt[0]["content"]:
            return json.dumps({"reason": "r", "score": 9 if "why" in parts[1] else 2})
        assert parts[2] == f"{parts[1]} and why"
        return json.dumps({"reason": "r", "verdict": said[parts[1]]})

    rows = bench.run(
        STAGE, SETTINGS | {"max_error_share": 0.5}, {"writer": writer(and_why), "judge": ScriptedEngine(judge)},
        prompts=[a_prompt(i, f"Name {i}") for i in range(1, 6)],
    )  # fmt: skip
    assert texts(rows) == ["Name 1", "Name 1 and why", "Name 2", "Name 3", "Name 4", "Name 5"]
    assert [row["difficulty"] for row in rows] == [2, 9, 2, 2, 2, 2]
    assert bench.summary["lost"] == {
        "nothing gained": 1, "answered, says the judge": 1, "makes no sense": 1, "the judge can't be read": 1
    }  # fmt: skip
    spread = bench.summary["spread"]
    assert spread["before"]["difficulty"] == {"mean": 2.0, "sd": 0.0, "p10": 2, "p50": 2, "p90": 2}
    assert spread["after"]["prompts"] == 6 and spread["after"]["difficulty"]["mean"] == pytest.approx(19 / 6, abs=0.01)
    assert list(bench.summary["levels"]) == ["level 0", "level 1"]


def test_a_tagger_tags_what_has_no_tags_so_that_their_number_can_be_compared(bench: Bench) -> None:
    tagger = ScriptedEngine(lambda prompt, index: json.dumps(["a"] * 3 + prompt[0]["content"].split()[2:]))
    rows = bench.run(
        STAGE, SETTINGS | {"tag_template": "{instruction}"}, {"writer": writer(and_why), "tagger": tagger},
        prompts=[a_prompt(1, "Name rivers", tags=["mine", "own"]), a_prompt(2, "Name lakes", tags=None)],
    )  # fmt: skip
    assert [row["tags"] for row in rows] == [["mine", "own"], ["a", "and", "why"], ["a"], ["a", "and", "why"]]
    assert bench.summary["levels"]["level 1"]["tags"]["mean"] == 3.0


@pytest.mark.parametrize(("give", "expected"), [("evolved", [1, 2, 1, 2]), ("last", [2, 2])])
def test_only_the_evolved_ones_may_be_given_or_only_the_last(bench: Bench, give: str, expected: list[int]) -> None:
    prompts = [a_prompt(1, "Name rivers"), a_prompt(2, "Name lakes"), a_prompt(3, "Name seas", split="test")]
    rows = bench.run(STAGE, SETTINGS | {"rounds": 2, "give": give}, {"writer": writer(and_why)}, prompts=prompts)
    assert [row["level"] for row in rows] == expected
    if give == "last":  # the one between is in no table, so that the way back must not lead there
        assert [row["parent_id"] for row in rows] == ["p1", "p2"]


def test_held_out_prompts_pass_by_and_no_evolved_one_becomes_one_of_them(bench: Bench) -> None:
    """`Name 1 and why` is a test prompt, under another id; and both 2s become the same text, of which one is kept."""
    prompts = [
        a_prompt(1, "Name 1"), a_prompt(9, "name 1 and  WHY", split="test"),
        a_prompt(2, "Name 2"), a_prompt(3, "Name 2!"),
    ]  # fmt: skip
    rows = bench.run(
        STAGE, SETTINGS, {"writer": writer(lambda text, i: f"{text.rstrip('!')} and why")}, prompts=prompts
    )
    assert texts(rows) == ["Name 1", "name 1 and  WHY", "Name 2", "Name 2 and why", "Name 2!"]
    assert bench.summary["lost"] == {"the same as another prompt": 2}
    assert bench.summary["passed_by"] == {"split test": 1} and bench.summary["yield"]["prompts"] == 3


def test_references_are_kept_only_where_the_user_says_that_they_hold(bench: Bench) -> None:
    prompts = [a_prompt(1, "Name rivers", answer=SEINE, tags=["a"])]
    rows = bench.run(STAGE, SETTINGS | {"holds": True}, {"writer": writer(and_why)}, prompts=prompts)
    assert [(row["task"], row["reference"], row["answer"]) for row in rows] == [
        ("exact", prompts[0]["reference"], SEINE)
    ] * 2  # fmt: skip


@pytest.mark.parametrize("templates", ["default", "tiny"])
def test_system_prompt_and_earlier_turns_are_shown_and_kept(bench: Bench, templates: str) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "河流是什么？"},
        {"role": "assistant", "content": "流动的水。"}, {"role": "user", "content": "说出三条河流"},
    ]  # fmt: skip
    asked: list[str] = []

    def answer(prompt: Any, index: int) -> str:
        asked.append(prompt[0]["content"])
        return json.dumps({"instruction": "说出三条河流及其长度"}, ensure_ascii=False)

    rows = bench.run(
        STAGE, SETTINGS | {"templates": templates}, {"writer": ScriptedEngine(answer)},
        prompts=[a_prompt(1) | {"prompt": conversation}],
    )  # fmt: skip
    assert rows[1]["prompt"] == [*conversation[:3], {"role": "user", "content": "说出三条河流及其长度"}]
    assert all(text in asked[0] for text in ("Be brief.", "河流是什么？", "流动的水。", "说出三条河流"))


def test_a_writer_that_is_down_or_can_not_be_read_stops_the_stage(bench: Bench) -> None:
    down = ScriptedEngine([Completion("", (), "error", error="overloaded")])
    with pytest.raises(EngineError, match=r"evolve: .*overloaded"):
        bench.run(STAGE, SETTINGS, {"writer": down}, prompts=[a_prompt(i) for i in range(300)])
    with pytest.raises(EngineError, match=r"evolve: 3 of 3 answers are errors.*no JSON object with 'instruction'"):
        bench.run(STAGE, SETTINGS, {"writer": ScriptedEngine(["{broken"])}, prompts=[a_prompt(i) for i in range(3)])
    with pytest.raises(DataError, match=r"nothing came of the 3 prompts .*\(says NONE: 3\)"):
        bench.run(STAGE, SETTINGS, {"writer": ScriptedEngine(["NONE"])}, prompts=[a_prompt(i) for i in range(3)])


def test_the_json_form_is_asked_of_the_engine_where_it_can_be(bench: Bench) -> None:
    schemas: set[Any] = set()

    class Watched(ScriptedEngine):
        def sample(self, prompts: Any, n: int, params: Any, first_index: int = 0) -> Any:
            schemas.add(params.json_schema and tuple(json.loads(params.json_schema)["required"]))
            return super().sample(prompts, n, params, first_index)

    def answer(prompt: Any, index: int) -> str:
        return json.dumps({"tree": "t", "instruction": f"{shown(prompt)[1]} and why", "verdict": "gained", "score": 3})

    engines = {"writer": Watched(answer), "judge": Watched(answer)}
    bench.run(
        STAGE, SETTINGS | {"operations": ["tree"], "writer_json": True}, engines, prompts=[a_prompt(1, "Name rivers")]
    )
    assert schemas == {("tree", "instruction"), ("reason", "verdict"), ("reason", "score")}


def test_a_folder_of_ones_own_templates_is_filled_up_with_the_shipped_ones(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "constraints.txt").write_text("MINE {instruction}\n")
    engine = ScriptedEngine(lambda prompt, index: f"{prompt[0]['content'].removeprefix('MINE ')} and why")
    rows = bench.run(
        STAGE, SETTINGS | {"templates": str(tmp_path / "mine")}, {"writer": engine}, prompts=[a_prompt(1, "Name it")]
    )
    assert texts(rows) == ["Name it", "Name it and why"]
    (tmp_path / "mine" / "constraints.txt").write_text("no place for it\n")
    with pytest.raises(DataError, match=r"lacks \{instruction\}"):
        bench.run(STAGE, SETTINGS | {"templates": str(tmp_path / "mine")}, {"writer": engine}, prompts=[a_prompt(1)])


def test_the_shipped_sets_have_a_template_for_each_operation_and_judgement() -> None:
    names = {path.name for path in TEMPLATES.glob("*.txt")}
    assert names == {path.name for path in (TEMPLATES / "tiny").glob("*.txt")} == {
        f"{name}.txt" for name in (*OPERATIONS, "judge_depth", "judge_breadth", "judge_difficulty")
    }  # fmt: skip


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def change(prompt: Any, index: int) -> str:
        text = shown(prompt)[1]
        return "NONE" if index == 0 and text.endswith("3") else json.dumps({"instruction": f"{text} and why"})

    def judge(prompt: Any, index: int) -> str:
        return '{"score": 3}' if "score" in prompt[0]["content"] else "gained"

    rows = assert_survives_kills(
        tmp_path, "evolve", SETTINGS | {"rounds": 2}, {"prompts": [a_prompt(i, f"Name {i}") for i in range(6)]},
        {"writer": change, "judge": judge},
    )  # fmt: skip
    assert len(rows) == 18


@pytest.mark.parametrize(
    "wrong", [{"operations": ["tree", "wish"]}, {"operations": []}, {"nodes": []}, {"rounds": 0}, {"give": "some"}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvolveConfig(**wrong)


def test_the_spread_is_of_the_values_themselves() -> None:
    """Words 1, 2, 3, 10: mean 4, variance (9 + 4 + 1 + 36) / 4 = 12.5; p10 covers 0.4 of a row, so the first one."""
    spread = Spread()
    for count in (1, 2, 3, 10):
        spread.count({"level": 0, "prompt": [{"role": "user", "content": "w " * count}]})
    assert spread.whole() == {
        "prompts": 4, "words": {"mean": 4.0, "sd": 3.54, "p10": 1, "p50": 2, "p90": 10}
    }  # fmt: skip
