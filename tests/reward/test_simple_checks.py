"""The verifiers of `exact`, `tags` and `principle`."""

from typing import Any

import pytest

from reward.simple_checks import verify_exact, verify_principle, verify_tags

BENIGN = {"kind": "benign", "any": ["to bake bread,", "of course"], "none": ["fool", "Sorry"]}


@pytest.mark.parametrize("completion", ["a, b", "  a, b\n"])
def test_exact_takes_the_answer_with_white_space_around_it(completion: str) -> None:
    assert verify_exact(completion, {"answer": "a, b "}).verdict == "passed"


@pytest.mark.parametrize("completion", ["A, b", "a,b", "a, b.", "", "a, b a, b"])
def test_exact_refuses_any_other_text(completion: str) -> None:
    assert verify_exact(completion, {"answer": "a, b"}).verdict == "failed"


@pytest.mark.parametrize("completion", ['["x", "y"]', ' ["y","x"]\n', '["x", "y", "x"]'])
def test_tags_take_the_same_set_in_any_order(completion: str) -> None:
    assert verify_tags(completion, {"tags": ["x", "y"]}).verdict == "passed"


@pytest.mark.parametrize(
    "completion",
    ['["x"]', '["x", "y", "z"]', '["X", "y"]', '["x", "y"', "x, y", "", '{"x": 1, "y": 2}', '["x", "y", 1]', "[" * 99],
)  # fmt: skip
def test_tags_refuse_another_set_and_what_is_no_json_list_of_texts(completion: str) -> None:
    assert verify_tags(completion, {"tags": ["x", "y"]}).verdict == "failed"


@pytest.mark.parametrize("completion", ["Sure. To Bake Bread, wait.", "Of course!", "to bake bread, of course"])
def test_a_principle_takes_any_of_the_phrases_it_asks_for(completion: str) -> None:
    assert verify_principle(completion, BENIGN).verdict == "passed"


@pytest.mark.parametrize("completion", ["", "To bake, bread", "Of course, you FOOL.", "sorry, of course"])
def test_a_principle_refuses_none_of_them_or_a_barred_one(completion: str) -> None:
    assert verify_principle(completion, BENIGN).verdict == "failed"


@pytest.mark.parametrize(
    ("verify", "reference", "named"),
    [
        (verify_exact, {}, "reference.answer"),
        (verify_exact, {"answer": 1}, "reference.answer"),
        (verify_tags, {}, "reference.tags"),
        (verify_tags, {"tags": "x"}, "reference.tags"),
        (verify_tags, {"tags": [1]}, "reference.tags"),
        (verify_principle, {**BENIGN, "kind": "good"}, "reference.kind"),
        (verify_principle, {**BENIGN, "any": []}, "reference.any"),
        (verify_principle, {**BENIGN, "any": None}, "reference.any"),
        (verify_principle, {**BENIGN, "none": "fool"}, "reference.none"),
    ],
)
def test_a_reference_that_cannot_be_used_is_an_error(verify: Any, reference: dict[str, Any], named: str) -> None:
    verdict = verify("x", reference)
    assert (verdict.verdict, verdict.reward) == ("error", None)
    assert named in verdict.detail
