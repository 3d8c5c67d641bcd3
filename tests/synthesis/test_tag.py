import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from data_synthesis.tag import STAGE, read_tags

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

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
    [
        '{"tags": []}',
        '{"tags": ["a"], "x": 1}',
        "",
        "a",
        '["a"',
        '{"tag": "a"}',
        "[]",
        '[""]',
        "[1]",
        '[{"name": "a"}]',
        '[{"tag": null}]',
        'Tags: ["a"]',
    ],
)
def test_anything_else_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError):
        read_tags(text)


def test_prompts_get_tags_and_the_raw_answer_and_malformed_answers_are_asked_for_again(bench: Bench) -> None:
    tagger = ScriptedEngine({"Tags: one": '["a", "b"]', "Tags: two": ["oops", '["b"]'], "Tags: three": "never"})
    prompts = [a_prompt(1, "one"), a_prompt(2, "two", tags=["old"]), a_prompt(3, "three")]
    settings = {**SHORT, "max_error_share": 0.5, "turns": "last"}
    rows = bench.run(STAGE, settings, {"tagger": tagger}, prompts=prompts)
    assert [row["tags"] for row in rows] == [["a", "b"], ["b"], []]
    assert [row["raw_tags"] for row in rows] == ['["a", "b"]', '["b"]', "never"]
    assert [row["prompt_id"] for row in rows] == ["p1", "p2", "p3"]
    assert bench.summary == {
        "yield": {"prompts": 3, "tagged": 2}, "lost": {"no answer could be read in 3 attempts": 1},
        "turns": 3, "retried": 2, "failed_turns": 1, "partly_tagged": 0, "unique_tags": 2, "tags_not_in_latin": 0,
        "tags_per_prompt": 1.0, "top_tags": {"b": 2, "a": 1},
    }  # fmt: skip


def test_the_stage_fails_when_too_many_turns_have_no_tags(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tag: 1 of 2 answers are errors.*max_error_share=0\.4.*not JSON"):
        bench.run(
            STAGE, {**SHORT, "max_error_share": 0.4}, {"tagger": ScriptedEngine({"Tags: a": '["x"]', "Tags: b": "?"})},
            prompts=[a_prompt(1, "a"), a_prompt(2, "b")],
        )  # fmt: skip


TALK = a_prompt(1)
TALK["prompt"] = [
    {"role": "system", "content": "be kind"}, {"role": "user", "content": "写一首诗"},
    {"role": "assistant", "content": "好的"}, {"role": "user", "content": "make it short"},
]  # fmt: skip


def test_every_user_turn_is_tagged_by_itself_and_keeps_its_own_tags(bench: Bench) -> None:
    tagger = ScriptedEngine({
        "Tags: 写一首诗": '[{"tag": "poetry", "explanation": "asks for a poem"}]',
        "Tags: make it short": '{"tags": [{"tag": "revision"}, "poetry"]}',
    })  # fmt: skip
    (row,) = bench.run(STAGE, SHORT, {"tagger": tagger}, prompts=[TALK])
    assert row["tags"] == ["poetry", "revision"]
    assert row["turn_tags"] == [
        [{"tag": "poetry", "explanation": "asks for a poem"}],
        [{"tag": "revision", "explanation": ""}, {"tag": "poetry", "explanation": ""}],
    ]
    assert len(json.loads(row["raw_tags"])) == 2 and row["prompt"] == TALK["prompt"]
    (row,) = bench.run(STAGE, {**SHORT, "turns": "last"}, {"tagger": tagger}, prompts=[TALK])
    assert row["tags"] == ["revision", "poetry"] and row["raw_tags"].startswith('{"tags"')


def test_a_turn_that_could_not_be_tagged_has_an_empty_place_among_the_others(bench: Bench) -> None:
    tagger = ScriptedEngine({"Tags: 写一首诗": "?", "Tags: make it short": '["x"]'})
    (row,) = bench.run(STAGE, {**SHORT, "max_error_share": 0.5}, {"tagger": tagger}, prompts=[TALK])
    assert row["tags"] == ["x"] and row["turn_tags"] == [[], [{"tag": "x", "explanation": ""}]]
    assert bench.summary["partly_tagged"] == 1 and bench.summary["failed_turns"] == 1
    assert bench.summary["yield"] == {"prompts": 1, "tagged": 1}


def test_a_template_with_earlier_shows_what_was_said_before_the_turn_and_no_text_can_leave_its_place(
    bench: Bench,
) -> None:
    seen: list[str] = []

    def answer(prompt: Any, index: int) -> str:
        seen.append(prompt[0]["content"])
        return '["ok"]'

    bench.run(STAGE, {"template": "tag_in_context"}, {"tagger": ScriptedEngine(answer)}, prompts=[TALK, a_prompt(2)])
    first, second, single = seen
    assert "be kind" in first and "好的" not in first
    assert "写一首诗" in second and "好的" in second and second.count("make it short") == 1
    assert "(nothing)" in single
    mark = re.findall(r"=== \w+ ===", second)[0]
    assert f"{mark}\nmake it short\n{mark}" in second and f"{mark} assistant\n好的" in second


def test_the_tagger_is_held_to_json_when_asked(bench: Bench) -> None:
    class Noted(ScriptedEngine):
        def sample(self, prompts: Any, n: int, params: Any, first_index: int = 0) -> Any:
            noted.append(params.json_schema)
            return super().sample(prompts, n, params, first_index)

    noted: list[str | None] = []
    tagger = Noted({"Tags: a": '{"tags": [{"tag": "x", "explanation": "y"}]}'})
    for held in (False, True):
        bench.run(STAGE, {**SHORT, "tags_json": held}, {"tagger": tagger}, prompts=[a_prompt(1, "a")])
    assert noted[0] is None and json.loads(noted[1] or "")["required"] == ["tags"]


def test_tags_in_other_scripts_are_kept_and_counted(bench: Bench) -> None:
    tagger = ScriptedEngine({"Tags: اكتب": '["كتابة", "writing", "résumé"]'})
    (row,) = bench.run(STAGE, SHORT, {"tagger": tagger}, prompts=[a_prompt(1, "اكتب")])
    assert row["tags"] == ["كتابة", "writing", "résumé"] and bench.summary["tags_not_in_latin"] == 1


def test_a_prompt_without_a_user_turn_is_refused(bench: Bench) -> None:
    prompt = {**a_prompt(7), "prompt": [{"role": "system", "content": "x"}]}
    with pytest.raises(DataError, match="p7: it has no user turn"):
        bench.run(STAGE, SHORT, {"tagger": ScriptedEngine({})}, prompts=[prompt])


def test_tag_killed_twice_asks_for_nothing_twice(tmp_path: Path) -> None:
    """Every third first answer can't be read, so that second attempts are among what a kill interrupts."""

    def answer(prompt: Any, index: int) -> str:
        number = len(str(prompt)) % 3
        return "oops" if number == index == 0 else f'["tag {number}"]'

    prompts = [a_prompt(n, "x" * n) for n in range(1, 9)]
    rows = assert_survives_kills(tmp_path, "tag", SHORT, {"prompts": [TALK, *prompts]}, {"tagger": answer})
    assert all(row["tags"] for row in rows)


def test_the_shipped_template_asks_for_json_about_the_instruction(bench: Bench) -> None:
    def answer(prompt: Any, index: int) -> str:
        return '["ok"]' if "Instruction:\nwrite a poem" in prompt[0]["content"] else "no"

    tagger = ScriptedEngine(answer)
    (row,) = bench.run(STAGE, {}, {"tagger": tagger}, prompts=[a_prompt(1, "write a poem")])
    assert row["tags"] == ["ok"]
