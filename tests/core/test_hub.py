"""What lies on the Hugging Face Hub and can't be had is refused within seconds, in plain words."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core import hub
from align.core.errors import DataError, ModelError
from align.core.locate import locate
from align.core.store import ModelRef
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
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(hub, "WITHIN_S", 0.5)
        monkeypatch.chdir(tmp_path)
        hub._unreachable.cache_clear()
        yield silent
        hub._unreachable.cache_clear()


@pytest.mark.parametrize("command", [("chat", "owner/name"), ("export", "owner/name", "out=here"),
                                     ("sft", "model=owner/name", "demonstrations=d.jsonl", "out=here"),
                                     ("score", "reward_model=owner/name", "completions=c.jsonl", "out=here")])  # fmt: skip
def test_a_model_of_the_hub_is_refused_at_once_where_the_hub_cannot_be_reached(
    endpoint: socket.socket, command: tuple[str, ...]
) -> None:
    Path("d.jsonl").write_text('{"prompt": "What is 1 plus 1?", "completion": "2"}\n')
    Path("c.jsonl").write_text('{"prompt": "What is 1 plus 1?", "completion": "2"}\n')
    began = time.monotonic()
    said = refused(*command)
    assert time.monotonic() - began < 15, "it does not try again and again"
    assert "owner/name: it is no folder here and was not downloaded before, and the Hub (http://127.0.0.1:" in said
    assert "can't be reached: " in said and "give a folder" in said and "HF_HUB_OFFLINE=1" in said


def test_a_dataset_of_the_hub_is_refused_at_once_where_the_hub_cannot_be_reached(endpoint: socket.socket) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"owner/rows: it is no folder here .* can't be reached: .*HF_HUB_OFFLINE=1"):
        locate("owner/rows", None, None, None)
    assert time.monotonic() - began < 5


def test_a_hub_that_never_answers_is_not_waited_for(endpoint: socket.socket) -> None:
    """Connections come about and stay without an answer."""
    endpoint.listen()
    assert "no answer within 0.5 s; check the network" in hub.hub_problem("owner/name").replace(
        "timed out", "no answer within 0.5 s"
    )


def test_a_hub_that_answers_anything_is_asked_and_so_is_nobody_for_what_was_downloaded_before(
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
    for name, hint in (("tyni", "did you mean tiny?"), ("thing", "tiny, tiny-writer are shipped"),
                       ("runs/polcy", "did you mean runs/policy?")):  # fmt: skip
        said = refused(command[0], name, *command[1:])
        assert said == (
            f"{name}: no such model folder, and it is no Hub id (owner/name, or owner/name@revision); {hint}\n"
        )


def test_data_without_an_owner_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()
    with pytest.raises(
        DataError, match=r"answer: no such file or folder, and it is no Hub id .*; did you mean answers\?"
    ):
        locate("answer", None, None, None)


def test_ids_of_the_hub_are_told_from_what_is_no_model() -> None:
    assert ModelRef.find("owner/name@v1").revision == "v1"
    with pytest.raises(ModelError, match="no such model folder"):
        ModelRef.find("name")
