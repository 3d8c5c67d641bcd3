"""The server of the page on which a person ranks: for this machine alone, and for nobody who lacks its address.

It listens on 127.0.0.1. Texts of models and data are only given to a request that has the token, which stands in the
address behind a `#`, where no other site and no log sees it. A request whose `Host` or `Origin` is another one is
refused, so that no site can reach it under a name of its own (DNS rebinding). The page's policy allows its own script
and style, by their hashes, and nothing else; the script makes text nodes of all texts, and no markup.

A judgement is on the disk before the page is told so (`reward.annotations`).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from align.annotate.desk import Desk, RefusedError
from align.core.errors import RunError

HOST = "127.0.0.1"
LONGEST = 1_000_000
"""Bytes of a request at most."""


class PageServer(ThreadingHTTPServer):
    """Serves the page of a desk.

    Args:
        desk: what is ranked.
        port: 0 takes one that is free.

    Attributes:
        url: the address to open, token and all.

    Raises:
        RunError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.desk = desk
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as problem:
            raise RunError(
                f"port {port}: {problem.strerror}; name another with port=, or none for any free"
            ) from problem
        self.page, self.policy = _page()
        own = [f"{name}:{self.server_port}" for name in (HOST, "localhost")]
        self.hosts = frozenset(own)
        self.origins = frozenset(f"http://{host}" for host in own)
        self.url = f"http://{HOST}:{self.server_port}/#{self.token}"


def _page() -> tuple[bytes, str]:
    """The page, style and script put in, and the policy that allows just these."""
    style, script, page = (
        files("align.annotate").joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html")
    )
    whole = page.replace("/*style*/", style).replace("/*script*/", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return whole.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "align"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path in ("/", "/index.html"):
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
            return
        desk = self.server.desk
        self._answer({"/api/next": desk.state, "/api/skipped": desk.skipped})

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        desk, sent = self.server.desk, self._sent()
        if sent is not None:
            calls = {"/api/rank": lambda: desk.rank(sent), "/api/skip": lambda: desk.skip(sent), "/api/undo": desk.undo}
            self._answer(calls)

    def _is_ours(self) -> bool:
        """Refuses a request that another site may have sent, or that is addressed to another name."""
        origin = self.headers.get("Origin")
        if self.headers.get("Host", "") not in self.server.hosts:
            self._problem(HTTPStatus.MISDIRECTED_REQUEST, "this page is only served as the address that was printed")
        elif origin is not None and origin not in self.server.origins:
            self._problem(HTTPStatus.FORBIDDEN, "another site can't use this page")
        else:
            return True
        return False

    def _sent(self) -> Mapping[str, Any] | None:
        """The JSON object of a request; None after it was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST:
            self._problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request has no length, or is too long")
            return None
        body = self.rfile.read(int(length))
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        if self.headers.get("Content-Type") != "application/json" or not isinstance(found, dict):
            self._problem(HTTPStatus.BAD_REQUEST, "a JSON object was expected")
            return None
        return found

    def _answer(self, calls: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
        """Answers a call of the page's script, which must have the token."""
        if not hmac.compare_digest(self.headers.get("X-Align-Token", "").encode(), self.server.token.encode()):
            self._problem(HTTPStatus.FORBIDDEN, "the address lacks its token; open the one that the command printed")
        elif self.path not in calls:
            self._problem(HTTPStatus.NOT_FOUND, "there is nothing here")
        else:
            try:
                with self.server.desk.lock:
                    found = calls[self.path]()
            except RefusedError as problem:
                self._problem(HTTPStatus.BAD_REQUEST, str(problem))
            except RunError as problem:
                self._problem(HTTPStatus.INSUFFICIENT_STORAGE, str(problem))
            else:
                self._send(HTTPStatus.OK, json.dumps(found).encode(), "application/json")

    def _problem(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True
        self._send(status, json.dumps({"problem": text}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address that was printed stays the last line."""
