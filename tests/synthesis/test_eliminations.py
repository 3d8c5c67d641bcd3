import json
import random

import pytest

from align.tiny.world import MAKERS
from data_synthesis.eliminations import Limits, elimination, same_language

LIMITS = Limits(min_growth=3, max_words=30)
RIVERS = "Name three rivers in France."


def why(evolved: str, original: str = RIVERS, **more: object) -> str | None:
    return elimination(original, evolved, LIMITS, **more)  # type: ignore[arg-type]


def test_an_instruction_that_asks_for_more_passes() -> None:
    assert why("Name three rivers in France and say of each where it rises.") is None


@pytest.mark.parametrize(
    ("evolved", "reason"),
    [
        ("NONE", "says NONE"),
        ('"none."', "says NONE"),
        ("?! …", "only punctuation, or nothing"),
        ("", "only punctuation, or nothing"),
        ("I'm sorry, but I cannot rewrite this instruction for you.", "an apology"),
        ("很遗憾，我无法改写这条指令。", "an apology"),
        ("Make the given prompt longer: name three rivers in France.", "words of the prompt"),
        ("#Rewritten Prompt#: Name three rivers in France and their length.", "words of the prompt"),
        ("Here is the new one: Name three rivers in France and their length.", "words of the prompt"),
        ("name three rivers, in France!", "a copy"),
        ("Name three long rivers in France.", "grows too little"),
        ("Name three rivers in France " + "and more " * 15, "grows too long"),
        ("说出法国的三条河流，并说明每条河流的发源地和长度。", "another language"),
        ("Name three rivers in France. Answer: the Seine, the Loire and the Rhône.", "answers the instruction"),
        ("Sure, three rivers in France are the Seine, the Loire and the Rhône.", "answers the instruction"),
        ("Name three rivers in France. The answer is Seine, Loire, Rhône.", "answers the instruction"),
    ],
)  # fmt: skip
def test_each_rule_eliminates_under_its_name(evolved: str, reason: str) -> None:
    assert why(evolved) == reason


def test_a_rule_is_silent_about_what_the_original_has_itself() -> None:
    original = "Say sorry, the answer is 7, in the words of the given prompt."
    assert why("Say sorry, the answer is 7, in the words of the given prompt, and explain it kindly.", original) is None


def test_words_of_the_writers_own_template_are_a_leak() -> None:
    template = "Rewrite the text so that it asks for rather more than it did before now: {instruction}"
    said = "Name three rivers in France so that it asks for rather more than it did before."
    assert why(said, template=template) == "words of the prompt"
    assert why("Name three rivers in France so that it asks for more.", template=template) is None


def test_a_known_answer_in_the_instruction_is_an_answer() -> None:
    answer = "The Seine, the Loire, the Rhône"
    assert why("Name three rivers in France such as the Seine, the Loire, the Rhône", answer=answer) == (
        "answers the instruction"
    )


@pytest.mark.parametrize(
    ("original", "lost"),
    [
        ("Mend this:\n```python\nprint(1\n```", "a code block"),
        ("Sum up:\n| a | b |\n| 1 | 2 |", "a table"),
        ("Order these:\n- tea\n- milk", "a list"),
        ("Read https://example.org and tell me what it says.", "a link"),
        ("Fill the gap: the sun ____ in the east.", "a gap to be filled"),
    ],
)
def test_what_the_instruction_holds_must_stay(original: str, lost: str) -> None:
    bare = "Do what was asked for here, with care and in good order, and give reasons for all of it please."
    assert why(bare, original) == f"format lost: {lost}"
    assert why(original + " Explain each of your steps with care.", original) is None
    assert why(bare, original, breadth=True) in (None, "grows too long")  # a new instruction has its own form


def test_growth_is_counted_in_words_and_in_characters_of_chinese() -> None:
    """The original has 6 words, Chinese ones a character each: 写春天的诗 is 5, and 3 more are needed."""
    assert why("写春天的诗短些", "写春天的诗") == "grows too little"
    assert why("写春天的诗要短些", "写春天的诗") is None
    assert not LIMITS.full("a " * 27) and LIMITS.full("a " * 28)


def test_in_breadth_an_instruction_is_as_long_as_its_model_and_may_be_about_anything() -> None:
    assert why("Name three lakes in Peru.", breadth=True) is None
    assert why("Lakes.", breadth=True) == "grows too little"
    assert why("Name three lakes in Peru and then say how deep each of them is.", breadth=True) == "grows too long"


def test_languages_are_told_by_script_and_by_words_where_there_are_enough() -> None:
    english = "Write a letter to my neighbour about the noise at night and stay polite."
    assert same_language("Write a poem.", english) and same_language("Schreibe ein Gedicht.", english)  # too short
    assert not same_language(
        english, "Schreibe meinem Nachbarn einen Brief über den Lärm in der Nacht und bleibe höflich."
    )
    assert same_language("写一首诗。", "写一首关于春天的诗，每行七个字。")
    assert not same_language("写一首诗。", "春についての詩を書いてください。")
    assert same_language("اكتب قصيدة", "اكتب قصيدة قصيرة عن الربيع للأطفال")
    assert same_language("1 + 1 = ?", "What is 1 + 1?")


def test_no_rule_speaks_against_an_instruction_of_the_world_that_was_really_made_harder() -> None:
    """200 of the world's edits (one more demand, step or word), all of them valid instructions."""
    from align.tiny.chores.evolve import EDITS, harder

    rng = random.Random(3)
    limits, seen = Limits(1, 60), 0
    while seen < 200:
        item = MAKERS[rng.choice(("math", "code", "format"))](rng, True)
        found = harder(rng, rng.choice(tuple(EDITS)), item)
        if found is not None and len(found.instruction.split()) > len(item.instruction.split()):
            seen += 1
            reason = elimination(item.instruction, found.instruction, limits, answer=json.dumps(item.answer))
            assert reason is None, (reason, item.instruction, found.instruction)
