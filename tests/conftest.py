"""For all tests."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

# A suite that was started in the background has SIGINT ignored, and so would the processes that tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What runs keep for each other stays out of the user's own folder, and out of the next suite.
os.environ["ALIGN_CACHE"] = tempfile.mkdtemp(prefix="align-cache-")

LONGEST_FIRST = (
    "test_code_tests", "test_code_programs", "test_pipeline", "test_hostile", "test_synthesis_recipes", "test_docs",
    "test_ray_engine", "test_killed", "test_resuming", "test_floors", "test_math_answers", "test_servers",
    "test_processes", "test_transformers_engine", "test_cli", "test_shipped_recipes", "test_qwen2_data",
)  # fmt: skip
"""Files that take longest, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; within a file nothing moves."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
