"""Engines for tests that stand in for a judge, as a recipe or a command names them: `tests.reward.judges:NAME`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from align.backends import Backend
from align.core.engines.base import Engine, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.stage import StageConfig


class JudgeSettings(StageConfig):
    speed_only: ClassVar[frozenset[str]] = frozenset({"delay_s", "log"})

    kind: str = Field(description="tests.reward.judges:LONGER")
    model: str = Field(description="any text")
    delay_s: float = Field(0.0, ge=0, description="seconds that a judgement takes")
    log: str = Field("", description="a file that gets a line for every judgement that is sampled")


def blocks(prompt: Prompt) -> list[str]:
    """What stands between the marks of a judge's prompt, in order."""
    text = str(prompt[0]["content"])  # type: ignore[index]
    marks = re.findall(r"^=== [0-9a-f]{8} ===$", text, re.MULTILINE)
    return text.split(f"{marks[0]}\n")[1::2]


def build_longer(settings: JudgeSettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    """Scores by words, up to 10; of two answers the longer one wins. Says nothing of use of an answer that says so."""

    def answer(prompt: Prompt, index: int) -> str:
        time.sleep(settings.delay_s)
        texts = blocks(prompt)
        if settings.log:
            with Path(settings.log).open("a") as log:
                log.write(f"{' / '.join(text.strip() for text in texts)} #{index}\n")
        if any("unreadable" in text for text in texts):
            return "I can't say."
        if len(texts) == 3:
            return f"Counted the words.\nScore: {min(10, len(texts[2].split()))}"
        a, b = (len(text.split()) for text in texts[2:])
        return f"Counted the words.\nWinner: {'tie' if a == b else 'A' if a > b else 'B'}"

    return ScriptedEngine(answer, generator="longer", fingerprint="longer")


LONGER = Backend(JudgeSettings, build_longer, local=False)
