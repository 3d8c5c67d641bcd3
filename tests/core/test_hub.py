"""What lies on the Hugging Face Hub and can't be had is refused within seconds, in plain words."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core import hub
from align.core.errors import DataError, ModelError
from align.core.locate import locate
from align.core.store import ModelRef
from reward.model import load_reward_model
from tests.e2e.command import refused


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """A Hub where nobody takes a connection, and nothing that was downloaded before; the time is short."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(hub, "WITHIN_S", 0.5)
        monkeypatch.chdir(tmp_path)
        hub._unreachable.cache_clear()
        yield silent
        hub._unreachable.cache_clear()


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The addresses that connections were tried to, by this process's clients of HTTP."""
    tried: list[object] = []
    real = socket.create_connection

    def counted(address: tuple[str, int], *more: object, **named: object) -> socket.socket:
        tried.append(address)
        return real(address, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_connection", counted)
    return tried


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "owner/name"),
        ("export", "owner/name", "out=here"),
        ("sft", "model=owner/name", "demonstrations=d.jsonl", "out=here"),
    ],
)
def test_a_model_of_the_hub_is_refused_after_one_attempt_where_the_hub_cannot_be_reached(
    endpoint: socket.socket, attempts: list[object], command: tuple[str, ...]
) -> None:
    Path("d.jsonl").write_text('{"prompt": "What is 1 plus 1?", "completion": "2"}\n')
    said = refused(*command)
    assert len(attempts) == 1
    assert "owner/name: it is no folder here and was not downloaded before, and the Hub (http://127.0.0.1:" in said
    assert "can't be reached: " in said and "give a folder" in said and "HF_HUB_OFFLINE=1" in said


def test_so_are_a_reward_model_and_a_dataset(endpoint: socket.socket, attempts: list[object]) -> None:
    """The second asks nobody: that the Hub can't be reached is known by then."""
    with pytest.raises(ModelError, match=r"owner/name: it is no folder here .* can't be reached: "):
        load_reward_model("owner/name")
    with pytest.raises(DataError, match=r"owner/rows: it is no folder here .* can't be reached: .*HF_HUB_OFFLINE=1"):
        locate("owner/rows", None, None, None)
    assert len(attempts) == 1


def test_a_hub_that_never_answers_is_not_waited_for(endpoint: socket.socket) -> None:
    """Connections come about and stay without an answer."""
    endpoint.listen()
    began = time.monotonic()
    problem = hub.hub_problem("owner/name")
    assert "timed out" in problem or "no answer within 0.5 s" in problem
    assert time.monotonic() - began < 5


def test_whatever_the_hub_answers_its_client_may_ask(endpoint: socket.socket) -> None:
    endpoint.listen()

    def refuse() -> None:
        connection, _ = endpoint.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    answering = threading.Thread(target=refuse)
    answering.start()
    assert hub.hub_problem("owner/name") == ""
    answering.join()


def test_nobody_is_asked_for_what_is_here_or_where_the_client_is_told_to_stay_offline(
    endpoint: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert hub.hub_problem("owner/name") == "" and hub.hub_problem("owner/other") != ""
    assert hub.hub_problem(str(tmp_path)) == "", "a folder"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.hub_problem("owner/other") == "", "the client answers at once by itself"


@pytest.mark.parametrize("command", [("chat",), ("export", "out=here")])
def test_a_name_that_is_no_folder_and_no_id_is_refused_without_asking_anybody(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_unreachable", lambda endpoint: pytest.fail("the Hub was asked"))
    (tmp_path / "runs" / "policy").mkdir(parents=True)
    for name, hint in (("tinny", "did you mean tiny?"), ("judge", "tiny, tiny-writer are shipped"),
                       ("runs/polcy", "did you mean runs/policy?")):  # fmt: skip
        said = refused(command[0], name, *command[1:])
        assert said == (
            f"{name}: no such model folder, and it is no Hub id (owner/name, or owner/name@revision); {hint}\n"
        )


def test_data_without_an_owner_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()
    with pytest.raises(DataError, match=r"answer: no such .*, and it is no Hub id .*; did you mean answers\?"):
        locate("answer", None, None, None)


def test_ids_of_the_hub_are_told_from_what_is_no_model() -> None:
    assert ModelRef.find("owner/name@v1").revision == "v1"
    with pytest.raises(ModelError, match="no such model folder"):
        ModelRef.find("name")
