"""Engines for tests on Ray workers; imports no torch, so that a worker is quickly there."""

from __future__ import annotations

import os
import time
from typing import Any

from pydantic import BaseModel

from align.core.engines import Engine, Prompt
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import ModelError


class Settings(BaseModel):
    """Attributes: what: words, slow, dies or missing."""

    model: str = "words"
    what: str = "words"


def make(settings: Any) -> Engine:
    if settings.what == "missing":
        raise ModelError(f"{settings.model}: no such model folder")

    def answer(prompt: Prompt, index: int) -> str:
        if settings.what == "dies" and "poison" in prompt:
            os._exit(9)
        if settings.what == "slow":
            time.sleep(0.05)
        if settings.what == "pid":
            return str(os.getpid())
        return f"answer {index} to {prompt} " + "and so on " * (len(prompt) % 7)

    return ScriptedEngine(answer, ahead=3, fingerprint="words")
