import json
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Completion, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.reject import STAGE, distinct_paths
from data_synthesis.sampling import answered

from .conftest import Bench, a_prompt

RIGHT = "He buys 2 more.\n<<3+2=5>>\n#### 5"
RIGHT_TOO = "First 2, then 3.\n<<2+3=5>>\n#### 5"
SAME_PATH = "So he has this many: <<3+2=5>>\n#### 5"
FALSE_EQUATION = "<<3+3=5>>\n#### 5"
WRONG = "<<3-2=1>>\n#### 1"
FAILED = Completion("", (), "error", error="overloaded")
CUT = Completion("<<3+2=5>>\n#### 5", (1, 2), "length")


def a_sum(number: int, **more: Any) -> Row:
    return a_prompt(number, f"sum {number}", task="math", family="math", reference='{"answer": "5"}', **more)


def kept(rows: list[Row]) -> list[int]:
    return [row["sample_index"] for row in rows if row["kept"]]


def test_every_completion_is_given_with_its_verdict_and_distinct_right_paths_are_kept(bench: Bench) -> None:
    engine = ScriptedEngine([RIGHT, RIGHT_TOO, FALSE_EQUATION, WRONG, FAILED, CUT], generator="small")
    rows = bench.run(STAGE, {"samples": 6, "max_error_share": 0.2}, {"sampler": engine}, prompts=[a_sum(1, tags=["a"])])
    assert set(COLUMNS[Kind.COMPLETIONS]) <= set(rows[0])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "passed", "failed", "error", "passed"]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 1.0, 0.0, None, 1.0]
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert kept(rows) == [0, 1]
    assert rows[2]["detail"] == "right answer, but an equation does not hold"
    assert rows[4]["detail"] == "not sampled: overloaded"
    assert rows[0]["completion"] == [{"role": "assistant", "content": RIGHT}]
    assert (rows[0]["generator"], rows[0]["tags"], rows[5]["finish_reason"]) == ("small", ["a"], "length")
    assert bench.summary == {
        "prompts": 1, "samples": 6, "passed": 4, "passed_share": {"math": 0.6667}, "solved_prompts": 1, "kept": 2,
        "kept_per_prompt": 2.0, "truncated": 1, "errors": 1, "skipped": {},
        "yield": {"prompts": 1, "sampled": 6, "passed": 4, "kept": 2},
        "lost": {"right, but not kept": 1, "wrong": 1, "not sampled": 1, "right, but cut off at max_tokens": 1},
    }  # fmt: skip


def test_of_two_paths_with_the_same_equations_one_is_kept(bench: Bench) -> None:
    rows = bench.run(STAGE, {"samples": 2}, {"sampler": ScriptedEngine([RIGHT, SAME_PATH])}, prompts=[a_sum(1)])
    assert len(kept(rows)) == 1
    rows = bench.run(
        STAGE, {"samples": 2, "distinct": "text"}, {"sampler": ScriptedEngine([RIGHT, SAME_PATH])}, prompts=[a_sum(1)]
    )
    assert kept(rows) == [0, 1]


def test_on_a_collision_the_path_farther_from_the_others_kept_stays() -> None:
    """Kept so far: "aaaa" (key x) and "aabb" (key y), 2 edits apart. "bbbb" comes with key x: 2 edits from "aabb" as
    well, so "aaaa" stays. "cccc" comes with key x: 4 edits from "aabb", so it takes the place. "aabc" comes with key y:
    3 edits from "cccc" where "aabb" has 4: "aabb" stays.
    """
    assert distinct_paths(["x", "y", "x"], ["aaaa", "aabb", "bbbb"], None) == [0, 1]
    assert distinct_paths(["x", "y", "x", "y"], ["aaaa", "aabb", "cccc", "aabc"], None) == [2, 1]


def test_keep_caps_the_paths_of_a_prompt(bench: Bench) -> None:
    assert distinct_paths(["x", "y", "z"], ["a", "b", "c"], 2) == [0, 1]
    rows = bench.run(
        STAGE, {"samples": 2, "keep": 1}, {"sampler": ScriptedEngine([RIGHT, RIGHT_TOO])}, prompts=[a_sum(1)]
    )
    assert kept(rows) == [0]


def test_false_equations_can_be_let_pass(bench: Bench) -> None:
    rows = bench.run(
        STAGE, {"samples": 1, "equations": False}, {"sampler": ScriptedEngine(FALSE_EQUATION)}, prompts=[a_sum(1)]
    )
    assert kept(rows) == [0]


def test_other_tasks_tell_paths_apart_by_their_text(bench: Bench) -> None:
    engine = ScriptedEngine(["yes", "yes\n", "no"])
    rows = bench.run(STAGE, {"samples": 3}, {"sampler": engine}, prompts=[a_prompt(1)])
    assert [row["verdict"] for row in rows] == ["passed", "passed", "failed"]
    assert kept(rows) == [0]


def test_a_judge_must_find_a_right_path_reasonable_and_sees_no_others(bench: Bench) -> None:
    """Of three right paths the judge gives 9, 3 and, three times, no score; the wrong one it never sees."""
    asked = []

    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"]
        asked.append(text)
        return "9" if RIGHT in text else "3" if RIGHT_TOO in text else "who knows"

    third = "<<1+4=5>>\n#### 5"
    engines = {"sampler": ScriptedEngine([WRONG, RIGHT, RIGHT_TOO, third]), "judge": ScriptedEngine(judge)}
    rows = bench.run(STAGE, {"samples": 4, "max_error_share": 0.4}, engines, prompts=[a_sum(1)])
    assert kept(rows) == [1]
    assert rows[2]["detail"] == "judge: 3 of 10, 8 passes"
    assert rows[2]["verdict"] == "passed"
    assert len(asked) == 1 + 1 + 3 and not any(WRONG in text for text in asked)
    with pytest.raises(EngineError, match=r"reject \(judge\): 1 of 3"):
        bench.run(STAGE, {"samples": 4}, engines, prompts=[a_sum(1)])


def test_a_judge_sees_all_turns_of_a_dialogue(bench: Bench) -> None:
    asked = []

    def judge(prompt: Any, index: int) -> str:
        asked.append(prompt[0]["content"])
        return "9"

    turns = [("system", "Be brief."), ("user", "3?"), ("assistant", "3."), ("user", "Plus 2?")]
    row = {**a_sum(1), "prompt": [{"role": role, "content": content} for role, content in turns]}
    bench.run(STAGE, {"samples": 1}, {"sampler": ScriptedEngine(RIGHT), "judge": ScriptedEngine(judge)}, prompts=[row])
    places = [asked[0].index(text) for text in (" system\nBe brief.", " user\n3?", " assistant\n3.", " user\nPlus 2?")]
    assert places == sorted(places)


def test_held_out_prompts_and_prompts_without_a_task_are_passed_by(bench: Bench) -> None:
    prompts = [a_sum(1), a_sum(2, split="test"), a_prompt(3, task=None, reference=None), a_sum(4, split="dev")]
    engine = ScriptedEngine(RIGHT)
    rows = bench.run(STAGE, {"samples": 2}, {"sampler": engine}, prompts=prompts)
    assert {row["prompt_id"] for row in rows} == {"p1"}
    assert engine.calls == 2
    assert bench.summary["skipped"] == {"split test": 1, "no task: nothing can verify it": 1, "split dev": 1}
    with pytest.raises(DataError, match=r"no prompt to sample \(split test: 1\)"):
        bench.run(STAGE, {"samples": 2}, {"sampler": engine}, prompts=[a_sum(1, split="test")])


def test_rows_stay_aligned_when_samples_fail_and_come_in_any_order(bench: Bench) -> None:
    """Prompt i asks for the text "i"; every third prompt fails to be sampled; blocks of 7 come back last first."""

    def answer(prompt: Any, index: int) -> str | Completion:
        number = int(prompt[0]["content"])
        return FAILED if number % 3 == 0 else str(number) if index == 0 else "other"

    prompts = [a_prompt(i, str(i), reference=json.dumps({"answer": str(i)})) for i in range(600)]
    engine = ScriptedEngine(answer, ahead=7)
    rows = bench.run(STAGE, {"samples": 2, "max_error_share": 0.5}, {"sampler": engine}, prompts=prompts)
    assert len(rows) == 1200
    for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        expected = ["error", "error"] if number % 3 == 0 else ["passed", "failed"]
        assert [first["verdict"], second["verdict"]] == expected
        assert first["prompt_id"] == second["prompt_id"] == f"p{number}"
        assert (first["sample_index"], second["sample_index"]) == (0, 1)


def test_too_many_errors_stop_the_stage_before_all_is_sampled(bench: Bench) -> None:
    engine = ScriptedEngine([FAILED])
    with pytest.raises(EngineError, match=r"reject: \d+ of \d+ answers are errors.*overloaded"):
        bench.run(STAGE, {"samples": 10}, {"sampler": engine}, prompts=[a_sum(i) for i in range(2000)])
    assert engine.calls <= 210
    engine = ScriptedEngine([RIGHT, FAILED])
    with pytest.raises(EngineError, match="answers are errors"):
        bench.run(STAGE, {"samples": 10}, {"sampler": engine}, prompts=[a_sum(i) for i in range(2000)])
    assert engine.calls < 2000


def test_adaptive_sampling_goes_on_where_right_answers_are_rare_and_gives_up_at_last(bench: Bench) -> None:
    """Two samples a round, one right answer wanted, at most seven samples: prompt 1 is right at index 0 (one round),
    prompt 2 at index 5 (three rounds), prompt 3 never (three rounds and one more sample).
    """
    first_right = {"sum 1": 0, "sum 2": 5, "sum 3": 99}

    def answer(prompt: Any, index: int) -> str:
        return RIGHT if index >= first_right[prompt[0]["content"]] else f"{WRONG} {index}"

    engine = ScriptedEngine(answer, ahead=2)
    settings = {"samples": 2, "right": 1, "max_samples": 7}
    rows = bench.run(STAGE, settings, {"sampler": engine}, prompts=[a_sum(i) for i in (1, 2, 3)])
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        *(("p1", i) for i in range(2)), *(("p2", i) for i in range(6)), *(("p3", i) for i in range(7))
    ]  # fmt: skip
    assert [row["sample_index"] for row in rows if row["verdict"] == "passed"] == [0, 1, 5]
    assert engine.calls == 15
    assert bench.summary["samples"] == 15 and bench.summary["solved_prompts"] == 2


def test_a_run_that_died_goes_on_where_it_was_and_gives_the_same_rows(bench: Bench, tmp_path: Path) -> None:
    def answer(prompt: Any, index: int) -> str:
        return RIGHT if index % 2 else f"{WRONG} {index}"

    def dying(prompt: Any, index: int) -> str:
        if prompt[0]["content"] == "sum 30":
            raise KeyboardInterrupt
        return answer(prompt, index)

    prompts = [a_sum(i) for i in range(50)]
    expected = bench.run(STAGE, {"samples": 4}, {"sampler": ScriptedEngine(answer)}, prompts=prompts)
    first = CachedEngine(ScriptedEngine(dying, fingerprint="same"), tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        bench.run(STAGE, {"samples": 4}, {"sampler": first}, prompts=prompts)
    first.close()
    second = CachedEngine(ScriptedEngine(answer, fingerprint="same"), tmp_path / "cache")
    assert bench.run(STAGE, {"samples": 4}, {"sampler": second}, prompts=prompts) == expected
    assert second.hits == 30 * 4
    second.close()


def test_a_broken_reference_is_an_error_of_its_rows_only(bench: Bench) -> None:
    prompts = [a_prompt(1), a_prompt(2, reference="{"), a_prompt(3)]
    rows = bench.run(STAGE, {"samples": 1, "max_error_share": 0.5}, {"sampler": ScriptedEngine("yes")}, prompts=prompts)
    assert [row["verdict"] for row in rows] == ["passed", "error", "passed"]


@pytest.mark.parametrize("sizes", [[0], [0, 0, 2], [1, 0, 3, 0, 0, 1], [], [2, 0]])
@pytest.mark.parametrize("ahead", [1, 2, 100])
def test_groups_get_the_answers_to_their_own_questions(sizes: list[int], ahead: int) -> None:
    def answer(questions: Any) -> Any:
        block = []
        for question in questions:
            block.append(question)
            if len(block) == ahead:
                yield from (-q for q in block)
                block = []
        yield from (-q for q in block)

    def questions(group: tuple[int, int]) -> list[int]:
        return [group[0] * 10 + i for i in range(group[1])]

    groups = list(enumerate(sizes))
    assert list(answered(groups, questions, answer)) == [(g, [-q for q in questions(g)]) for g in groups]


def test_the_engine_is_asked_as_the_settings_say(bench: Bench) -> None:
    asked: list[SamplingParams] = []

    class Watched(ScriptedEngine):
        def sample(self, prompts: Any, n: int, params: SamplingParams, first_index: int = 0) -> Any:
            asked.append(params)
            return super().sample(prompts, n, params, first_index)

    how = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "max_tokens": 64}
    bench.run(STAGE, {"samples": 1, **how}, {"sampler": Watched([RIGHT])}, prompts=[a_sum(1)])
    assert {name: getattr(asked[0], name) for name in how} == how
