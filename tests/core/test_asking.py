from pathlib import Path

import pytest

from align.core.asking import MalformedError, ask, fill, load_template
from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError

FAILED = Completion("", (), "error", error="overloaded")


def number(text: str) -> int:
    if not text.isdigit():
        raise MalformedError(f"no number: {text}")
    return int(text)


def test_each_attempt_is_a_new_sample_and_answers_come_in_the_order_of_the_questions() -> None:
    engine = ScriptedEngine({"a": "1", "b": ["x", "y", "2"], "c": ["x", FAILED, "y"]}, ahead=3)
    found = list(ask(engine, [(name, name) for name in "abca"], number, SamplingParams(), attempts=3))
    assert [(item, answer.value, answer.attempts) for item, answer in found] == [
        ("a", 1, 1), ("b", 2, 3), ("c", None, 3), ("a", 1, 1),
    ]  # fmt: skip
    assert (found[2][1].text, found[2][1].problem) == ("y", "no number: y")
    assert engine.calls == 4 + 2 + 2  # only the two that could not be read are asked again


def test_a_failed_sample_is_asked_for_again() -> None:
    found = list(ask(ScriptedEngine([FAILED, "7"]), [("a", "a")], number, SamplingParams(), attempts=2))
    assert found[0][1].value == 7
    (only,) = ask(ScriptedEngine([FAILED]), [("a", "a")], number, SamplingParams(), attempts=1)
    assert only[1].value is None and only[1].problem == "not sampled: overloaded"


def test_retries_are_sampled_warm_even_when_the_first_attempt_is_greedy() -> None:
    temperatures: list[float] = []

    class Watched(ScriptedEngine):
        def _complete(self, prompt: Prompt, index: int, params: SamplingParams) -> Completion:
            temperatures.append(params.temperature)
            return super()._complete(prompt, index, params)

    list(ask(Watched(["x"]), [("a", "a")], number, SamplingParams(temperature=0.0), attempts=2))
    list(ask(Watched(["x"]), [("a", "a")], number, SamplingParams(temperature=1.2), attempts=2))
    assert temperatures == [0.0, 0.7, 1.2, 1.2]


def test_a_template_is_a_text_a_file_or_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("File: {instruction}\n")
    assert load_template("Tags of {instruction}:", tmp_path, ["instruction"]) == "Tags of {instruction}:"
    assert load_template(str(tmp_path / "mine.txt"), Path("nowhere"), ["instruction"]) == "File: {instruction}"
    assert load_template("mine", tmp_path, ["instruction"]) == "File: {instruction}"


def test_a_template_that_is_nowhere_or_lacks_a_placeholder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file, and no shipped template \(mine\)"):
        load_template("yours", tmp_path, ["instruction"])
    with pytest.raises(DataError, match=r"lacks \{instruction\}"):
        load_template("Tags: {instrution}", tmp_path, ["instruction"])


def test_braces_in_a_template_or_an_instruction_stay_as_they_are() -> None:
    template = 'JSON like {"tag": 1} for {instruction} by {name}'
    assert (
        fill(template, {"instruction": "print {name}", "name": "me"}) == 'JSON like {"tag": 1} for print {name} by me'
    )
