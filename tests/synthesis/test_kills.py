"""The sampling stages that have no test module of their own for it, killed; and the harness itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.core.engines.base import Prompt
from tests.synthesis.conftest import a_prompt
from tests.synthesis.kills import assert_survives_kills


def an_answer(prompt: Prompt, index: int) -> str:
    return "yes" if (index + len(str(prompt))) % 2 else "no"


def test_reject_killed_twice_asks_for_nothing_twice(tmp_path: Path) -> None:
    rows = assert_survives_kills(
        tmp_path, "reject", {"samples": 3}, {"prompts": [a_prompt(n) for n in range(8)]},
        {"sampler": an_answer, "judge": lambda prompt, index: "Score: 9"},
    )  # fmt: skip
    assert len(rows) == 24 and {row["verdict"] for row in rows} == {"passed", "failed"}


def test_the_harness_sees_a_sample_that_is_asked_for_twice(tmp_path: Path) -> None:
    """The scripted answer is another one at each call, so the rows of a run that was broken differ."""
    calls = tmp_path / "calls"

    def changing(prompt: Prompt, index: int) -> str:
        with calls.open("a") as file:
            file.write("x")
        return "yes" if calls.stat().st_size % 2 else "no"

    prompts = [a_prompt(n) for n in range(5)]
    with pytest.raises(AssertionError):
        assert_survives_kills(tmp_path, "reject", {"samples": 1}, {"prompts": prompts}, {"sampler": changing})
