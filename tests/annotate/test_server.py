"""The page's server: it serves whoever has its address, and nobody else; what it says is saved is on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from align.annotate.desk import Desk
from align.annotate.server import PageServer
from align.core.errors import RunError
from reward.annotations import AnnotationFile
from tests.annotate.answers import ids, make_items


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with (
        AnnotationFile(tmp_path / "a.jsonl") as file,
        PageServer(Desk(make_items(tmp_path / "table"), file, "ann")) as server,
    ):
        thread = Thread(target=lambda: server.serve_forever(poll_interval=0.02))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str, sent: Any = None, token: bool = True, **headers: Any
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    given = {"X-Align-Token": server.token} if token else {}
    if sent is not None:
        given["Content-Type"] = "application/json"
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    body = None if sent is None else sent if isinstance(sent, str) else json.dumps(sent)
    connection.request("GET" if sent is None else "POST", path, body, given)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_it_listens_on_this_machine_alone_and_its_address_holds_a_token(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/#{server.token}"
    assert len(server.token) >= 32


def test_the_page_holds_no_data_and_allows_its_own_script_alone(server: PageServer) -> None:
    status, headers, body = ask(server, "/", token=False)
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert b"evil.example" not in body and server.token.encode() not in body
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"X_Align_Token": "guessed"}, 403),
    ],
)
def test_another_name_another_site_and_a_wrong_token_get_nothing(
    server: PageServer, headers: dict[str, str], status: int
) -> None:
    sent = {"prompt_id": "p0", "ranks": dict.fromkeys(ids(0), 1), "good": True}
    for path, body in (("/api/next", None), ("/api/rank", sent)):
        found, _, text = ask(server, path, body, **headers)
        assert found == status
        assert list(json.loads(text)) == ["problem"]
    assert server.desk.file.path.read_text() == ""


def test_without_its_token_the_page_can_be_had_and_the_texts_can_not(server: PageServer) -> None:
    assert ask(server, "/api/next", token=False)[0] == 403
    assert ask(server, "/api/next")[0] == 200


def test_what_is_answered_as_saved_is_in_the_file(server: PageServer) -> None:
    status, _, text = ask(server, "/api/rank", {"prompt_id": "p0", "ranks": dict.fromkeys(ids(0), 1), "good": True})
    assert status == 200
    assert json.loads(text)["progress"]["ranked"] == 1
    (line,) = server.desk.file.path.read_text().splitlines()
    assert json.loads(line)["prompt_id"] == "p0"


@pytest.mark.parametrize(
    ("path", "sent", "headers", "status"),
    [
        ("/api/rank", {"prompt_id": "p0", "ranks": {}, "good": True}, {}, 400),
        ("/api/rank", "no json", {}, 400),
        ("/api/rank", "[1]", {}, 400),
        ("/api/skip", '{"prompt_id": "p0"}', {"Content_Type": "text/plain"}, 400),
        ("/api/skip", "{}", {"Content_Length": "99999999"}, 413),
        ("/api/other", {}, {}, 404),
        ("/etc/passwd", None, {}, 404),
        ("/../page.js", None, {}, 404),
    ],
)
def test_what_it_does_not_understand_changes_nothing(
    server: PageServer, path: str, sent: Any, headers: dict[str, str], status: int
) -> None:
    assert ask(server, path, sent, **headers)[0] == status
    assert server.desk.file.path.read_text() == ""


def test_a_judgement_that_cannot_be_written_is_told_and_not_counted(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(said: object) -> None:
        raise RunError("nothing was saved (No space left on device)")

    monkeypatch.setattr(server.desk.file, "add", full)
    status, _, text = ask(server, "/api/skip", {"prompt_id": "p0"})
    assert (status, json.loads(text)) == (507, {"problem": "nothing was saved (No space left on device)"})


def test_a_port_that_is_taken_is_told(server: PageServer) -> None:
    with pytest.raises(RunError, match=f"port {server.server_port}: .*; name another with port="):
        PageServer(server.desk, server.server_port)
