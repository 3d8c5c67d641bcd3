from typing import Any

import pytest

from align.core.asking import MalformedError
from align.core.engines.base import Completion, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Verdict
from reward.judge import Judge, JudgeConfig, read_score


def settings(**given: Any) -> JudgeConfig:
    return JudgeConfig.model_validate(given)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), (" 7.5\n", 7.5), ('{"score": 8}', 8), ('{"reason": "fine", "score": 10}', 10),
        ('```json\n{"score": 3}\n```', 3), ("```\n4\n```", 4),
    ],
)  # fmt: skip
def test_a_number_or_an_object_with_a_score_is_read(text: str, score: float) -> None:
    assert read_score(text, 1, 10) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good",
        "8/10",
        "Score: 8",
        "0",
        "11",
        "true",
        '{"score": true}',
        '{"score": "8"}',
        '{"mark": 8}',
        "[8]",
        "NaN",
    ],
)
def test_anything_else_is_no_score(text: str) -> None:
    with pytest.raises(MalformedError):
        read_score(text, 1, 10)


def test_a_score_becomes_a_verdict_and_a_reward_between_0_and_1() -> None:
    """On the scale 1 to 10: 10 is (10−1)/9 = 1, 5.5 is 0.5, 1 is 0; 8 passes, 7.9 does not."""
    scores = {"a": "10", "b": "5.5", "c": "1", "d": "8", "e": "7.9"}
    engine = ScriptedEngine({f"Rate {name}": score for name, score in scores.items()})
    judge = Judge(engine, settings(judge_template="Rate {completion}"), seed=0)
    verdicts = dict(judge.judge_many((name, {"completion": name}) for name in scores))
    assert {name: v.verdict for name, v in verdicts.items()} == {
        "a": "passed", "b": "failed", "c": "failed", "d": "passed", "e": "failed"
    }  # fmt: skip
    assert [verdicts[name].reward for name in "abc"] == [1.0, 0.5, 0.0]
    assert verdicts["b"].detail == "judge: 5.5 of 10, 8 passes"


def test_a_judge_that_never_gives_a_score_is_an_error_and_no_guess() -> None:
    judge = Judge(ScriptedEngine(["well", "hm", "9"]), settings(judge_attempts=2), seed=0)
    ((_, verdict),) = judge.judge_many([(None, {"instruction": "i", "completion": "c"})])
    assert verdict == Verdict.error("the judge gave no score in 2 attempts: neither a number nor a JSON object: 'hm'")


def test_the_shipped_template_shows_the_judge_the_instruction_and_the_completion() -> None:
    seen: list[str] = []

    def answer(prompt: Prompt, index: int) -> str | Completion:
        seen.append(str(prompt))
        return "9"

    judge = Judge(ScriptedEngine(answer), settings(), seed=0)
    ((_, verdict),) = judge.judge_many([(None, {"instruction": "Add {x}.", "completion": "It is 5."})])
    assert verdict.verdict == "passed"
    assert "Add {x}." in seen[0] and "It is 5." in seen[0] and "{instruction}" not in seen[0]


def test_a_template_without_the_completion_is_refused() -> None:
    with pytest.raises(DataError, match="completion"):
        Judge(ScriptedEngine("9"), settings(judge_template="Rate {instruction}"), seed=0)
