"""The real vLLM for the contract tests: where it is installed, with a GPU or as a build for CPUs."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.core.engines.models import byte_tokenizer, tiny_model

if TYPE_CHECKING:
    from align.core.engines import Engine


def vllm_once(folder: Path) -> Engine:
    """One engine for all tests, since it takes long to start; it ends with the process."""
    pytest.importorskip("vllm", reason="vLLM isn't installed")
    return _engine()


@cache
def _engine() -> Engine:
    from align.core.engines.vllm_engine import VllmEngine

    class Kept(VllmEngine):
        def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen2", hidden_size=256).save_pretrained(folder)  # heads of 64, which its kernels know
        byte_tokenizer().save_pretrained(folder)
        engine = Kept(folder, dtype="float32", gpu_memory=0.3, enforce_eager=True, max_in_flight=6, fingerprint="tiny")
    atexit.register(VllmEngine.close, engine)
    return engine
