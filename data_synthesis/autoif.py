"""AutoIF's numbers, the paper's (arXiv:2406.13542) and those of its released code, as presets of three stages.

`constraints` makes a library of constraints with functions that check them, `constrain` puts them to queries, and
`follow` samples and checks. Where paper and code differ, the stages' defaults are the paper's, and `preset: code`
changes them to what stands in `CODE`; any of the numbers can be set besides.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.core.stage import StageConfig

CODE: dict[str, Any] = {
    "new": 50,
    "min_functions": 3,
    "min_cases": 10,
    "case_kept": "above 0",  # one function that agrees is enough
    "function_kept": "at least 0.8",
    "max_functions": 3,
    "min_characters": 20,
    "max_characters": 300,
    "pass_rate": 0.0,
    "judge_above": True,
}
"""The code's numbers where they are not the paper's, by setting."""


class PresetConfig(StageConfig):
    """A stage of AutoIF: settings that are not given are the preset's."""

    preset: Literal["paper", "code"] = Field(
        "paper", description="whose numbers hold where paper and released code differ (AutoIF, arXiv:2406.13542)"
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") != "code":
            return given
        return {name: value for name, value in CODE.items() if name in cls.model_fields} | given


def _rule(text: Any) -> Any:
    if not isinstance(text, str) or not re.fullmatch(r"(above|at least) (0(\.\d+)?|1(\.0+)?)", text):
        raise ValueError(f'expected "above" or "at least" and a share from 0 to 1, such as "above 0.5"; found {text!r}')
    return text


Rule = Annotated[str, BeforeValidator(_rule)]
"""A share that is enough, in words: the paper says "above 0.5" where the code says "at least 0.8"."""
