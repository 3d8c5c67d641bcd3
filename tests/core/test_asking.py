from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from align.core.asking import MalformedError, Question, ask, ask_each, fill, load_template, load_templates
from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError

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


def test_a_set_of_templates_is_shipped_or_a_folder_that_lacks_what_it_takes_from_the_default(tmp_path: Path) -> None:
    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    for folder, texts in ((shipped, {"a": "A {x}", "b": "B {y}"}), (shipped / "tiny", {"a": "a {x}"}), (mine, {})):
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text)
    needs = {"a": ["x"], "b": ["y"]}
    assert load_templates("default", shipped, needs) == {"a": "A {x}", "b": "B {y}"}
    assert load_templates("tiny", shipped, needs) == {"a": "a {x}", "b": "B {y}"}
    (mine / "b.txt").write_text("my {y}")
    assert load_templates(str(mine), shipped, needs) == {"a": "A {x}", "b": "my {y}"}
    (mine / "c.txt").write_text("")
    with pytest.raises(DataError, match=r"c\.txt: no template of this stage \(a\.txt, b\.txt\)"):
        load_templates(str(mine), shipped, needs)
    with pytest.raises(DataError, match=r"no shipped set \(default, tiny\); a folder holds a\.txt, b\.txt"):
        load_templates("tinny", shipped, needs)


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


def test_every_vote_that_cannot_be_read_is_asked_for_again_at_the_next_free_index() -> None:
    """Three votes: `a` lacks one after the first round (index 1), so index 3 is sampled for it; `b` lacks two, so 3 and
    4, of which 4 fails and 5 is sampled in its place; `c` lacks none. Answers stand in the places of their votes.
    """
    engine = ScriptedEngine(
        {"a": ["1", "x", "3", "4"], "b": ["x", "y", "3", "4", "z", "6"], "c": ["1", "2", "3"]}, ahead=3
    )
    items = [(name, [Question(name, number)]) for name in "abc"]
    found = dict(ask_each(engine, items, SamplingParams(), attempts=3, votes=3))
    assert {name: [answer.value for answer in votes] for name, (votes,) in found.items()} == {
        "a": [1, 4, 3], "b": [4, 6, 3], "c": [1, 2, 3],
    }  # fmt: skip
    assert [answer.attempts for answer in found["b"][0]] == [2, 3, 1]
    assert engine.calls == 9 + (1 + 2) + 1


def test_a_vote_that_can_never_be_read_stays_an_answer_without_a_value() -> None:
    engine = ScriptedEngine(["1", "x"])
    ((_, (votes,)),) = ask_each(engine, [("a", [Question("a", number)])], SamplingParams(), attempts=1, votes=2)
    assert [(answer.value, answer.problem) for answer in votes] == [(1, ""), (None, "no number: x")]


def test_items_with_no_question_and_with_several_keep_their_order_and_each_question_its_own_reading() -> None:
    engine = ScriptedEngine({"a": "1", "b": "b", "c": "3"}, ahead=8)
    items = [
        (0, []), (1, [Question("a", number), Question("b", str.upper)]), (2, []), (3, [Question("c", number)]), (4, []),
    ]  # fmt: skip
    found = list(ask_each(engine, items, SamplingParams(), attempts=1))
    assert [(item, [votes[0].value for votes in answers]) for item, answers in found] == [
        (0, []), (1, [1, "B"]), (2, []), (3, [3]), (4, []),
    ]  # fmt: skip
    assert list(ask_each(ScriptedEngine([]), [(0, []), (1, [])], SamplingParams(), attempts=1)) == [(0, []), (1, [])]


def test_an_answer_that_was_cut_off_is_malformed_where_it_must_be_whole() -> None:
    """Of "1 0" one token is allowed: "1" is a number, but not the one that was meant."""
    params = SamplingParams(max_tokens=1)
    ((_, (votes,)),) = ask_each(
        ScriptedEngine("1 0"), [(0, [Question("a", number)])], params, attempts=1, votes=1, whole=True
    )
    assert votes[0].value is None and votes[0].problem.startswith("cut off after 1 tokens")
    ((_, (votes,)),) = ask_each(ScriptedEngine("1 0"), [(0, [Question("a", number)])], params, attempts=1)
    assert votes[0].value == 1


def test_the_questions_of_a_batch_are_read_before_the_engine_samples_and_answers_come_as_they_are_ready() -> None:
    """Questions may come from the same engine, which can't do two things at once; nobody waits for a whole batch."""
    at_work: list[bool] = []
    busy = False

    def answer(prompt: Prompt, index: int) -> str:
        nonlocal busy
        busy = True
        return "1"

    def questions() -> Iterator[tuple[int, list[Question[int]]]]:
        for place in range(3):
            at_work.append(busy)
            yield place, [Question(f"q{place}", number)]

    engine = ScriptedEngine(answer)
    assert next(ask_each(engine, questions(), SamplingParams(), attempts=1))[0] == 0
    assert at_work == [False, False, False] and engine.calls == 1


def test_an_engine_that_leaves_a_question_out_is_told() -> None:
    class Forgetful(ScriptedEngine):
        def sample(
            self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
        ) -> Iterator[tuple[int, int, Completion]]:
            yield from list(super().sample(prompts, n, params, first_index))[1:]

    with pytest.raises(EngineError, match="too few completions"):
        list(ask(Forgetful("1"), [("a", "a"), ("b", "b")], number, SamplingParams(), attempts=1))
