from __future__ import annotations

import json
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.formats import messages, shape_of
from align.core.records import Kind, Row


def converted(record: dict[str, Any], kind: Kind | None) -> Row:
    (row,) = shape_of(list(record), kind, "x.jsonl, line 1")(record, "x.jsonl, line 1")
    return row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED, SAID = [user("Add 2 and 3.")], [assistant("5")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Add 2 and 3.", "completion": "5"},
        {"prompt": ASKED, "completion": SAID},
        {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
        {"instruction": "Add 2 and 3.", "output": "5"},
        {"question": "Add 2 and 3.", "answer": "5"},
        {"question": "Add 2 and 3.", "answer": 5},
        {"instruction": "Add 2 and 3.", "response": "5"},
        {"messages": ASKED + SAID},
        {"conversations": [{"from": "human", "value": "Add 2 and 3."}, {"from": "gpt", "value": "5"}]},
        {"conversations": ASKED + SAID},
        {"prompt": "Add", "messages": ASKED + SAID},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add 2 and 3."}], "weight": 0}, *SAID]},
    ],
)
def test_every_shape_becomes_the_same_demonstration_and_the_same_prompt_with_its_answer(record: dict[str, Any]):
    row = converted(record, Kind.DEMONSTRATIONS)
    assert (row["prompt"], row["completion"]) == (ASKED, SAID)
    assert not set(row) - {"prompt", "completion"}
    completion = converted(record, Kind.COMPLETIONS)
    assert (completion["prompt"], completion["completion"]) == (ASKED, SAID)
    if not ("prompt" in record and "messages" in record):
        prompt = converted(record, Kind.PROMPTS)
        assert (prompt["prompt"], prompt["answer"]) == (ASKED, SAID)


@pytest.mark.parametrize(
    "record",
    [{"prompt": "Add 2 and 3."}, {"instruction": "Add 2 and 3."}, {"question": "Add 2 and 3."}, {"messages": ASKED}],
)
def test_a_prompt_alone_is_a_prompt_and_no_demonstration(record: dict[str, Any]):
    assert converted(record, Kind.PROMPTS) == {"prompt": ASKED}
    with pytest.raises(DataError):
        converted(record, Kind.DEMONSTRATIONS)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"},
        {"prompt": ASKED, "chosen": SAID, "rejected": [assistant("6")]},
        {"chosen": ASKED + SAID, "rejected": [*ASKED, assistant("6")]},
        {"prompt": "Add", "chosen": ASKED + SAID, "rejected": [*ASKED, assistant("6")], "messages": ASKED + SAID},
        {"chosen": "\n\nHuman: Add 2 and 3.\n\nAssistant: 5", "rejected": "\n\nHuman: Add 2 and 3.\n\nAssistant: 6"},
        {"instruction": "Add", "input": "2 and 3.", "chosen": "5", "rejected": "6"},
        {"question": "Add 2 and 3.", "chosen": "5", "rejected": "6"},
        {
            "conversations": [{"from": "human", "value": "Add 2 and 3."}],
            "chosen": {"from": "gpt", "value": "5"}, "rejected": {"from": "gpt", "value": "6"},
        },
    ],
)  # fmt: skip
def test_every_shape_of_preference_becomes_the_same_pair(record: dict[str, Any]):
    row = converted(record, Kind.PREFERENCES)
    asked = [user("Add\n\n2 and 3.")] if "input" in record else ASKED
    assert row == {"prompt": asked, "chosen": SAID, "rejected": [assistant("6")]}


def test_a_preference_given_where_completions_are_needed_becomes_two_scored_completions():
    record = {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6", "margin": 2}
    rows = shape_of(list(record), Kind.COMPLETIONS, "x")(record, "x")
    assert [(r["sample_index"], r["completion"][0]["content"], r["reward"]) for r in rows] == [
        (0, "5", 2.0),
        (1, "6", 0.0),
    ]
    assert all("margin" not in row and "chosen" not in row for row in rows)


def test_alpacas_input_follows_the_instruction_and_system_and_history_come_before():
    record = {
        "instruction": "Sum up.",
        "input": "A text.",
        "output": "Text.",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert converted(record, Kind.DEMONSTRATIONS) == {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            user("Hi"),
            assistant("Hello"),
            user("Sum up.\n\nA text."),
        ],
        "completion": [assistant("Text.")],
    }  # fmt: skip


def test_a_dialogue_trains_all_its_answers_and_a_prompt_of_it_asks_for_the_last():
    talk = [user("1?"), assistant("one"), user("2?"), assistant("two"), user("thanks")]
    demonstration = converted({"messages": talk}, Kind.DEMONSTRATIONS)
    assert demonstration == {"prompt": talk[:1], "completion": talk[1:4]}
    assert converted({"messages": talk[:4]}, Kind.PROMPTS) == {"prompt": talk[:3], "answer": talk[3:4]}
    assert converted({"messages": talk}, Kind.PROMPTS) == {"prompt": talk}
    assert converted({"messages": talk}, Kind.COMPLETIONS) == {"prompt": talk[:3], "completion": talk[3:4]}


def test_a_greeting_of_the_assistant_belongs_to_the_prompt():
    talk = [assistant("Hello!"), user("1?"), assistant("one")]
    assert converted({"messages": talk}, Kind.DEMONSTRATIONS) == {"prompt": talk[:2], "completion": talk[2:]}


def test_a_whole_solution_of_gsm8k_gives_the_reference_and_the_task():
    row = converted({"question": "How many?", "answer": "12*100=<<12*100=1200>>1200\n#### 1,200"}, Kind.PROMPTS)
    assert (row["task"], json.loads(row["reference"])) == ("math", {"answer": "1200"})
    assert row["answer"][0]["content"].endswith("#### 1,200")
    plain = converted({"question": "How many?", "answer": "Twelve, #4 of them"}, Kind.PROMPTS)
    assert "reference" not in plain


def test_a_reference_that_is_there_is_kept():
    row = converted({"question": "How many?", "answer": "#### 5", "reference": '{"answer": "6"}'}, Kind.PROMPTS)
    assert row["reference"] == '{"answer": "6"}'


def test_other_columns_travel_on():
    row = converted({"instruction": "Add.", "output": "5", "topic": "sums", "system": None}, Kind.DEMONSTRATIONS)
    assert row["topic"] == "sums"


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        (
            {"text": "a", "label": 1}, Kind.DEMONSTRATIONS,
            r"columns text, label can't be read as demonstrations; known are .*ShareGPT.*`columns`",
        ),
        ({"prompt": "a"}, Kind.PREFERENCES, "columns prompt can't be read as preferences"),
        ({"chosen": "a", "rejected": "b"}, Kind.PREFERENCES, "there is no prompt beside them"),
        (
            {"chosen": [user("a"), *SAID], "rejected": [user("b"), *SAID]}, Kind.PREFERENCES,
            "chosen and rejected part before their last turn",
        ),
        ({"messages": [user("a"), {"role": "critic", "content": "b"}]}, Kind.DEMONSTRATIONS, "a turn of 'critic'"),
        ({"messages": []}, Kind.DEMONSTRATIONS, r"messages is \[\]; text or a list of messages was expected"),
        ({"messages": ASKED}, Kind.DEMONSTRATIONS, "no answer of the assistant"),
        ({"prompt": None, "completion": "x"}, Kind.DEMONSTRATIONS, "prompt is None; text or a list"),
        ({"prompt": [*ASKED, *SAID], "completion": "x"}, Kind.DEMONSTRATIONS, "prompt ends with assistant"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, Kind.DEMONSTRATIONS, "content is None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, *SAID]}, Kind.DEMONSTRATIONS,
            "text was expected",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused_with_its_place(record: dict[str, Any], kind: Kind, says: str):
    with pytest.raises(DataError, match=rf"x\.jsonl, line 1: .*{says}"):
        converted(record, kind)


def test_rows_for_verifying_are_taken_as_they_are_and_a_bad_one_stops_nothing():
    row = converted({"id": 1, "prompt": "q", "completion": ["what"], "reference": {"answer": "5"}}, None)
    assert (row["prompt"], row["completion"], row["id"]) == ([user("q")], None, 1)


def test_a_prompt_of_hh_that_opens_the_assistants_turn_ends_with_the_user():
    row = converted({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"}, Kind.PROMPTS)
    assert row["prompt"] == [user("Hi"), assistant("Hello"), user("Bye")]


def test_text_that_only_mentions_a_human_is_one_message():
    assert messages("A\n\nHuman: B", "user", "prompt", "x") == [user("A\n\nHuman: B")]


def test_tool_calls_are_kept():
    calls = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    turn = messages([{"role": "assistant", "content": None, "tool_calls": calls}], "assistant", "m", "x")[0]
    assert turn == {"role": "assistant", "content": "", "tool_calls": calls}


def test_what_an_assistant_s_turn_counts_is_kept_and_wrong_weights_are_refused():
    turns = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b", "weight": 0}]
    assert messages(turns, "user", "m", "x")[1] == turns[1]
    with pytest.raises(DataError, match="x: m has a turn of the weight 'much'"):
        messages([{"role": "assistant", "content": "b", "weight": "much"}], "user", "m", "x")
