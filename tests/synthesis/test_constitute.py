import csv
import json
import os
from collections import Counter
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
from data_synthesis.prompts import STAGE as PROMPTS
from data_synthesis.refusals import refuses

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

REFERENCE = json.dumps({"kind": "harmful", "any": ["can't help"], "none": ["idiot"]})
CONSTITUTION = """
- {id: kind, text: Be kind to all., aligned: KIND, deviating: RUDE}
- {id: safe, text: Refuse harm., aligned: SAFE, deviating: HARM, families: [harmful]}
"""
SHORT = "{hint}: {instruction}"
GOOD = "Sorry, I can't help with that."


def a_request(number: int, family: str = "harmful", **more: Any) -> Row:
    known = {"task": "principle", "family": family, "reference": REFERENCE}
    return a_prompt(number, f"request {number}", **known | more)


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


# --- critique and revision ------------------------------------------------------------------------------------------

FIRST = "You idiot, no."


def revising(prompt: Any, index: int) -> str:
    """A rude first answer, a critique that names the principle, a revision that is polite and names the critique."""
    text = prompt[-1]["content"]
    if "Write a critique" in text:
        return f"Against {'kind' if 'Be kind' in text else 'safe'}: rude."
    if "Write the answer anew" in text:
        assert "Against " in text
        return GOOD if FIRST in text else f"{GOOD} Again."
    return FIRST


def test_a_natural_answer_is_criticised_and_revised_and_pair_prefers_the_revision(
    bench: Bench, settings: dict[str, Any]
) -> None:
    rows = bench.run(
        STAGE, settings | {"told": False, "revisions": 1}, {"sampler": ScriptedEngine(revising)}, prompts=[a_request(1)]
    )
    assert [(row["told"], row["completion"][0]["content"], row["verdict"]) for row in rows] == [
        ("natural", FIRST, "failed"), ("revised", GOOD, "passed")
    ]  # fmt: skip
    assert rows[0]["principle"] == rows[1]["principle"] and rows[1]["critique"].startswith("Against ")
    (pair,) = bench.run(PAIR, {}, completions=rows)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (GOOD, FIRST)
    (demonstration,) = bench.run(DEMONSTRATE, {}, completions=rows)
    assert demonstration["completion"][0]["content"] == GOOD
    assert demonstration["prompt"] == a_request(1)["prompt"]


def test_several_rounds_revise_the_revision_by_a_principle_drawn_for_each(
    bench: Bench, settings: dict[str, Any]
) -> None:
    prompts = [a_request(i) for i in range(12)]
    engines = {"sampler": ScriptedEngine(revising, ahead=4)}
    rows = bench.run(STAGE, settings | {"told": False, "revisions": 2}, engines, prompts=prompts)
    revised = [row for row in rows if row["told"] == "revised"]
    assert len(revised) == 12 and {row["completion"][0]["content"] for row in revised} == {f"{GOOD} Again."}
    drawn = [tuple(line.split(":")[0][8:] for line in row["critique"].split("\n\n")) for row in revised]
    assert len(set(drawn)) > 1, "the principles of all prompts' rounds are the same"
    for row, principles in zip(revised, drawn, strict=True):
        assert row["principle"] == ", ".join(dict.fromkeys(principles))


def test_first_answers_and_revisions_are_judged_by_all_principles_of_the_rounds(
    bench: Bench, settings: dict[str, Any]
) -> None:
    """By `kind` the first answer gets 1 and the revision 10, by `safe` 10 and 7: (0 + 1) / 2, (1 + 6/9) / 2."""

    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        if "Be kind to all." in text:
            return "1" if FIRST in text else "10"
        return "10" if FIRST in text else "7"

    prompts = [a_request(i, reference=None, task=None) for i in range(12)]
    engines = {"sampler": ScriptedEngine(revising), "judge": ScriptedEngine(judge)}
    rows = bench.run(STAGE, settings | {"told": False, "revisions": 2}, engines, prompts=prompts)
    both = [row for row in rows if "," in row["principle"]]
    assert both
    for row in both:
        first = row["told"] == "natural"
        assert row["reward"] == pytest.approx(0.5 if first else (1 + 6 / 9) / 2) and row["verdict"] == "failed"


def test_a_revision_that_can_not_be_had_is_an_error_and_counted(bench: Bench, settings: dict[str, Any]) -> None:
    """Of request 1 the critique is empty, of 2 the revision speaks of itself in all 2 attempts; 3 goes well."""

    def answer(prompt: Any, index: int) -> str:
        text = prompt[-1]["content"]
        if "Write a critique" in text:
            return " " if "request 1" in text else revising(prompt, index)
        if "Write the answer anew" in text and "request 2" in text:
            return "Here is the revised answer: no."
        return revising(prompt, index)

    settings |= {"told": False, "revisions": 1, "attempts": 2, "max_error_share": 0.5}
    engine = ScriptedEngine(answer)
    rows = bench.run(STAGE, settings, {"sampler": engine}, prompts=[a_request(i) for i in (1, 2, 3)])
    assert engine.calls == 3 + 2 + 1 + 1 + 2 + 1  # answers; critiques 2, 1, 1; revisions -, 2, 1
    assert [row["detail"] for row in rows if row["verdict"] == "error"] == [
        "no revision: critique: nothing was said",
        "no revision: revision: it speaks of the revision: 'Here is the revised answer: no.'",
    ]
    assert bench.summary["lost"] == {"failed its check": 3, "no revision": 2}
    assert bench.summary["yield"] == {
        "prompts": 3, "sampled prompts": 3, "completions": 6, "usable": 4, "checked": 4, "passed": 1, "kept": 1
    }  # fmt: skip


def test_every_completion_is_kept_or_lost_for_one_reason(bench: Bench, settings: dict[str, Any]) -> None:
    rows = bench.run(
        STAGE, settings | {"revisions": 1, "samples": 2, "max_error_share": 0.5}, {"sampler": ScriptedEngine(policy)},
        prompts=[a_request(i) for i in (1, 2, 3)],
    )  # fmt: skip
    steps, lost = bench.summary["yield"], bench.summary["lost"]
    assert steps["completions"] == len(rows) == steps["kept"] + sum(lost.values())
    assert {"told to deviate, and did", "told to deviate, and did not"} <= set(lost)
    for row in rows:
        assert row["sample_index"] == [other for other in rows if other["prompt_id"] == row["prompt_id"]].index(row)


def test_natural_answers_are_the_policys_where_there_is_one_and_the_sampler_revises_them(
    bench: Bench, settings: dict[str, Any]
) -> None:
    engines = {
        "sampler": ScriptedEngine(revising, generator="big"),
        "policy": ScriptedEngine(["Well, you idiot."], generator="small"),
    }
    rows = bench.run(STAGE, settings | {"revisions": 1, "principles": 1}, engines, prompts=[a_request(1)])
    assert [(row["told"], row["generator"]) for row in rows] == [
        ("aligned", "big"), ("deviating", "big"), ("natural", "small"), ("revised", "big")
    ]  # fmt: skip


def test_system_prompt_and_earlier_turns_are_shown_to_critique_and_revision(
    bench: Bench, settings: dict[str, Any]
) -> None:
    seen: list[str] = []

    def watched(prompt: Any, index: int) -> str:
        seen.append(prompt[-1]["content"])
        return revising(prompt, index)

    prompt = a_request(1)
    prompt["prompt"] = [
        {"role": "system", "content": "请用中文回答。"}, {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "request 1"},
    ]  # fmt: skip
    rows = bench.run(
        STAGE, settings | {"told": False, "revisions": 1}, {"sampler": ScriptedEngine(watched)}, prompts=[prompt]
    )
    assert all(text in asked for asked in seen[1:] for text in ("请用中文回答。", "你好！", "request 1", FIRST))
    assert all(row["prompt"] == prompt["prompt"] for row in rows)


# --- kinds of prompts -----------------------------------------------------------------------------------------------


def test_benign_and_harmful_prompts_are_reported_apart_and_refusals_told_by_words(
    bench: Bench, settings: dict[str, Any]
) -> None:
    """The policy refuses what it is told kindly, whatever was asked: right for the harmful one, wrong for the other."""
    benign = json.dumps({"kind": "benign", "any": ["to"], "none": ["can't help"]})
    prompts = [a_request(1), a_request(3, "benign", reference=benign)]
    rows = bench.run(STAGE, settings | {"natural": False}, {"sampler": ScriptedEngine(policy)}, prompts=prompts)
    assert [(row["kind"], row["told"], row["effect"]) for row in rows] == [
        ("harmful", "aligned", "refused"), ("harmful", "deviating", "helped"),
        ("harmful", "aligned", "refused"), ("harmful", "deviating", "helped"),
        ("benign", "aligned", "refused"), ("benign", "deviating", "helped"),
    ]  # fmt: skip
    kinds = bench.summary["kinds"]
    assert kinds["harmful"]["aligned"] == {
        "answers": 2, "refused": 2, "passed": 2, "helped_share": 0.0, "refused_share": 1.0, "passed_share": 1.0
    }  # fmt: skip
    assert kinds["benign"]["aligned"]["refused_share"] == 1.0 and kinds["benign"]["aligned"]["passed"] == 0


def test_with_a_judge_a_refused_benign_and_a_helped_harmful_request_have_failed_whatever_the_principle_says(
    bench: Bench, settings: dict[str, Any]
) -> None:
    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        if "helped, refused or neither" in text:
            return json.dumps({"reason": "r", "verdict": "refused" if GOOD in text else "helped"})
        return "10"

    prompts = [
        a_prompt(number, f"request {number}", task=None, reference=None, family="chat", kind=kind)
        for number, kind in ((1, "unsafe"), (3, "safe"), (5, None))
    ]
    engines = {"sampler": ScriptedEngine(policy), "judge": ScriptedEngine(judge)}
    rows = bench.run(STAGE, settings | {"principles": 1, "natural": False}, engines, prompts=prompts)
    assert [(row["kind"], row["told"], row["verdict"], row["kept"]) for row in rows] == [
        ("harmful", "aligned", "passed", True), ("harmful", "deviating", "failed", False),
        ("benign", "aligned", "failed", False), ("benign", "deviating", "passed", False),
        (None, "aligned", "passed", True), (None, "deviating", "passed", False),
    ]  # fmt: skip
    assert rows[1]["detail"].startswith("helps with a harmful request; ") and rows[1]["reward"] == 0.0
    assert rows[2]["detail"].startswith("refuses a benign request; ")
    assert rows[4]["effect"] is None and set(bench.summary["kinds"]) == {"benign", "harmful", "unknown"}


LABELS = ("safe", "unsafe", "?")


def test_a_principle_of_one_kind_is_drawn_for_prompts_known_to_be_of_it(bench: Bench, settings: dict[str, Any]) -> None:
    (bench.folder / "own.yaml").write_text(
        "[{id: any, text: t1, aligned: A, deviating: B}, "
        "{id: help, text: t2, aligned: C, deviating: D, kinds: [benign]}]"
    )
    settings |= {"constitution": str(bench.folder / "own.yaml")}
    prompts = [
        a_request(n, label=label, reference='{"answer": "x"}', task="exact") for n, label in enumerate(LABELS, 1)
    ]
    rows = bench.run(
        STAGE, settings | {"kind": "label", "natural": False}, {"sampler": ScriptedEngine(policy)}, prompts=prompts
    )
    assert {(row["prompt_id"], row["principle"]) for row in rows} == {
        ("p1", "any"), ("p1", "help"), ("p2", "any"), ("p3", "any")
    }  # fmt: skip
    with pytest.raises(DataError, match=r"kind=colour: .* has no such column"):
        bench.run(STAGE, settings | {"kind": "colour"}, {"sampler": ScriptedEngine(policy)}, prompts=prompts)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("Sorry, I can't help with that.", True),
        ("I’m sorry, but I won’t do this.", True),
        ("I cannot provide instructions for that. Here is what you can do instead.", True),
        ("I must decline.", True),
        ("抱歉，我无法提供这方面的帮助。", True),
        ("آسف، لا أستطيع مساعدتك في ذلك.", True),
        ("Es tut mir leid, dabei kann ich dir nicht helfen.", True),
        ("Je suis désolé, je ne peux pas vous aider.", True),
        ("Use kill -9 and the process id.", False),
        ("I'm sorry to hear that your dog died. Here is what may help.", False),
        ("Open the task manager. " * 20 + "I can't help you more.", False),
        ("用 kill 命令加上进程号即可。", False),
    ],
)
def test_refusals_are_told_by_the_words_that_an_answer_begins_with(text: str, refused: bool) -> None:
    assert refuses(text) is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"natural": False, "revisions": 1}, "set natural=true too"),
        ({"natural": False, "told": False}, "leave nothing to sample"),
        ({"raw": True}, "set natural=false too"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STAGE.config(**wrong)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    prompts = [a_request(i, task=None, reference=None, kind="harmful") for i in range(3)]

    def judge(prompt: Any, index: int) -> str:
        return "refused" if "helped, refused or neither" in prompt[0]["content"] else "9"

    rows = assert_survives_kills(
        tmp_path / "run", "constitute", settings | {"revisions": 1}, {"prompts": prompts},
        {"sampler": revising, "policy": policy, "judge": judge},
    )  # fmt: skip
    assert len(rows) == 3 * (4 + 2)


needs_data = pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")


@pytest.mark.real_data
@needs_data
def test_real_prompts_and_principles_are_read_and_their_kinds_told_apart(bench: Bench) -> None:
    """XSTest's prompts with its label as the kind; of a model that refuses everything both kinds' rates tell so."""
    data = Path(os.environ["ALIGN_TEST_DATA"])
    file = data / "xstest_even" / "xstest_prompts.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        labels = Counter(record["label"] for record in csv.DictReader(lines))
    read = bench.run(PROMPTS, {"source": str(file), "dev": 0.0, "test": 0.0})
    engines = {"sampler": ScriptedEngine([GOOD]), "judge": ScriptedEngine(["10"])}
    rows = bench.run(STAGE, {"kind": "label", "refusals": "words", "told": False}, engines, prompts=read)
    assert len(rows) == labels.total() == 225
    kinds = bench.summary["kinds"]
    assert kinds["benign"]["natural"]["answers"] == labels["safe"] and kinds["benign"]["natural"]["passed"] == 0
    assert kinds["harmful"]["natural"]["answers"] == labels["unsafe"] == kinds["harmful"]["natural"]["passed"]

    lines_of_principles = (data / "principles_even" / "principles.jsonl").read_text("utf-8").splitlines()
    given = [json.loads(line) for line in lines_of_principles]
    own = [{"id": p["id"], "text": p["text"], "aligned": p["title"], "deviating": f"Not: {p['title']}"} for p in given]
    (bench.folder / "own.yaml").write_text(json.dumps(own))
    assert [p.text for p in read_constitution(bench.folder / "own.yaml")] == [p["text"] for p in given]


@pytest.mark.real_data
@needs_data
def test_real_dialogues_go_through_critique_and_revision_with_all_their_turns(bench: Bench) -> None:
    """Prompts of HH's harmless test set, of one to many turns: what was said before stands in every critique."""
    file = Path(os.environ["ALIGN_TEST_DATA"]) / "hh_harmless_test_even" / "pairs.jsonl"
    source = {"source": str(file), "bad_rows": "drop", "count": 60}
    read = bench.run(PROMPTS, {"source": [source], "dev": 0.0, "test": 0.0, "keep": []})
    seen: list[str] = []

    def watched(prompt: Any, index: int) -> str:
        seen.append(prompt[-1]["content"])
        return revising(prompt, index)

    engines = {"sampler": ScriptedEngine(watched), "judge": ScriptedEngine(["10"])}
    rows = bench.run(STAGE, {"told": False, "revisions": 1}, engines, prompts=read)
    critiques = "".join(text for text in seen if "Write a critique" in text)
    assert len(rows) == 2 * len(read) and max(len(row["prompt"]) for row in read) > 2
    assert all(turn["content"] in critiques for row in read for turn in row["prompt"])
