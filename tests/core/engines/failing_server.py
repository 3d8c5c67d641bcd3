"""A server with OpenAI's interface on a real socket of this machine, that fails when it is told to.

Its model writes words that follow from the prompt and the seed alone, so a sample asked for again is the same. A token
is a word with the space before it; its id is the word's CRC-32.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

WORDS = "red green blue seven nine lamp river stone over under and so on maybe because".split()


@dataclass(frozen=True)
class Fault:
    """How one request goes wrong.

    Attributes:
        status: answered with this status instead of 200.
        headers: sent beside.
        body: sent instead of the answer, as it is.
        after_s: nothing comes for so long.
        drop: the connection is reset before anything is said.
        cut: the connection is closed after half of the answer.
        n: so many samples, whatever was asked for.
        change: changes the answer before it is sent.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    after_s: float = 0.0
    drop: bool = False
    cut: bool = False
    n: int | None = None
    change: Callable[[dict[str, Any]], Any] | None = None


@dataclass
class Seen:
    """One request as the server saw it.

    Attributes:
        attempt: how many requests with this prompt and seed came before.
        samples: how many samples were sent in full.
    """

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at_s: float
    attempt: int
    samples: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Prompt and seed."""
        return json.dumps(self.body.get("messages", self.body.get("prompt"))), int(self.body["seed"])


@dataclass
class FailingServer:
    """Serves on loopback from `open` to `close`, or within a `with`.

    Attributes:
        fault: decides what goes wrong with a request; None is nothing.
        delay_s: every good answer takes so long.
        models: a request for another one is answered with 404.
        key: the only key that is accepted; None accepts all.
        token_ids: whether answers hold token ids where they are asked for.
        counts_tokens: whether answers say how many tokens were used.
        port: to listen at; 0 is any free one.
        seen: all requests for completions, in the order in which they came.
        most_at_once: the most requests that were open at the same time.
    """

    fault: Callable[[Seen], Fault | None] = lambda seen: None
    delay_s: float = 0.0
    models: tuple[str, ...] = ("m",)
    key: str | None = None
    token_ids: bool = True
    counts_tokens: bool = True
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> FailingServer:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        self._lock = threading.Lock()
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._open = 0
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.owner = self
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def sent(self) -> Counter[tuple[str, int]]:
        """How many samples were sent in full, by prompt and seed."""
        count: Counter[tuple[str, int]] = Counter()
        for seen in self.seen:
            count[seen.key] += seen.samples
        return count

    def _note(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Seen:
        seen = Seen(path, body, headers, time.monotonic(), 0)
        with self._lock:
            seen.attempt = self._attempts[seen.key]
            self._attempts[seen.key] += 1
            self.seen.append(seen)
        return seen

    def _count(self, change: int) -> None:
        with self._lock:
            self._open += change
            self.most_at_once = max(self.most_at_once, self._open)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: FailingServer
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        owner = self.server.owner
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in owner.models]})

    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if owner.key is not None and self.headers.get("Authorization") != f"Bearer {owner.key}":
            told = f"Incorrect API key provided: {self.headers.get('Authorization')}"
            return self._send(401, {"error": {"message": told, "code": "invalid_api_key"}})
        if body["model"] not in owner.models:
            return self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        seen = owner._note(self.path.removeprefix("/v1"), body, dict(self.headers))
        owner._count(1)
        try:
            self._answer(seen, owner.fault(seen) or Fault())
        finally:
            owner._count(-1)

    def _answer(self, seen: Seen, fault: Fault) -> None:
        owner = self.server.owner
        time.sleep(fault.after_s or owner.delay_s)
        if fault.drop:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault.status != 200:
            self._send_bytes(fault.status, fault.body or b'{"error": {"message": "told to fail"}}', fault.headers)
            return
        samples = fault.n if fault.n is not None else int(seen.body.get("n", 1))
        answer = respond(seen.body, samples, owner.token_ids, owner.counts_tokens)
        if fault.change:
            answer = fault.change(answer)
        data = fault.body if fault.body is not None else json.dumps(answer).encode()
        if fault.cut:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        seen.samples = 0 if fault.body is not None or fault.change else samples
        self._send_bytes(200, data, fault.headers)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        self._send_bytes(status, json.dumps(answer).encode())

    def _send_bytes(self, status: int, data: bytes, headers: tuple[tuple[str, str], ...] = ()) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in (("Content-Type", "application/json"), *headers):
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


def respond(body: dict[str, Any], samples: int, token_ids: bool, counts_tokens: bool) -> dict[str, Any]:
    """The whole answer to a request."""
    chat = "messages" in body
    choices, used = [], 0
    for index in range(samples):
        text, tokens, reason = write(body, int(body["seed"]) + index)
        used += len(tokens)
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        logprobs = [-(zlib.crc32(token.encode()) % 1000) / 250 for token in tokens]
        if body.get("logprobs") and chat:
            content = [{"token": t, "logprob": p, "top_logprobs": []} for t, p in zip(tokens, logprobs, strict=True)]
            choice["logprobs"] = {"content": content}
        elif body.get("logprobs"):
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": logprobs}
        if token_ids and body.get("return_token_ids"):
            choice["token_ids"] = [zlib.crc32(token.encode()) for token in tokens]
        choices.append(choice)
    answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices}
    if counts_tokens:
        read = len(json.dumps(body.get("messages", body.get("prompt"))).split())
        answer["usage"] = {"prompt_tokens": read, "completion_tokens": used, "total_tokens": read + used}
    return answer


def write(body: dict[str, Any], seed: int) -> tuple[str, list[str], str]:
    """A sample: its text, its tokens and why it ended."""
    if choices := (body.get("structured_outputs") or {}).get("choice"):
        text = random.Random(seed).choice(choices)
        return text, [text], "stop"
    if form := body.get("response_format"):
        schema = form.get("json_schema", {}).get("schema", {})
        values = {
            name: random.Random(seed).choice(rule.get("enum", [seed % 10]))
            for name, rule in schema.get("properties", {}).items()
        }
        text = json.dumps(values)
        return text, [text], "stop"
    draw = random.Random(f"{seed} {body.get('messages', body.get('prompt'))}")
    tokens = [f" {draw.choice(WORDS)}" for _ in range(draw.randint(2, 16))]
    tokens[0] = tokens[0].strip()
    kept = tokens[: int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)]
    reason = "stop" if len(kept) == len(tokens) else "length"
    text = "".join(kept)
    ends = [at for at in (text.find(stop) for stop in body.get("stop", [])) if at >= 0]
    if ends:
        said, reason = 0, "stop"
        while len("".join(kept[:said])) <= min(ends):
            said += 1
        text, kept = text[: min(ends)], kept[:said]
    return text, kept, reason
