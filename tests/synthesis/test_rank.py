"""Ranking with scripted judges, a made-up reward model and files of annotations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError, RecipeError
from align.core.records import Kind, Row
from align.recipe import load_stage
from data_synthesis.demonstrate import STAGE as DEMONSTRATE
from data_synthesis.pair import STAGE as PAIR
from data_synthesis.rank import STAGE
from data_synthesis.rank_settings import RankConfig
from data_synthesis.ranked import give_ranks, pass_the_best
from data_synthesis.rankers import Group, RewardRanker
from reward.annotations import Annotation, completion_id
from reward.verifiers import Verifiers
from tests.synthesis.conftest import Bench, a_completion, a_prompt
from tests.synthesis.kills import assert_survives_kills

WORTH = {"best": 9, "good": 8, "fair": 5, "poor": 2, "twin": 8}
"""What the scripted judge thinks of completions that begin with these words."""

PAIR_TEMPLATE = "pair\nQ: {instruction}\nA: {completion_a}\nB: {completion_b}"
SCORE_TEMPLATE = "score\nQ: {instruction}\nA: {completion}"
TEMPLATES = {"compare_template": PAIR_TEMPLATE, "judge_template": SCORE_TEMPLATE}


def text(prompt: Prompt) -> str:
    return prompt[-1]["content"]  # type: ignore[index]


def judge_by(worth: Callable[[str], float]) -> ScriptedEngine:
    """A judge that scores by `worth`, and prefers what is worth more."""

    def answer(prompt: Prompt, index: int) -> str:
        asked = text(prompt)
        shown = re.findall(r"^[AB]: (.*)$", asked, re.MULTILINE)
        if asked.startswith("score"):
            return f"Score: {worth(shown[0]):g}"
        a, b = map(worth, shown)
        return f"Winner: {'tie' if a == b else 'A' if a > b else 'B'}"

    return ScriptedEngine(answer, generator="judge", fingerprint="judge")


def fair_judge() -> ScriptedEngine:
    return judge_by(lambda said: WORTH.get(said.split(" ")[0], 1))


def completions(number: int, *texts: str, **more: Any) -> list[Row]:
    return [
        {**a_completion(number, index, said, True, **more), "reward": None, "verdict": None}
        for index, said in enumerate(texts)
    ]


def by_text(rows: Iterable[Row], column: str) -> dict[str, Any]:
    return {row["completion"][0]["content"]: row[column] for row in rows}


def test_completions_are_ranked_by_the_share_of_comparisons_won_and_the_best_passes_if_its_score_does(
    bench: Bench,
) -> None:
    """best beats all three (3/3); good and twin tie and beat poor (1.5/3 each); poor loses all. best scores 9 >= 8."""
    rows = bench.run(
        STAGE, TEMPLATES, {"judge": fair_judge()}, completions=completions(1, "poor", "twin", "best", "good")
    )
    assert by_text(rows, "reward") == {"poor": 0.0, "twin": 0.5, "best": 1.0, "good": 0.5}
    assert by_text(rows, "rank") == {"poor": 4, "twin": 2, "best": 1, "good": 2}
    assert by_text(rows, "verdict") == {"poor": "failed", "twin": "failed", "best": "passed", "good": "failed"}
    assert by_text(rows, "kept") == {"poor": False, "twin": False, "best": True, "good": False}
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3]
    assert bench.summary["yield"] == {
        "prompts": 1, "completions": 4, "ranked": 4, "best": 1, "passed": 1, "kept": 1,
    }  # fmt: skip
    assert bench.summary["lost"] == {"worse than the best": 3}
    assert bench.summary["rankers"]["judge judge"]["comparisons"] == 6


def test_a_best_that_does_not_meet_the_criterion_passes_nothing_for_its_prompt(bench: Bench) -> None:
    rows = bench.run(STAGE, TEMPLATES, {"judge": fair_judge()}, completions=completions(1, "poor", "fair"))
    assert {row["verdict"] for row in rows} == {"failed"}
    assert "the judge gives it 5 of 10, 8 passes" in by_text(rows, "detail")["fair"]
    assert bench.summary["lost"] == {"worse than the best": 1, "the best, but it does not meet the criteria": 1}
    again = bench.run(
        STAGE,
        {**TEMPLATES, "judge_threshold": 5.0},
        {"judge": fair_judge()},
        completions=completions(1, "poor", "fair"),
    )
    assert by_text(again, "verdict") == {"poor": "failed", "fair": "passed"}


def test_demonstrate_takes_the_best_and_pair_takes_it_against_the_worst_by_margin(bench: Bench) -> None:
    """The best (reward 1) against poor (0): margin 1. Prompt 2's best fails, so it gives neither."""
    given = [*completions(1, "good", "best", "poor"), *completions(2, "poor", "fair")]
    ranked = bench.run(STAGE, TEMPLATES, {"judge": fair_judge()}, completions=given)
    (learned,) = bench.run(DEMONSTRATE, {}, completions=ranked)
    assert learned["completion"][0]["content"] == "best"
    (pair,) = bench.run(PAIR, {}, completions=ranked)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["margin"]) == ("best", "poor", 1.0)


def test_a_judge_that_favours_a_place_ties_everything_and_that_is_told(bench: Bench) -> None:
    first = ScriptedEngine(lambda prompt, index: "Winner: A" if text(prompt).startswith("pair") else "Score: 9")
    rows = bench.run(STAGE, TEMPLATES, {"judge": first}, completions=completions(1, "a", "b", "c"))
    assert {row["reward"] for row in rows} == {0.5}
    assert {row["rank"] for row in rows} == {1}
    assert [row["kept"] for row in rows] == [True, False, False], "one of the best is kept, not all"
    assert bench.summary["tied"] == 1
    assert bench.summary["rankers"]["judge scripted"]["first_position_share"] == 1.0
    assert bench.run(PAIR, {"min_margin": 0.1}, completions=[*rows, *_a_clear_pair()])[0]["prompt_id"] == "p9"


def _a_clear_pair() -> list[Row]:
    return [{**a_completion(9, i, said, i == 0), "rank": 1 + i, "score": None, "judgement": None, "kept": i == 0,
             "verdict_before": None, "reward_before": None} for i, said in enumerate("xy")]  # fmt: skip


def test_a_judge_that_goes_in_a_circle_is_counted(bench: Bench) -> None:
    """Rock, paper, scissors: each wins once of two comparisons, so each reward is a half; the triad is circular."""
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}

    def answer(prompt: Prompt, index: int) -> str:
        a, *rest = re.findall(r"^[AB]: (.*)$", text(prompt), re.MULTILINE)
        return f"Winner: {'A' if (a, rest[0]) in beats else 'B'}" if rest else "Score: 9"

    rows = bench.run(
        STAGE, TEMPLATES, {"judge": ScriptedEngine(answer)}, completions=completions(1, "rock", "paper", "scissors")
    )
    assert {row["reward"] for row in rows} == {0.5}
    figures = bench.summary["rankers"]["judge scripted"]
    assert (figures["circular_triads"], figures["triads"]) == (1, 1)


def test_scores_cost_one_question_a_completion_and_rank_by_them(bench: Bench) -> None:
    judge = fair_judge()
    rows = bench.run(
        STAGE, {**TEMPLATES, "judging": "scores"}, {"judge": judge}, completions=completions(1, "poor", "best", "good")
    )
    assert judge.calls == 3, "the best is not scored a second time"
    assert by_text(rows, "reward") == {"poor": 0.0, "best": 1.0, "good": 0.5}
    assert by_text(rows, "score") == pytest.approx({"poor": 1 / 9, "best": 8 / 9, "good": 7 / 9})
    assert by_text(rows, "verdict")["best"] == "passed"


def test_two_judges_are_averaged_and_their_agreement_is_told(bench: Bench) -> None:
    """One judge: best > good > poor. The other: good > best > poor. They agree on two of three pairs.

    Rewards: best (1 + 1/2)/2 = 3/4 and good the same, poor 0. Kappa: each pair counted both ways round, no ties, so
    chance is a half: (2/3 - 1/2) / (1/2) = 1/3.
    """
    other = judge_by(lambda said: {"good": 9, "best": 8}.get(said, 1))
    rows = bench.run(
        STAGE, TEMPLATES, {"judge": fair_judge(), "judge-2": other}, completions=completions(1, "poor", "best", "good")
    )
    assert by_text(rows, "reward") == {"poor": 0.0, "best": 0.75, "good": 0.75}
    found = bench.summary["agreement"]["judge and judge"]
    assert found["between"] == [
        {"rankers": ["judge judge", "judge judge (2)"], "n": 3, "agreed": 0.6667, "kappa": 0.3333}
    ]


def test_what_the_judge_said_stands_in_the_row_once(bench: Bench) -> None:
    rows = bench.run(STAGE, TEMPLATES, {"judge": fair_judge()}, completions=completions(1, "poor", "best"))
    first, best = (json.loads(row["judgement"]) for row in rows)
    assert [said["winner"] for said in first] == ["other"]
    assert first[0]["words"] == [["Winner: B"], ["Winner: A"]]
    assert best[0]["votes"] == [9.0]


def test_an_unreadable_judge_is_an_error_and_never_a_guess(bench: Bench) -> None:
    silent = ScriptedEngine(lambda prompt, index: "Hm.")
    with pytest.raises(EngineError, match=r"rank \(judge scripted\): .* no winner"):
        bench.run(STAGE, TEMPLATES, {"judge": silent}, completions=completions(1, "a", "b"))
    rows = bench.run(
        STAGE, {**TEMPLATES, "max_error_share": 1.0}, {"judge": silent}, completions=completions(1, "a", "b")
    )
    assert {row["verdict"] for row in rows} == {"error"}
    assert {row["reward"] for row in rows} == {None}
    assert bench.summary["lost"] == {"not ranked": 2}
    assert bench.summary["yield"]["kept"] == 0


def test_equal_texts_are_compared_once_and_share_their_rank(bench: Bench) -> None:
    judge = fair_judge()
    rows = bench.run(STAGE, TEMPLATES, {"judge": judge}, completions=completions(1, "best", "poor", " best "))
    assert judge.calls == 2 + 1
    assert [row["rank"] for row in rows] == [1, 2, 1]
    assert [row["kept"] for row in rows] == [True, False, False]


def test_a_completion_that_was_cut_off_is_ranked_and_is_never_the_best(bench: Bench) -> None:
    rows = completions(1, "best", "good", "poor")
    rows[0]["finish_reason"] = "length"
    ranked = bench.run(STAGE, TEMPLATES, {"judge": fair_judge()}, completions=rows)
    assert by_text(ranked, "rank") == {"best": 1, "good": 2, "poor": 3}
    assert by_text(ranked, "verdict") == {"best": "failed", "good": "passed", "poor": "failed"}
    assert bench.summary["lost"] == {"cut off": 1, "worse than the best": 1}


def test_the_verifier_of_the_prompts_task_can_be_the_criterion(bench: Bench) -> None:
    """The task is `exact`, the answer yes; the judge likes the longest."""
    judge = judge_by(lambda said: len(said))
    given = [*completions(1, "yes", "no"), *completions(2, "yes", "never")]
    rows = bench.run(STAGE, {**TEMPLATES, "criteria": ["verifier"]}, {"judge": judge}, completions=given)
    assert [row["verdict"] for row in rows] == ["passed", "failed", "failed", "failed"]
    assert "the verifier: found 'never', expected 'yes'" in rows[3]["detail"]


def test_several_models_and_temperatures_answer_each_prompt(bench: Bench) -> None:
    """Two engines at two temperatures, two samples each: 8 completions of every prompt, in that order."""
    small = ScriptedEngine(lambda prompt, index: f"fair small {index}", generator="small", fingerprint="s")
    large = ScriptedEngine(lambda prompt, index: f"good large {index}", generator="large", fingerprint="l")
    rows = bench.run(
        STAGE, {**TEMPLATES, "judging": "scores"}, {"sampler": small, "sampler-2": large, "judge": fair_judge()},
        prompts=[a_prompt(1), a_prompt(2), {**a_prompt(3), "split": "test"}],
    )  # fmt: skip
    assert len(rows) == 16
    first = rows[:8]
    assert [row["sample_index"] for row in first] == list(range(8))
    assert [row["generator"] for row in first] == ["small"] * 4 + ["large"] * 4
    assert [row["temperature"] for row in first] == [0.7, 0.7, 1.0, 1.0] * 2
    assert [row["completion"][0]["content"][-1] for row in first] == list("01230123"), "an index is used once an engine"
    assert {row["generator"] for row in rows if row["kept"]} == {"large"}
    assert bench.summary["skipped"] == {"split test": 1}
    assert sum(bench.summary["lost"].values()) + bench.summary["yield"]["kept"] == 16


def test_nobody_only_samples(bench: Bench) -> None:
    answers = ScriptedEngine(["a", Completion("", (), "error", error="down")])
    rows = bench.run(STAGE, {"by": "nobody", "temperature": 0.7, "max_error_share": 0.5}, {"sampler": answers},
                     prompts=[a_prompt(1)])  # fmt: skip
    assert [(row["verdict"], row["reward"], row["temperature"]) for row in rows] == [
        (None, None, 0.7),
        ("error", None, 0.7),
    ]
    assert bench.summary["yield"] == {"prompts": 1, "completions": 2, "kept": 1}
    assert bench.summary["lost"] == {"not sampled": 1}


def test_a_conversation_is_shown_to_the_judge_whole(bench: Bench) -> None:
    """System prompt, two turns, Chinese and Arabic; the row keeps the user's own prompt."""
    prompt = [
        {"role": "system", "content": "回答要简短。"}, {"role": "user", "content": "海为什么是蓝的?"},
        {"role": "assistant", "content": "因为光。"}, {"role": "user", "content": "بالعربية من فضلك"},
    ]  # fmt: skip
    seen: list[str] = []

    def answer(asked: Prompt, index: int) -> str:
        seen.append(text(asked))
        return "Winner: tie" if text(asked).startswith("pair") else "Score: 9"

    given = [{**row, "prompt": prompt} for row in completions(1, "لأن الضوء", "光的散射")]
    rows = bench.run(STAGE, TEMPLATES, {"judge": ScriptedEngine(answer)}, completions=given)
    assert all(each["content"] in seen[0] for each in prompt)
    assert rows[0]["prompt"] == prompt


def said(prompt: int, annotator: str, ranks: dict[str, int], good: bool = True) -> Annotation:
    ids = {completion_id([{"role": "assistant", "content": each}]): rank for each, rank in ranks.items()}
    return Annotation(f"p{prompt}", annotator, "ranked", ids, good)


def annotated(path: Path, *lines: Annotation) -> str:
    path.write_text("".join(line.line() for line in lines))
    return str(path)


def test_people_rank_and_say_whether_the_best_is_good_enough(bench: Bench, tmp_path: Path) -> None:
    """Ann: a > b = c, Bob: a = b > c. a won 2 of 2 and 1.5 of 2, b 0.5 and 1.5, c 0.5 and 0: 7/8, 4/8, 1/8.

    Pairs: ab differs (win, tie), ac agrees, bc differs (tie, win): 1 of 3. Both ways round each says 4 wins of 6 and a
    share of ties of 1/3: chance = 2 (1/3)(1/3) + (1/3)(1/3) = 1/3, so kappa is 0.
    """
    file = annotated(
        tmp_path / "a.jsonl", said(1, "ann", {"a": 1, "b": 2, "c": 2}), said(1, "bob", {"a": 1, "b": 1, "c": 2}),
        said(2, "ann", {"a": 1, "b": 2}, good=False),
    )  # fmt: skip
    given = [*completions(1, "a", "b", "c"), *completions(2, "a", "b"), *completions(3, "a", "b")]
    rows = bench.run(STAGE, {"by": "people", "annotations": [file]}, completions=given)
    assert [row["reward"] for row in rows[:3]] == [7 / 8, 4 / 8, 1 / 8]
    assert [(row["prompt_id"], row["verdict"]) for row in rows] == [
        ("p1", "passed"), ("p1", "failed"), ("p1", "failed"), ("p2", "failed"), ("p2", "failed"),
    ]  # fmt: skip
    assert bench.summary["lost"]["of a prompt that no person ranked"] == 2
    assert sum(bench.summary["lost"].values()) + bench.summary["yield"]["kept"] == 7
    people = bench.summary["agreement"]["person and person"]
    assert (people["between"][0]["agreed"], people["kappa"], people["n"]) == (0.3333, 0.0, 3)


def test_people_beside_a_judge_only_say_how_far_it_agrees(bench: Bench, tmp_path: Path) -> None:
    file = annotated(tmp_path / "a.jsonl", said(1, "ann", {"poor": 1, "best": 2}))
    rows = bench.run(
        STAGE, {**TEMPLATES, "also": ["people"], "annotations": [file]}, {"judge": fair_judge()},
        completions=completions(1, "poor", "best"),
    )  # fmt: skip
    assert by_text(rows, "rank") == {"poor": 2, "best": 1}
    assert bench.summary["agreement"]["judge and person"]["kappa"] == -1.0


def test_a_step_without_annotations_says_how_they_are_made(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"align rank --serve completions=.*table1 out=.*none.jsonl"):
        bench.run(
            STAGE, {"by": "people", "annotations": [str(tmp_path / "none.jsonl")]}, completions=completions(1, "a", "b")
        )
    with pytest.raises(DataError, match="align rank --serve"):
        bench.run(STAGE, {"by": "people"}, completions=completions(1, "a", "b"))
    file = annotated(tmp_path / "a.jsonl", said(8, "ann", {"a": 1, "b": 2}))
    with pytest.raises(DataError, match="none of the 1 judgements is of a prompt of table"):
        bench.run(STAGE, {"by": "people", "annotations": [file]}, completions=completions(1, "a", "b"))


@pytest.mark.parametrize(
    ("settings", "engines", "problem"),
    [
        ({}, {"judge": fair_judge()}, "give either prompts, to sample completions of, or completions"),
        ({"by": "people"}, {"sampler": fair_judge()}, "by=nobody"),
        ({}, {"sampler": fair_judge()}, "no engine is given in the role judge"),
        ({"by": "nobody"}, {}, "no engine is given in the role sampler"),
        ({"by": "reward_model"}, {"sampler": fair_judge()}, "no reward_model is given"),
    ],
)
def test_what_is_missing_is_told(bench: Bench, settings: Any, engines: Any, problem: str) -> None:
    inputs = {} if "either" in problem else {"prompts": [a_prompt(1)]}
    with pytest.raises(DataError, match=problem):
        bench.run(STAGE, settings, engines, **inputs)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"also": ["judge"]}, "also names judge, which is `by` already"),
        ({"by": "nobody", "also": ["people"]}, "by=nobody ranks nothing"),
        ({"annotations": ["a.jsonl"]}, "nobody reads them"),
        ({"criteria": ["people"]}, "needs people who rank"),
        ({"temperature": [0.7, 0.7]}, "the same temperature twice"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(problem)):
        STAGE.config(**settings)


def test_rank_killed_twice_asks_for_nothing_twice(tmp_path: Path) -> None:
    words = ["best", "good", "fair", "poor"]

    def sampled(prompt: Prompt, index: int) -> str:
        return f"{words[(index + int(text(prompt)[-1])) % 4]} {index}"

    judge = fair_judge()
    rows = assert_survives_kills(
        tmp_path, "rank", {**TEMPLATES, "samples": 1}, {"prompts": [a_prompt(n) for n in range(4)]},
        {"sampler": sampled, "sampler-2": lambda prompt, index: f"fair {index}", "judge": judge._look_up},
    )  # fmt: skip
    assert len(rows) == 16 and any(row["kept"] for row in rows)


class ByLength:
    """Scores as a reward model does; believes what has at least so many letters."""

    def __init__(self, believes: int) -> None:
        self.believes = believes

    def score_many(self, items: list[Any]) -> list[float]:
        return [float(len(completion[0]["content"])) for _, completion in items]

    def accepts(self, family: str, score: float) -> bool:
        return family == "exact" and score >= self.believes


@pytest.mark.parametrize(("believes", "verdict"), [(4, "passed"), (5, "failed")])
def test_a_reward_model_ranks_by_its_scores_and_its_gate_decides_whether_the_best_is_good_enough(
    believes: int, verdict: str
) -> None:
    """Four letters are the best: 4 > 3 > 2."""
    config = STAGE.config(by="reward_model")
    assert isinstance(config, RankConfig)
    group = Group.of([{**row, "finish_reason": "stop"} for row in completions(1, "two", "four", "no")])
    ranker = RewardRanker(ByLength(believes), "rm")
    ranker.rank([group])
    give_ranks(group, config, [ranker])
    with Verifiers() as verifiers:
        pass_the_best([group], config, [ranker], verifiers)
    assert [(row["rank"], row["reward"], row["score"]) for row in group.rows] == [
        (2, 0.5, 3.0),
        (1, 1.0, 4.0),
        (3, 0.0, 2.0),
    ]
    assert [row["verdict"] for row in group.rows] == ["failed", verdict, "failed"]
    assert ("gate does not believe it" in group.rows[1]["detail"]) == (verdict == "failed")


def test_annotations_may_be_missing_when_a_recipe_is_checked_and_other_files_may_not(bench: Bench) -> None:
    bench.table(completions(1, "a", "b"), Kind.COMPLETIONS)
    given = [f"completions={bench.folder / 'table1'}", "by=people", f"out={bench.folder / 'out'}"]
    load_stage("rank", [*given, "annotations=[later.jsonl]"])
    with pytest.raises(RecipeError, match=r"compare_template: 'missing\.txt': there is no such file"):
        load_stage("rank", [*given, "compare_template=missing.txt"])
