"""What online DPO needs of a vLLM server, on a real socket, answered by a real small model: token ids with their
log-probabilities, and other weights read from the folder that it is told.

The names of paths and of what is in a request are those of vLLM's source, see tests/core/engines/test_vllm_server.py.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from align.core.engines.base import SamplingParams
from align.core.engines.transformers_engine import TransformersEngine


class WeightsServer:
    """Serves on loopback within a `with`.

    Args:
        model: the folder that it serves at first.
        dev_mode: whether it can be told to read weights, as under VLLM_SERVER_DEV_MODE=1.
        heeds: whether it then reads them.
        gives_ids: whether its answers hold token ids.

    Attributes:
        read: the folders that it was told to read.
        resets: how often its prefix cache was emptied.
        asked: bodies of the requests for completions.
    """

    def __init__(self, model: str | Path, dev_mode: bool = True, heeds: bool = True, gives_ids: bool = True) -> None:
        self.engine = TransformersEngine(model, device="cpu")
        self.dev_mode, self.heeds, self.gives_ids = dev_mode, heeds, gives_ids
        self.read: list[Path] = []
        self.asked: list[dict[str, Any]] = []
        self.resets = 0
        self._one = threading.Lock()

    def __enter__(self) -> WeightsServer:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                status, answer = owner.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._one:
            if path == "/v1/completions":
                self.asked.append(body)
                return 200, self._completion(body)
            if not self.dev_mode:
                return 404, {"detail": "Not Found"}
            if path == "/collective_rpc" and body["method"] == "reload_weights":
                return self._reload(Path(body["kwargs"]["weights_path"]))
            if path == "/reset_prefix_cache":
                self.resets += 1
                return 200, {"success": True}
            return 404, {"detail": "Not Found"}

    def _reload(self, folder: Path) -> tuple[int, Any]:
        from safetensors.torch import load_file

        self.read.append(folder)
        if not self.heeds:
            return 200, {"results": [None]}
        try:
            weights = load_file(folder / "model.safetensors")
            missing, unexpected = self.engine.model.load_state_dict(weights, strict=False)
        except (OSError, RuntimeError) as problem:
            return 500, {"error": {"message": str(problem)}}
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.engine.model.tie_weights()
        self.engine.refresh()
        return 200, {"results": [None]}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["logprobs"] == 1 and body["return_token_ids"] and body["temperature"] <= 1
        params = SamplingParams(
            max_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], seed=body["seed"],
            stop_token_ids=tuple(body["stop_token_ids"]), logprobs=True,
        )  # fmt: skip
        ((_, _, done),) = self.engine.sample([body["prompt"]], 1, params)
        choice = {"index": 0, "text": done.text, "finish_reason": done.finish_reason}
        choice |= {"logprobs": {"token_logprobs": done.logprobs, "tokens": [str(i) for i in done.token_ids]}}
        if self.gives_ids:
            choice["token_ids"] = list(done.token_ids)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(done.token_ids)}
        return {"choices": [choice], "usage": usage}
