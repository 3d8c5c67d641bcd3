"""Other weights for a vLLM server that runs: it reads them from a folder, in place.

What `vllm serve` offers for it from 0.20 to 0.33: `/collective_rpc`, which calls a method of all workers, here
`reload_weights` with `weights_path`, and `/reset_prefix_cache`, since what was computed with the old weights must go.
Both are there only under VLLM_SERVER_DEV_MODE=1. `/v1/load_lora_adapter` takes adapters alone, under other names, and
`/update_weights` wants NCCL or CUDA IPC between server and trainer; neither is used.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

from align.core.engines.openai_settings import OpenAISettings
from align.core.errors import EngineError


def read_weights(settings: OpenAISettings, key: str, folder: Path) -> None:
    """Has every server of an engine read weights, and forget what it computed with the old ones.

    Args:
        settings: where the servers are.
        key: sent as for samples; empty where there is none.
        folder: a checkpoint of the model that is served, under a path that the servers see too.

    Raises:
        EngineError: one doesn't answer, isn't in its development mode, or can't read the folder.
    """
    for address in settings.addresses:
        root = address.rstrip("/").removesuffix("/v1")
        what = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": settings.timeout_s}
        for path, body in (("collective_rpc", what), ("reset_prefix_cache", {})):
            _post(settings, key, f"{root}/{path}", body, folder)


def _post(settings: OpenAISettings, key: str, url: str, body: object, folder: Path) -> None:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=settings.timeout_s) as answer:
            answer.read()
    except urllib.error.HTTPError as problem:
        if problem.code in (404, 405):
            remedy = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, where nobody else reaches it"
        else:
            remedy = (
                f"it must see {folder} under this path (a run on a file system that both share), and serve the "
                "policy's model; its own output says more"
            )
        raise EngineError(f"{settings.model}: {url}: status {problem.code}, no weights were read; {remedy}") from None
    except OSError as problem:
        told = getattr(problem, "reason", None) or problem
        raise EngineError(
            f"{settings.model}: {url}: {told}; see that the server runs, and run the same command again"
        ) from None
