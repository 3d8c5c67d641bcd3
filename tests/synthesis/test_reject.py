import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.engines.base import Completion, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis import pooling
from data_synthesis.distinct import distinct_paths, most_distinct
from data_synthesis.reject import STAGE, RejectConfig, asks
from data_synthesis.sampling import answered

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

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
    assert rows[2]["detail"] == "right, but an equation does not hold"
    assert rows[4]["detail"] == "not sampled: overloaded"
    assert rows[0]["completion"] == [{"role": "assistant", "content": RIGHT}]
    assert (rows[0]["generator"], rows[0]["tags"], rows[5]["finish_reason"]) == ("small", ["a"], "length")
    assert [row["lost"] for row in rows] == [
        None, None, "right, but an equation does not hold", "wrong", "not sampled", "right, but cut off at max_tokens",
    ]  # fmt: skip
    assert bench.summary == {
        "prompts": 1, "samples": 6, "passed": 4, "passed_share": {"math": 0.6667}, "solved_prompts": 1, "kept": 2,
        "kept_per_prompt": 2.0, "truncated": 1, "errors": 1, "skipped": {}, "distinct_paths": {"pooled": 2.0},
        "yield": {"prompts": 1, "sampled": 6, "passed": 4, "sound": 2, "distinct": 2, "kept": 2},
        "lost": {
            "wrong": 1, "not sampled": 1, "right, but an equation does not hold": 1,
            "right, but cut off at max_tokens": 1,
        },
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
    assert distinct_paths(["x", "y", "x"], ["aaaa", "aabb", "bbbb"]) == [0, 1]
    assert distinct_paths(["x", "y", "x", "y"], ["aaaa", "aabb", "cccc", "aabc"]) == [2, 1]


def test_of_more_paths_than_are_kept_the_most_different_are_chosen() -> None:
    """The first is taken. From "aaaa" "aaab" is 1 edit away, "abbb" 3, "cccc" 4: "cccc" is next. Summed over both
    "aaab" is 1 + 4 = 5 away, "abbb" 3 + 4 = 7: "abbb" is the third. Of two that are equally far it is the first.
    """
    texts = ["aaaa", "aaab", "abbb", "cccc"]
    assert most_distinct([0, 1, 2, 3], texts, 2) == [0, 3]
    assert most_distinct([0, 1, 2, 3], texts, 3) == [0, 3, 2]
    assert most_distinct([1, 2], texts, 2) == [1, 2]
    assert most_distinct([2, 0, 3], texts, None) == [2, 0, 3]
    assert most_distinct([0, 1, 2], ["a", "b", "c"], 2) == [0, 1]


def test_keep_caps_the_paths_of_a_prompt(bench: Bench) -> None:
    rows = bench.run(
        STAGE, {"samples": 2, "keep": 1}, {"sampler": ScriptedEngine([RIGHT, RIGHT_TOO])}, prompts=[a_sum(1)]
    )
    assert kept(rows) == [0]
    assert rows[1]["lost"] == "right, but beyond `keep`"


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
    assert [row["judge_score"] for row in rows] == [None, 9.0, 3.0, None]
    assert [row["judge_words"] for row in rows] == [None, ["9"], ["3"], ["who knows"]]
    assert bench.summary["yield"] == {
        "prompts": 1, "sampled": 4, "passed": 3, "sound": 3, "reasonable": 1, "distinct": 1, "kept": 1
    }  # fmt: skip
    assert bench.summary["lost"] == {
        "wrong": 1, "right, but not reasonable to the judge": 1, "right, but its judgement can't be read": 1
    }  # fmt: skip
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


def test_a_prompt_is_given_up_when_a_new_right_path_is_unlikely(bench: Bench) -> None:
    """By hand, with a uniform prior: after m samples without a new path P(q >= 0.5) = 0.5 ** (m + 1), which is below
    0.1 first at m = 3 (0.5 ** 4 = 0.0625). With two samples a round: the hopeless prompt 1 ends after 2 rounds, m = 4.
    Prompt 2 has a path at index 1; m is 2 after index 3, and 4 after index 5: 3 rounds. Prompt 3 has a path at index 0
    and another at index 3, so it counts from there: m is 2 after index 5, 4 after index 7: 4 rounds. Prompt 4 finds
    its third path at index 3 and is solved. Prompt 5's errors say nothing, so it takes all 12.
    """
    said = {
        "sum 1": {}, "sum 2": {1: RIGHT, 2: SAME_PATH}, "sum 3": {0: RIGHT, 1: RIGHT, 3: RIGHT_TOO},
        "sum 4": {0: RIGHT, 1: RIGHT_TOO, 3: "<<1+4=5>>\n#### 5"}, "sum 5": dict.fromkeys(range(12), FAILED),
    }  # fmt: skip

    def answer(prompt: Any, index: int) -> str | Completion:
        return said[prompt[0]["content"]].get(index, f"{WRONG} {index}")

    settings = {
        "samples": 2, "right": 3, "max_samples": 12, "least_rate": 0.5, "doubt": 0.1, "max_error_share": 0.9,
    }  # fmt: skip
    rows = bench.run(STAGE, settings, {"sampler": ScriptedEngine(answer)}, prompts=[a_sum(i) for i in range(1, 6)])
    taken = {number: sum(row["prompt_id"] == f"p{number}" for row in rows) for number in range(1, 6)}
    assert taken == {1: 4, 2: 6, 3: 8, 4: 4, 5: 12}
    assert bench.summary["ended"] == {"given up": 3, "solved": 1, "max_samples": 1}


def test_an_exact_answer_has_one_path_so_that_a_prompt_with_it_is_solved(bench: Bench) -> None:
    settings = {"samples": 2, "right": 3, "max_samples": 8}
    rows = bench.run(STAGE, settings, {"sampler": ScriptedEngine("yes")}, prompts=[a_prompt(1)])
    assert len(rows) == 2 and bench.summary["ended"] == {"solved": 1}


def test_several_samplers_and_temperatures_are_pooled_before_paths_are_told_apart(bench: Bench) -> None:
    """Two engines at two temperatures, two samples of each: 8 rows. At every temperature `small` gives RIGHT and a
    wrong path; `large` gives RIGHT_TOO and SAME_PATH, the path of RIGHT. So `small` has 1 distinct path, `large` 2, and
    2 are there together; 2 of the 6 right samples are kept.
    """
    asked: list[tuple[str, float, int, int]] = []

    class Watched(ScriptedEngine):
        def sample(self, prompts: Any, n: int, params: SamplingParams, first_index: int = 0) -> Any:
            asked.append((self.generator, params.temperature, n, first_index))
            return super().sample(prompts, n, params, first_index)

    engines = {
        "sampler": Watched([RIGHT, WRONG], generator="small", fingerprint="small"),
        "sampler-2": Watched([RIGHT_TOO, SAME_PATH], generator="large", fingerprint="large"),
    }
    row = a_sum(1)
    row["prompt"] = [
        {"role": "system", "content": "用中文回答。"}, {"role": "user", "content": "三加二等于几?"},
        {"role": "assistant", "content": "五。"}, {"role": "user", "content": "请写出步骤。"},
    ]  # fmt: skip
    rows = bench.run(STAGE, {"samples": 2, "temperature": [0.7, 1.0]}, engines, prompts=[row])
    assert asked == [("small", 0.7, 2, 0), ("small", 1.0, 2, 0), ("large", 0.7, 2, 0), ("large", 1.0, 2, 0)]
    assert [(r["generator"], r["temperature"], r["sample_index"]) for r in rows] == [
        ("small", 0.7, 0), ("small", 0.7, 1), ("small", 1.0, 2), ("small", 1.0, 3),
        ("large", 0.7, 4), ("large", 0.7, 5), ("large", 1.0, 6), ("large", 1.0, 7),
    ]  # fmt: skip
    assert all(r["prompt"] == row["prompt"] for r in rows)
    assert bench.summary["distinct_paths"] == {
        "pooled": 2.0, "by_generator": {"small": 1.0, "large": 2.0}, "by_temperature": {"0.7": 2.0, "1.0": 2.0}
    }  # fmt: skip
    assert bench.summary["yield"] == {
        "prompts": 1, "sampled": 8, "passed": 6, "sound": 6, "distinct": 2, "kept": 2
    }  # fmt: skip
    assert len(kept(rows)) == 2


def test_pooled_prompts_keep_their_own_rows_in_every_block_and_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 2, rounds of 1 a source: odd prompts are right at once, even ones never; 3 rounds of 2 sources."""
    monkeypatch.setattr(pooling, "BLOCK", 2)

    def answer(prompt: Any, index: int) -> str:
        return RIGHT if int(prompt[0]["content"].split()[1]) % 2 else f"{WRONG} {index}"

    engines = {
        name: ScriptedEngine(answer, ahead=3, generator=name, fingerprint=name) for name in ("sampler", "sampler-2")
    }
    settings = {"samples": 1, "right": 1, "max_samples": 3}
    rows = bench.run(STAGE, settings, engines, prompts=[a_sum(i) for i in range(1, 6)])
    found = [(row["prompt_id"], row["sample_index"], row["generator"]) for row in rows]
    assert found == [
        (f"p{i}", place, "sampler-2" if place % 2 else "sampler")
        for i in range(1, 6)
        for place in range(2 if i % 2 else 6)
    ]


def test_what_can_not_be_pooled_is_refused(bench: Bench) -> None:
    with pytest.raises(ValidationError, match="same temperature twice"):
        RejectConfig(temperature=[0.7, 0.7])
    with pytest.raises(ValidationError):
        RejectConfig(temperature=[])
    with pytest.raises(ValidationError):
        RejectConfig(temperature=[0.7, 5.5])
    engines = {
        "sampler": ScriptedEngine(RIGHT, fingerprint="one"),
        "sampler-2": ScriptedEngine(RIGHT, fingerprint="one"),
    }
    with pytest.raises(EngineError, match=r"two of the engines .* are the same"):
        bench.run(STAGE, {"samples": 1}, engines, prompts=[a_sum(1)])


def test_the_forecast_counts_every_sample_of_an_engine() -> None:
    asked = asks(RejectConfig(samples=3, temperature=[0.7, 1.0], judge_votes=2, judge_temperature=0.5))
    assert (asked["sampler"].samples, asked["judge"].samples) == (6, 12)
    assert asks(RejectConfig(samples=4, temperature=[0.7, 1.0], right=1, max_samples=8))["sampler"].samples == 16


def test_pooled_adaptive_sampling_survives_kills(tmp_path: Path) -> None:
    def answer(prompt: Any, index: int) -> str:
        return [RIGHT, WRONG, RIGHT_TOO, f"{WRONG} {index}"][(index + len(prompt[0]["content"])) % 4]

    settings = {"samples": 2, "right": 2, "max_samples": 6, "temperature": [0.7, 1.0], "keep": 2}
    answers = {"sampler": answer, "sampler-2": lambda prompt, index: f"{WRONG} {index}", "judge": lambda p, i: "9"}
    rows = assert_survives_kills(tmp_path, "reject", settings, {"prompts": [a_sum(i) for i in range(6)]}, answers)
    assert any(row["kept"] for row in rows)


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
