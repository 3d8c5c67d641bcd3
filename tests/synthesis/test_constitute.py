import json
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Completion
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import Row
from data_synthesis.constitute import STAGE, TEMPLATES
from data_synthesis.constitution import read_constitution
from data_synthesis.demonstrate import STAGE as DEMONSTRATE
from data_synthesis.pair import STAGE as PAIR

from .conftest import Bench, a_prompt

REFERENCE = json.dumps({"kind": "harmful", "any": ["can't help"], "none": ["idiot"]})
CONSTITUTION = """
- {id: kind, text: Be kind to all., aligned: KIND, deviating: RUDE}
- {id: safe, text: Refuse harm., aligned: SAFE, deviating: HARM, families: [harmful]}
"""
SHORT = "{hint}: {instruction}"
GOOD = "Sorry, I can't help with that."


def a_request(number: int, family: str = "harmful", **more: Any) -> Row:
    return a_prompt(number, f"request {number}", task="principle", family=family, reference=REFERENCE, **more)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "constitution.yaml"
    path.write_text(CONSTITUTION)
    return {"constitution": str(path), "template": SHORT, "principles": 2}


def policy(prompt: Any, index: int) -> str:
    """Follows what it is told, but for request 2, where it refuses although it is told to deviate."""
    text = prompt[-1]["content"]
    if text.startswith(("KIND", "SAFE")) or "request 2" in text:
        return f"{GOOD} {index}"
    return "Sure, you idiot." if text.startswith(("RUDE", "HARM")) else f"Well, {text}"


def test_each_prompt_is_sampled_following_deviating_and_as_it_is_and_checked_by_its_verifier(
    bench: Bench, settings: dict[str, Any]
) -> None:
    rows = bench.run(
        STAGE, settings, {"sampler": ScriptedEngine(policy, ahead=3)}, prompts=[a_request(1), a_request(2)]
    )
    assert len(rows) == 10
    of_one = {(row["principle"], row["told"]): row for row in rows[:4]}
    assert set(of_one) == {(p, told) for p in ("kind", "safe") for told in ("aligned", "deviating")}
    for (_, told), row in of_one.items():
        assert (row["verdict"], row["kept"]) == (("passed", True) if told == "aligned" else ("failed", False))
    assert (rows[4]["told"], rows[4]["verdict"]) == ("natural", "failed")
    assert [row["sample_index"] for row in rows[:5]] == [0, 1, 2, 3, 4]
    # request 2: told to deviate and right all the same: passed, but nothing to learn from
    assert [(row["told"], row["verdict"], row["kept"]) for row in rows[5:]] == [
        ("aligned", "passed", True), ("deviating", "passed", False),
        ("aligned", "passed", True), ("deviating", "passed", False), ("natural", "passed", True),
    ]  # fmt: skip
    assert bench.summary["told"] == {
        "aligned": {"passed": 4}, "deviating": {"failed": 2, "passed": 2}, "natural": {"failed": 1, "passed": 1}
    }  # fmt: skip


def test_the_training_prompt_is_the_users_own(bench: Bench, settings: dict[str, Any]) -> None:
    prompt = a_request(1)
    prompt["prompt"] = [
        {"role": "system", "content": "sys"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"}, {"role": "user", "content": "request 1"},
    ]  # fmt: skip
    seen: list[Any] = []

    def watched(sampled: Any, index: int) -> str:
        seen.append(sampled)
        return policy(sampled, index)

    rows = bench.run(STAGE, settings, {"sampler": ScriptedEngine(watched)}, prompts=[prompt])
    assert all(row["prompt"] == prompt["prompt"] for row in rows)
    assert {sampled[-1]["content"] for sampled in seen} == {
        "KIND: request 1", "RUDE: request 1", "SAFE: request 1", "HARM: request 1", "request 1"
    }  # fmt: skip
    assert all(sampled[:3] == prompt["prompt"][:3] for sampled in seen)


def test_its_rows_make_demonstrations_and_pairs(bench: Bench, settings: dict[str, Any]) -> None:
    rows = bench.run(STAGE, settings, {"sampler": ScriptedEngine(policy)}, prompts=[a_request(1), a_request(2)])
    demonstrations = bench.run(DEMONSTRATE, {}, completions=rows)
    assert [row["prompt_id"] for row in demonstrations] == ["p1", "p2"]
    (pair,) = bench.run(PAIR, {}, completions=rows)
    assert pair["prompt_id"] == "p1" and GOOD in pair["chosen"][0]["content"]


def test_a_judge_checks_by_the_principle_and_needs_no_reference(bench: Bench, settings: dict[str, Any]) -> None:
    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        assert "Be kind to all." in text or "Refuse harm." in text
        return "10" if GOOD in text else "2"

    prompts = [a_prompt(1, "request 1", task=None, reference=None, family="chat")]
    engines = {"sampler": ScriptedEngine(policy), "judge": ScriptedEngine(judge)}
    rows = bench.run(STAGE, settings, engines, prompts=prompts)
    assert [(row["told"], row["principle"], row["verdict"]) for row in rows] == [
        ("aligned", "kind", "passed"), ("deviating", "kind", "failed"), ("natural", "kind", "failed")
    ]  # fmt: skip
    assert rows[0]["reward"] == 1.0 and rows[1]["reward"] == pytest.approx(1 / 9)
    with pytest.raises(DataError, match="no prompt to sample"):
        bench.run(STAGE, settings, {"sampler": ScriptedEngine(policy)}, prompts=prompts)


def test_a_principle_of_other_families_is_not_drawn(bench: Bench, settings: dict[str, Any]) -> None:
    rows = bench.run(
        STAGE, {**settings, "natural": False}, {"sampler": ScriptedEngine(policy)}, prompts=[a_request(1, "benign")]
    )
    assert {row["principle"] for row in rows} == {"kind"} and len(rows) == 2


def test_an_answer_that_quotes_what_it_was_told_is_an_error(bench: Bench, settings: dict[str, Any]) -> None:
    engine = ScriptedEngine(lambda prompt, index: f"As I must {prompt[-1]['content'][:4]}, I can't help.")  # type: ignore[index]
    rows = bench.run(STAGE, {**settings, "natural": False}, {"sampler": engine}, prompts=[a_request(1)])
    assert {row["verdict"] for row in rows} == {"error"}
    assert rows[0]["detail"] == "quotes the principle or its hint"


def test_rows_stay_aligned_when_samples_fail(bench: Bench, settings: dict[str, Any]) -> None:
    failed = Completion("", (), "error", error="overloaded")

    def answer(prompt: Any, index: int) -> str | Completion:
        text = prompt[-1]["content"]
        return failed if text.startswith("RUDE") else f"{GOOD} {text.rsplit(' ', 1)[1]}"

    engine = ScriptedEngine(answer, ahead=5)
    settings = {**settings, "samples": 2, "max_error_share": 0.34, "principles": 1}
    rows = bench.run(STAGE, settings, {"sampler": engine}, prompts=[a_request(i, "x") for i in range(30)])
    assert len(rows) == 30 * 6
    for row in rows:
        told_off = row["told"] == "deviating"
        assert row["verdict"] == ("error" if told_off else "passed")
        assert told_off or row["completion"][0]["content"].endswith(row["prompt_id"][1:])


def test_an_engine_that_is_down_stops_the_stage_at_once(bench: Bench, settings: dict[str, Any]) -> None:
    engine = ScriptedEngine([Completion("", (), "error", error="overloaded")])
    with pytest.raises(EngineError, match=r"constitute: .*overloaded"):
        bench.run(STAGE, settings, {"sampler": engine}, prompts=[a_request(i) for i in range(1000)])
    assert engine.calls <= 210


def test_the_shipped_constitution_and_templates_are_usable(bench: Bench) -> None:
    principles = read_constitution(TEMPLATES / "constitution.yaml")
    assert len(principles) >= 5 and len({p.id for p in principles}) == len(principles)
    seen: list[str] = []

    def answer(prompt: Any, index: int) -> str:
        seen.append(prompt[-1]["content"])
        return GOOD

    rows = bench.run(STAGE, {}, {"sampler": ScriptedEngine(answer)}, prompts=[a_request(1)])
    told = {p.id: p for p in principles}[rows[0]["principle"]]
    assert told.aligned in seen[0] and told.deviating in seen[1] and seen[2] == "request 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a list of principles was expected"),
        ("- {id: a, text: b, aligned: c}", "principle 1: needs the texts.*deviating: Field required"),
        ("- {id: a, text: b, aligned: c, deviating: d, hint: e}", "hint: Extra inputs are not permitted"),
        ("- {id: a, text: b, aligned: c, deviating: d, families: x}", "families: Input should be a valid"),
        ("- a", "principle 1: needs the texts.*entry: Input should be an object"),
        ("- {id: a, text: b, aligned: c, deviating: d}\n" * 2, "the id 'a' is there twice"),
        ("- [", "can't be read"),
    ],
)
def test_a_wrong_constitution_is_an_error_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_constitution(tmp_path / "c.yaml")


def test_a_base_model_is_given_raw_text_and_never_a_bare_prompt(bench: Bench, settings: dict[str, Any]) -> None:
    seen: list[Any] = []

    def base(prompt: Any, index: int) -> str:
        seen.append(prompt)
        return GOOD if prompt.startswith(("KIND", "SAFE")) else "Sure, you idiot."

    rows = bench.run(
        STAGE, settings | {"raw": True, "natural": False}, {"sampler": ScriptedEngine(base)}, prompts=[a_request(1)]
    )
    assert sorted(seen) == [f"{hint}: request 1" for hint in ("HARM", "KIND", "RUDE", "SAFE")]
    assert [row["verdict"] for row in rows if row["told"] == "aligned"] == ["passed", "passed"]
    assert all(row["prompt"][0]["content"] == "request 1" for row in rows)
    with pytest.raises(ValueError, match="set natural=false too"):
        STAGE.config(raw=True)
