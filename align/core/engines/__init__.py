"""Engines sample completions; each backend is one file, imported only when a recipe asks for it."""

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams

__all__ = ["Completion", "Engine", "Prompt", "SamplingParams"]
