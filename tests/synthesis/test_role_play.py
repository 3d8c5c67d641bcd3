from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Row
from data_synthesis.characters import Asked, Profile, gives_away, read_questions, usable_questions
from data_synthesis.leaks import LeakConfig
from data_synthesis.role_play import STAGE
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.kills import assert_survives_kills

FACTS = {
    "Ada": "Ada is a clockmaker in Bern. She has built 41 clocks. She fears deep water.",
    "Otto": "Otto is a ferryman on the Elbe. He crossed it first in 1871. He sings badly.",
}
QUESTIONS = {
    ("Ada", "known"): [
        ("What is your trade?", "Ada is a clockmaker in Bern."), ("What do you fear?", "She fears deep water."),
    ],
    ("Ada", "unknown"): [("When was the Elbe first crossed by Otto?", "He crossed it first in 1871.")],
    ("Otto", "known"): [
        ("Do you sing well?", "He sings badly."), ("What do you do?", "Otto is a ferryman on the Elbe."),
    ],
    ("Otto", "unknown"): [("How many clocks are there of Ada?", "She has built 41 clocks.")],
}  # fmt: skip
ALL = {"dev": 0.0, "test": 0.0}


def profiles(**facts: Any) -> list[Row]:
    return [
        a_prompt(n, name=name, facts=text, source_row=n, family=None, brief=None)
        for n, (name, text) in enumerate((facts or FACTS).items())
    ]


def who(prompt: Prompt) -> str:
    """The character that a prompt of the writer is about; it is named before the other."""
    text = str(prompt[-1]["content"])  # type: ignore[index]
    return min((name for name in ("Ada", "Otto") if name in text), key=text.index)


def asks_for(prompt: Prompt) -> str | None:
    text = str(prompt[-1]["content"])  # type: ignore[index]
    return "unknown" if "can't know the answer" in text else "known" if "can answer from" in text else None


def writer(answer: Callable[[Prompt], str] = lambda prompt: "Well, well.") -> ScriptedEngine:
    def say(prompt: Prompt, index: int) -> str:
        kind = asks_for(prompt)
        if kind is None:
            return answer(prompt)
        listed = [{"question": q, "evidence": e} for q, e in QUESTIONS[(who(prompt), kind)]]
        return json.dumps(listed, ensure_ascii=False)

    return ScriptedEngine(say, generator="writer")


def question_of(row: Row) -> str:
    return str(row["prompt"][-1]["content"])


def test_the_evidence_is_in_view_when_the_answer_is_written_and_not_in_the_prompt_that_is_trained_on(
    bench: Bench,
) -> None:
    seen: dict[str, str] = {}

    def answer(prompt: Prompt) -> str:
        text = str(prompt[-1]["content"])  # type: ignore[index]
        seen[next(q for pairs in QUESTIONS.values() for q, _ in pairs if q in text)] = text
        return "Well, well."

    rows = bench.run(STAGE, ALL, {"writer": writer(answer)}, profiles=profiles())
    assert len(rows) == 6 and bench.summary["yield"] == {"asked": 6, "questions": 6, "answered": 6, "kept": 6}
    for row in rows:
        system = FACTS[row["character"]].split(". ")[0]
        assert row["prompt"][0] == {"role": "system", "content": f"You are {row['character']}. {system}."}
        assert len(row["prompt"]) == 2 and row["contrast"] != row["character"]
        if row["asked_for"] == "known":
            assert row["evidence"] in seen[question_of(row)]
            assert row["evidence"] in FACTS[row["character"]]
        else:
            assert row["evidence"] not in seen[question_of(row)]
            assert row["evidence"] in FACTS[row["contrast"]]
        assert row["evidence"] not in question_of(row)
    assert {question_of(row) for row in rows} == {q for pairs in QUESTIONS.values() for q, _ in pairs}


def test_a_character_that_knows_what_only_the_other_knows_has_failed(bench: Bench) -> None:
    """Ada says Otto's year: the rule sees the number. Otto says "over forty": only the judge sees that."""

    def answer(prompt: Prompt) -> str:
        text = str(prompt[-1]["content"])  # type: ignore[index]
        if "crossed by Otto" in text:
            return "I was told it was in 1871."
        return "Over forty, they say." if "clocks are there" in text else "Well, well."

    judge = ScriptedEngine(
        lambda prompt, _: json.dumps({"reason": "r", "score": 2 if "Over forty" in str(prompt) else 9})
    )
    rows = bench.run(STAGE, ALL, {"writer": writer(answer), "judge": judge}, profiles=profiles())
    lost = {question_of(row): row["detail"] for row in rows if not row["kept"]}
    assert lost == {
        "When was the Elbe first crossed by Otto?": (
            "gives away what only the other knows: says 1871, which only the other knows"
        ),
        "How many clocks are there of Ada?": "judge: 2 of 10, 8 passes",
    }
    words = [json.loads(row["judgement"])["words"] for row in rows if row["judgement"] is not None]
    assert len(words) == 5 and words[0] == ['{"reason": "r", "score": 9}']
    assert judge.calls == 5, "what a rule refuses is not judged"
    assert bench.summary["lost"] == {
        "gives away what only the other knows": 1, "the judge finds it no good answer": 1,
    }  # fmt: skip
    assert bench.summary["verdicts"]["unknown"] == {"passed": 0, "failed": 2, "error": 0}


def test_a_dialogue_goes_on_turn_by_turn_with_the_answers_before_and_ends_where_none_is_good(bench: Bench) -> None:
    """Three turns each. Otto's second turn is empty: his third is never asked, and counts as lost."""
    order: dict[str, list[str]] = {}

    def answer(prompt: Prompt) -> str:
        name = who(prompt)
        order.setdefault(name, []).append(str(len(prompt)))
        return "" if name == "Otto" and len(order[name]) == 2 else f"{name} says {len(order[name])}."

    rows = bench.run(STAGE, {**ALL, "turns": 3}, {"writer": writer(answer)}, profiles=profiles())
    ada = [row for row in rows if row["character"] == "Ada"]
    assert [row["turn"] for row in ada] == [0, 1, 2]
    assert [turn["role"] for turn in ada[2]["prompt"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert ada[2]["prompt"][1:5] == [
        {"role": "user", "content": question_of(ada[0])},
        {"role": "assistant", "content": "Ada says 1."},
        {"role": "user", "content": question_of(ada[1])},
        {"role": "assistant", "content": "Ada says 2."},
    ]
    assert order["Ada"] == ["2", "4", "6"], "the writer sees the turns before, too"
    otto = [row for row in rows if row["character"] == "Otto"]
    assert [(row["turn"], row["kept"]) for row in otto] == [(0, True), (1, False)]
    assert bench.summary["yield"] == {"asked": 6, "questions": 6, "answered": 5, "kept": 4}
    assert bench.summary["lost"] == {"an empty answer": 1, "an earlier turn had no good answer": 1}


def test_questions_that_can_not_be_used_are_counted_and_the_yields_add_up(bench: Bench) -> None:
    """Known of Ada: one good, one whose evidence is invented; unknown: unreadable. Otto: 1 of 2 known, none unknown."""

    def say(prompt: Prompt, index: int) -> str | Completion:
        kind, name = asks_for(prompt), who(prompt)
        if kind is None:
            return Completion("", (), "error", error="down") if "fear" in str(prompt) else "Hm."
        listed = [{"question": q, "evidence": e} for q, e in QUESTIONS[(name, kind)]]
        if name == "Ada" and kind == "unknown":
            return "I can't think of any."
        if name == "Ada" or kind == "unknown":
            listed[0]["evidence"] = "Ada is a baker."
        return json.dumps(listed[:1] if name == "Otto" else listed)

    settings = {**ALL, "attempts": 1, "samples": 2, "max_error_share": 0.5}
    rows = bench.run(STAGE, settings, {"writer": ScriptedEngine(say)}, profiles=profiles())
    assert bench.summary["yield"] == {"asked": 12, "questions": 4, "answered": 2, "kept": 2}
    assert bench.summary["lost"] == {
        "the list of questions can't be read": 2, "the evidence doesn't stand in the profile": 4,
        "fewer questions than were asked for": 2, "not sampled": 2,
    }  # fmt: skip
    assert sum(bench.summary["lost"].values()) == 12 - 2
    assert [row["verdict"] for row in rows if row["character"] == "Ada"] == ["error", "error"]
    assert [row["sample_index"] for row in rows] == [0, 1] * 2


def test_a_chinese_profile_is_played_in_chinese(bench: Bench) -> None:
    moon = "他写过很多关于月亮的诗。"
    facts = {
        "李白": "李白是唐代诗人。他爱喝酒。" + moon,
        "鲁班": "鲁班是木匠。他发明了锯子。他住在鲁国。",
    }
    listed = {
        "known": {"李白": ("你喜欢什么？", "他爱喝酒。"), "鲁班": ("你发明了什么？", "他发明了锯子。")},
        "unknown": {
            "李白": ("锯子是谁发明的？", "他发明了锯子。"),
            "鲁班": ("谁写了月亮的诗？", moon),
        },
    }

    def say(prompt: Prompt, index: int) -> str:
        kind, text = asks_for(prompt), str(prompt[-1]["content"])  # type: ignore[index]
        if kind is None:
            return "他写过很多关于月亮的诗，我听说。" if "谁写了" in text else "我不知道。"
        name = min(facts, key=text.index)
        question, evidence = listed[kind][name]
        return json.dumps([{"question": question, "evidence": evidence}], ensure_ascii=False)

    rows = bench.run(
        STAGE, {**ALL, "known": 1, "leak_characters": 10, "system": "你是{name}。{brief}"},
        {"writer": ScriptedEngine(say)}, profiles=profiles(**facts),
    )  # fmt: skip
    assert rows[0]["prompt"][0]["content"] in ("你是李白。李白是唐代诗人。", "你是鲁班。鲁班是木匠。")
    assert {question_of(row): row["kept"] for row in rows} == {
        "你喜欢什么？": True, "你发明了什么？": True, "锯子是谁发明的？": True, "谁写了月亮的诗？": False,
    }  # fmt: skip


def a_profile(name: str) -> Profile:
    return Profile(name, name, FACTS[name], "", "train", {}, None)


def test_a_list_of_questions_is_read_strictly() -> None:
    ada, otto = a_profile("Ada"), a_profile("Otto")

    def read(text: str, most: int = 3) -> list[Asked | str]:
        return read_questions(text, "known", most, ada, otto)

    good = '{"question": "What do you fear?", "evidence": "she fears  deep water"}'
    assert [q.question for q in read(f"```json\n[{good}]\n```") if isinstance(q, Asked)] == ["What do you fear?"]
    assert read(f"[{good}, {good}]")[1] == "the question came before"
    shared = FACTS["Ada"] + " He sings badly."
    both = Profile("x", "x", shared, "", "train", {}, None)
    text = '[{"evidence": "sings badly", "question": "q"}]'
    assert read_questions(text, "known", 1, both, otto) == ["the evidence is known to both"]
    with pytest.raises(MalformedError, match="no question can be used: the evidence is known to both"):
        usable_questions(text, "known", 1, both, otto)
    empty = '[{"question": "", "evidence": "x"}]'
    for bad in ("", "[]", "{}", good, f"[{good}", f'[{good}, "more"]', '[{"question": "q"}]', empty):
        with pytest.raises(MalformedError):
            read(bad)
    with pytest.raises(MalformedError, match="no JSON list of 1 to 1 questions"):
        read(f"[{good}, {good}]", most=1)


def test_what_an_answer_gives_away() -> None:
    """Numbers of the evidence count unless question or own facts have them; runs count from `leak_words` on."""
    asked = Asked("unknown", "When did Otto cross in 1880?", "He crossed it first in 1871, not in 1880.", "")
    config = LeakConfig(leak_words=4)
    assert gives_away("In 1871.", asked, FACTS["Ada"], config) == "says 1871, which only the other knows"
    assert gives_away("In 1880? I don't know.", asked, FACTS["Ada"], config) is None
    assert gives_away("1871 clocks", asked, "Ada has 1871 clocks.", config) is None
    assert gives_away("He crossed it first, I think.", asked, FACTS["Ada"], config) is not None
    assert gives_away("He crossed it? Who?", asked, FACTS["Ada"], config) is None


def test_what_is_missing_is_told(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"has no column 'facts'; it has .*; name the columns with name=… and facts=…"):
        bench.run(STAGE, ALL, {"writer": writer()}, profiles=[a_prompt(0, name="Ada")])
    one = {"Ada": FACTS["Ada"]}
    with pytest.raises(DataError, match=r"no two characters of one split to play \(no other character .*: 1\)"):
        bench.run(STAGE, ALL, {"writer": writer()}, profiles=profiles(**one))
    with pytest.raises(ValueError, match="known=0 and unknown=0 leave nothing to ask"):
        STAGE.config(known=0, unknown=0)


def test_a_held_out_character_is_not_played_and_contrasts_with_nobody_in_training(bench: Bench) -> None:
    rows = profiles(**FACTS, Eve="Eve is a judge. She is 60.")
    rows[2]["split"] = "test"
    found = bench.run(STAGE, ALL, {"writer": writer()}, profiles=rows)
    assert {row["contrast"] for row in found} == {"Ada", "Otto"}
    assert bench.summary["skipped"] == {"character of split test": 1}


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    engine = writer()
    answers = {
        "writer": lambda prompt, index: engine._look_up(prompt, index),
        "judge": lambda prompt, index: '{"reason": "so", "score": 9}',
    }
    rows = assert_survives_kills(tmp_path, "role-play", {**ALL, "turns": 2}, {"profiles": profiles()}, answers)
    assert len(rows) == 6 and all(row["kept"] for row in rows)
