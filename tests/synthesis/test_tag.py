import json
from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError
from data_synthesis.tag import STAGE, read_tags

from .conftest import Bench, a_prompt

SHORT = {"template": "Tags: {instruction}"}


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ('[{"tag": "math", "explanation": "it adds"}, {"tag": "a story", "explanation": "x"}]', ["math", "a story"]),
        ('["math", " code ", "math"]', ["math", "code"]),
        ('```json\n[{"tag": "math"}]\n```', ["math"]),
    ],
)  # fmt: skip
def test_a_json_list_of_tags_is_read_without_repetitions(text: str, tags: list[str]) -> None:
    assert read_tags(text) == tags


@pytest.mark.parametrize(
    "text",
    ["", "a", '["a"', '{"tag": "a"}', "[]", '[""]', "[1]", '[{"name": "a"}]', '[{"tag": null}]', 'Tags: ["a"]'],
)
def test_anything_else_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError):
        read_tags(text)


def test_prompts_get_tags_and_the_raw_answer_and_malformed_answers_are_asked_for_again(bench: Bench) -> None:
    tagger = ScriptedEngine({"Tags: one": '["a", "b"]', "Tags: two": ["oops", '["b"]'], "Tags: three": "never"})
    prompts = [a_prompt(1, "one"), a_prompt(2, "two", tags=["old"]), a_prompt(3, "three")]
    rows = bench.run(STAGE, {**SHORT, "max_error_share": 0.5}, {"tagger": tagger}, prompts=prompts)
    assert [row["tags"] for row in rows] == [["a", "b"], ["b"], []]
    assert [row["raw_tags"] for row in rows] == ['["a", "b"]', '["b"]', "never"]
    assert [row["prompt_id"] for row in rows] == ["p1", "p2", "p3"]
    assert bench.summary == {
        "prompts": 3, "turns": 3, "retried": 2, "failed_turns": 1, "untagged": 1, "unique_tags": 2,
        "tags_per_prompt": 1.0, "top_tags": {"b": 2, "a": 1},
    }  # fmt: skip


def test_the_stage_fails_when_too_many_turns_have_no_tags(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tag: 1 of 2 answers are errors.*max_error_share=0\.4.*not JSON"):
        bench.run(
            STAGE, {**SHORT, "max_error_share": 0.4}, {"tagger": ScriptedEngine({"Tags: a": '["x"]', "Tags: b": "?"})},
            prompts=[a_prompt(1, "a"), a_prompt(2, "b")],
        )  # fmt: skip


def test_every_user_turn_can_be_tagged_by_itself(bench: Bench) -> None:
    tagger = ScriptedEngine({"Tags: first": '["a"]', "Tags: second": '["b", "a"]'})
    prompt = a_prompt(1)
    prompt["prompt"] = [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second"},
    ]  # fmt: skip
    (row,) = bench.run(STAGE, {**SHORT, "turns": "all"}, {"tagger": tagger}, prompts=[prompt])
    assert row["tags"] == ["a", "b"]
    assert json.loads(row["raw_tags"]) == ['["a"]', '["b", "a"]']
    (row,) = bench.run(STAGE, SHORT, {"tagger": tagger}, prompts=[prompt])
    assert row["tags"] == ["b", "a"]


def test_the_shipped_template_asks_for_json_about_the_instruction(bench: Bench) -> None:
    def answer(prompt: Any, index: int) -> str:
        return '["ok"]' if "Instruction:\nwrite a poem" in prompt[0]["content"] else "no"

    tagger = ScriptedEngine(answer)
    (row,) = bench.run(STAGE, {}, {"tagger": tagger}, prompts=[a_prompt(1, "write a poem")])
    assert row["tags"] == ["ok"]
