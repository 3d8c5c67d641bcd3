"""What is asked of a vLLM server beside samples, compared with vLLM's source: the installed one, or a folder named by
ALIGN_VLLM_SOURCE. How it is asked, and what is made of its answers: tests/train/test_samplers.py."""

from __future__ import annotations

import re

import pytest

from tests.core.engines.test_vllm_engine import _class, _parameters, _source


def test_what_is_asked_of_a_server_is_in_the_source_of_vllm() -> None:
    """The paths, under its development mode; `kwargs` and `timeout` of a call; the method and its argument."""
    root = _source()
    if root is None:
        pytest.skip("vLLM isn't installed, and ALIGN_VLLM_SOURCE names no folder of its source")
    routers = {path: path.read_text() for path in (root / "entrypoints" / "serve").rglob("api_router.py")}
    (rpc,) = [text for text in routers.values() if '@router.post("/collective_rpc")' in text]
    (cache,) = [text for text in routers.values() if '@router.post("/reset_prefix_cache")' in text]
    assert all(f'body.get("{name}"' in rpc for name in ("method", "kwargs", "timeout"))
    assert "Body(" not in cache  # what it takes beyond its path has defaults
    assert any("VLLM_SERVER_DEV_MODE" in path.read_text() for path in (root / "entrypoints").rglob("*.py"))
    runner = _class(root, "v1/worker/gpu_model_runner.py", "GPUModelRunner")
    assert "weights_path" in _parameters(runner, "reload_weights")
    completion = (root / "entrypoints" / "openai" / "completion" / "protocol.py").read_text()
    for name in ("return_token_ids", "token_ids", "logprobs"):
        assert re.search(rf"^    {name}: ", completion, re.MULTILINE), name
