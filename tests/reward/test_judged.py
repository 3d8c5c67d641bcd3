"""The tasks `judge` and `compare` through the stage `verify`, with an engine that says what it was told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError
from align.core.records import Kind, Row
from align.core.stage import Tools
from align.core.store import Table
from align.core.writer import write_rows
from align.progress import Silent
from reward.judged import DOWN_AFTER, NEEDS_JUDGE, JudgedConfig, judged
from reward.verify import STAGE, VerifyConfig

RUBRIC: Row = {
    "id": 1, "task": "judge", "prompt": "Name a colour.", "completion": "Red.",
    "reference": {"rubric": "Is it a colour?"},
}  # fmt: skip
PAIR: Row = {
    "id": 1, "task": "compare", "prompt": "Name a colour.", "completion": "Red.", "reference": {"other": "Dog."},
}  # fmt: skip
MATH: Row = {"id": 9, "task": "math", "prompt": "1 + 1?", "completion": "#### 2", "reference": {"answer": "2"}}


class Asked:
    """A judge that scores by words in what it is shown, prefers what has "Red" in it, and keeps what it was asked."""

    def __init__(self, **scores: str) -> None:
        self.scores = scores
        self.texts: list[str] = []

    def __call__(self, prompt: Prompt, index: int) -> str:
        text = str(prompt[0]["content"])  # type: ignore[index]
        self.texts.append(text)
        if "Answer A:" in text:
            before, after = text.split("Answer B:")
            red = ("Red" in before.split("Answer A:")[1], "Red" in after)
            return {(True, False): "Winner: A", (False, True): "Winner: B"}.get(red, "Winner: tie")
        return next((f"Score: {score}" for word, score in self.scores.items() if word in text), "hm")


def run(folder: Path, lines: list[Any], judge: Any = None, **settings: Any) -> tuple[list[Row], dict[str, Any]]:
    """The rows as a reader of the result gets them, and the summary."""
    number = next(folder / f"run{n}" for n in count() if not (folder / f"run{n}").exists())
    (number / "work").mkdir(parents=True)
    data = number / "rows.jsonl"
    data.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    engines = {} if judge is None else {"judge": judge if isinstance(judge, ScriptedEngine) else ScriptedEngine(judge)}
    tools = Tools(seed=0, engines=engines, progress=Silent(), work=number / "work", out=number)
    result = STAGE.run(VerifyConfig(data=str(data), **settings), {}, tools)
    assert result.rows is not None
    write_rows(number / "out", result.rows, Kind.COMPLETIONS)
    return list(Table.open(number / "out").rows()), result.summary


def test_rows_are_judged_by_their_own_rubrics_and_scales_beside_rows_that_programs_verify(tmp_path: Path) -> None:
    """Scores 9, 3 and 3: (9−1)/9 = 0.889 of 1 to 10; (3−1)/4 = 0.5 of 1 to 5, where 3 passes; 0.3 of 0 to 10 fails."""
    asked = Asked(Red="9", Green="3")
    lines = [
        MATH,
        RUBRIC,
        {**RUBRIC, "id": 2, "completion": "Green.",
         "reference": {"rubric": "b", "lowest": 1, "highest": 5, "pass_from": 3}},
        {**MATH, "id": 8, "completion": "#### 3"},
        {**RUBRIC, "id": 3, "completion": [{"role": "assistant", "content": "Green."}],
         "reference": json.dumps({"rubric": ["short", "true"], "answer": "Blue", "lowest": 0})},
    ]  # fmt: skip
    rows, summary = run(tmp_path, lines, asked)
    assert [row["id"] for row in rows] == [9, 1, 2, 8, 3]
    assert [row["verdict"] for row in rows] == ["passed", "passed", "passed", "failed", "failed"]
    assert [row["reward"] for row in rows] == [1.0, pytest.approx(8 / 9), 0.5, 0.0, 0.3]
    assert rows[2]["detail"] == "judge: 3 of 5, 3 passes"
    assert [row["judgement"] is None for row in rows] == [True, False, False, True, False]
    assert json.loads(rows[2]["judgement"]) == {
        "votes": [3], "mean": 3, "median": 3, "spread": 0, "unreadable": 0, "words": ["Score: 3"],
        "lowest": 1, "highest": 5, "pass_from": 3,
    }  # fmt: skip
    assert "Is it a colour?" in asked.texts[0] and "from 1 (worst) to 10 (best)" in asked.texts[0]
    assert "from 1 (worst) to 5 (best)" in asked.texts[1] and "(none was given)" in asked.texts[1]
    assert "- short\n- true" in asked.texts[2] and "Blue" in asked.texts[2]
    assert summary["verdicts"] == {"judge": {"passed": 2, "failed": 1}, "math": {"passed": 1, "failed": 1}}
    assert summary["judge"] == {
        "rows": 3, "errors": 0, "votes": 3, "unreadable_votes": 0, "unsampled_votes": 0, "asked_again": 0,
        "mean_reward": round((8 / 9 + 0.5 + 0.3) / 3, 4), "mean_spread": 0,
    }  # fmt: skip


def test_a_scale_without_a_pass_mark_passes_at_the_settings_share_of_it(tmp_path: Path) -> None:
    """8 of 1 to 10 is 7/9 of the way, which on 0 to 9 is 7."""
    lines = [{**RUBRIC, "completion": c, "reference": {"lowest": 0, "highest": 9}} for c in ("Red.", "Green.")]
    rows, _ = run(tmp_path, lines, Asked(Red="7", Green="6.9"))
    assert [row["verdict"] for row in rows] == ["passed", "failed"]


def test_completions_are_compared_in_both_orders_and_labels_with_the_verdicts(tmp_path: Path) -> None:
    asked = Asked()
    lines = [
        {**PAIR, "reference": {"other": "Dog.", "winner": "completion"}},
        {**PAIR, "id": 2, "completion": "Dog.", "reference": {"other": "Red.", "winner": "completion"}},
        {**PAIR, "id": 3, "completion": "Cat.", "reference": {"other": [{"role": "assistant", "content": "Dog."}]}},
        {**PAIR, "id": 4, "completion": "Cat.", "reference": {"other": {"role": "assistant", "content": "Red."}}},
        RUBRIC,
    ]
    rows, summary = run(tmp_path, lines, asked)
    assert [row["verdict"] for row in rows] == ["passed", "failed", "failed", "failed", "error"]
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.5, 0.0, None]
    assert rows[0]["detail"] == "judge: the completion wins, in both orders"
    assert json.loads(rows[1]["judgement"]) == {
        "winner": "other", "orders": ["other", "other"], "votes": [["B"], ["A"]], "unreadable": 0,
        "words": [["Winner: B"], ["Winner: A"]], "expected": "completion", "agrees": False,
    }  # fmt: skip
    assert "agrees" not in json.loads(rows[2]["judgement"])
    assert summary["verdicts"] == {"compare": {"passed": 1, "failed": 3}, "judge": {"error": 1}}
    assert summary["compare"]["votes"] == 8 and summary["compare"]["labels"]["n"] == 2
    assert summary["compare"]["labels"]["right"] == 1 and summary["compare"]["first_position_share"] == 0.5
    assert summary["judge"]["unreadable_votes"] == 1 and summary["judge"]["asked_again"] == 2


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Dog."},
        {"chosen": "\n\nHuman: Name a colour.\n\nAssistant: Red.",
         "rejected": "\n\nHuman: Name a colour.\n\nAssistant: Dog."},
        {"prompt": [{"role": "user", "content": "Name a colour."}],
         "chosen": [{"role": "assistant", "content": "Red."}], "rejected": [{"role": "assistant", "content": "Dog."}],
         "task": "exact", "reference": {"answer": "Red"}},
        {"task": "compare", "prompt": "Name a colour.", "chosen": "Red.", "rejected": "Dog.",
         "reference": '{"rubric": "own"}'},
    ],
)  # fmt: skip
def test_a_preference_is_a_comparison_whose_winner_is_known(record: Row, tmp_path: Path) -> None:
    asked = Asked()
    rows, summary = run(tmp_path, [record], asked)
    assert [(row["task"], row["verdict"], row["reward"]) for row in rows] == [("compare", "passed", 1.0)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Name a colour."}]
    assert rows[0]["completion"][0]["content"] == "Red."
    assert summary["compare"]["labels"]["accuracy"] == 100.0
    assert ("own" in asked.texts[0]) == (record.get("task") == "compare")


def test_several_votes_of_each_order_are_counted(tmp_path: Path) -> None:
    """Of three votes an order A, A, B: the first order says the completion, the second the other: they disagree."""
    settings = {"judge_votes": 3, "judge_temperature": 1.0}
    rows, summary = run(tmp_path, [PAIR], ["Winner: A", "Winner: A", "Winner: B"], **settings)
    assert rows[0]["detail"].startswith("judge: a tie, since the orders disagree")
    assert summary["compare"]["votes"] == 6 and summary["compare"]["first_position_share"] == 1
    rows, _ = run(tmp_path, [RUBRIC], ["4", "5", "hm", "9"], **settings, judge_attempts=2)
    assert rows[0]["detail"] == "judge: 6 of 10, 8 passes; votes 4, 5, 9"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({**RUBRIC, "reference": {"rubrik": "x"}}, "reference.rubrik: unknown; did you mean 'rubric'?"),
        ({**RUBRIC, "reference": {"rubric": 5}}, "reference.rubric"),
        ({**RUBRIC, "reference": {"lowest": 5, "highest": 5}}, "reference.lowest: found 5, expected less than highest"),
        ({**RUBRIC, "reference": {"pass_from": 11}}, "reference.pass_from: found 11, expected 1 to 10"),
        ({**RUBRIC, "reference": {"highest": "many"}}, "reference.highest"),
        ({**RUBRIC, "reference": "rubric"}, "reference: no JSON object"),
        ({**RUBRIC, "prompt": None}, "prompt: missing"),
        ({**RUBRIC, "completion": None}, "completion: missing"),
        ({**PAIR, "reference": {"winner": "completion"}}, "reference.other: missing"),
        ({**PAIR, "reference": {"other": "x", "winner": "B"}}, "reference.winner"),
        ({**PAIR, "reference": {"other": [1]}}, "reference: other holds 1"),
        ({**PAIR, "completion": None, "chosen": "Red.", "rejected": "Dog.", "reference": "{"}, "no JSON object"),
        ({"chosen": "Red.", "rejected": "Dog."}, "there is no prompt beside them"),
        ({**RUBRIC, "task": "compar"}, "did you mean 'compare'?"),
        ("no JSON", "is no JSON"),
    ],
)
def test_a_row_that_cannot_be_judged_is_an_error_costs_nothing_and_stops_no_other(
    bad: Any, named: str, tmp_path: Path
) -> None:
    engine = ScriptedEngine(Asked(Red="9"))
    rows, summary = run(tmp_path, [RUBRIC, bad, PAIR], engine)
    assert [row["verdict"] for row in rows] == ["passed", "error", "passed"]
    assert named in rows[1]["detail"] and rows[1]["reward"] is None
    assert engine.calls == 1 + 2
    assert sum(of_task.get("error", 0) for of_task in summary["verdicts"].values()) == 1


def test_without_a_judge_such_rows_are_errors_that_say_what_to_add(tmp_path: Path) -> None:
    rows, summary = run(tmp_path, [RUBRIC, MATH, PAIR, {"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert [row["verdict"] for row in rows] == ["error", "passed", "error", "error"]
    assert rows[0]["detail"] == rows[2]["detail"] == rows[3]["detail"] == NEEDS_JUDGE
    assert summary["verdicts"] == {"compare": {"error": 2}, "judge": {"error": 1}, "math": {"passed": 1}}


def test_a_row_cannot_make_itself_be_judged_or_bring_its_own_judgement(tmp_path: Path) -> None:
    engine = ScriptedEngine(Asked(Red="9"))
    rows, _ = run(tmp_path, [{**MATH, "detail": NEEDS_JUDGE, "judgement": "passed", "verdict": "passed"}], engine)
    assert (rows[0]["judgement"], engine.calls) == (None, 0)


def test_templates_may_be_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Rate {completion} by {rubric}", "utf-8")
    asked = Asked(Red="9")
    run(tmp_path, [{**RUBRIC, "reference": {}}], asked, judge_template=str(tmp_path / "mine.txt"), rubric="hue")
    assert asked.texts == ["Rate Red. by hue"]


def tools_with(judge: ScriptedEngine) -> Tools:
    return Tools(0, {"judge": judge}, Silent(), Path("nowhere"), Path("nowhere"))


def test_an_engine_may_hold_the_judge_to_a_json_object(tmp_path: Path) -> None:
    """Scores and winners have schemas of their own, also where rows of both tasks are judged together."""
    schemas: list[Any] = []

    class Held(ScriptedEngine):
        def _complete(self, prompt: Prompt, index: int, params: SamplingParams) -> Completion:
            schemas.append(json.loads(params.json_schema or "null"))
            return super()._complete(prompt, index, params)

    words = Held(lambda prompt, _: '{"winner": "A"}' if "Answer B" in str(prompt) else '{"score": 9}')
    rows, _ = run(tmp_path, [PAIR, RUBRIC, PAIR], words, judge_json=True)
    assert [row["reward"] for row in rows] == [0.5, pytest.approx(8 / 9), 0.5]
    names = [list(schema["properties"]) for schema in schemas]
    assert sorted(names) == [["reason", "score"]] + [["reason", "winner"]] * 4
    schemas.clear()
    run(tmp_path, [RUBRIC], words)
    assert schemas == [None]


def rows_to_judge(number: int) -> Iterator[Row]:
    for place in range(number):
        yield {
            **RUBRIC, "id": place, "prompt": [{"role": "user", "content": f"{place}"}],
            "completion": [{"role": "assistant", "content": "Red."}], "detail": NEEDS_JUDGE, "verdict": "error",
        }  # fmt: skip


def test_a_failed_sample_is_an_error_of_its_row_and_an_engine_that_is_down_stops_the_stage() -> None:
    """Every third row fails; then all do, and after the limit of rows one after the other nobody goes on paying."""
    failed = Completion("", (), "error", error="overloaded")

    def third(prompt: Prompt, index: int) -> str | Completion:
        return failed if "0\n===" in str(prompt[0]["content"]) else "Score: 9"  # type: ignore[index]

    summary: dict[str, Any] = {}
    rows = list(judged(rows_to_judge(30), JudgedConfig(), tools_with(ScriptedEngine(third)), summary))
    assert [row["id"] for row in rows if row["verdict"] == "error"] == [0, 10, 20]
    assert rows[0]["detail"] == "the judge gave no score in 3 attempts: not sampled: overloaded"
    assert summary["judge"]["unsampled_votes"] == 3 and summary["judge"]["unreadable_votes"] == 0
    with pytest.raises(EngineError, match=f"gave nothing for {DOWN_AFTER} rows one after the other.*overloaded"):
        list(judged(rows_to_judge(2 * DOWN_AFTER), JudgedConfig(), tools_with(ScriptedEngine([failed])), {}))


def test_rows_are_read_a_bounded_number_ahead() -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for row in rows_to_judge(2000):
            read += 1
            yield row

    given = judged(rows(), JudgedConfig(), tools_with(ScriptedEngine("Score: 9")), {})
    assert next(given)["id"] == 0 and read <= 1024
    assert sum(1 for _ in given) == 1999
