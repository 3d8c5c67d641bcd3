from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from align.core.errors import DataError
from align.core.fingerprint import content_fingerprint, fingerprint_of
from align.core.records import Kind


class Settings(BaseModel):
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


@dataclass
class Point:
    x: int
    where: Path


def test_the_order_of_keys_does_not_matter_and_the_order_of_a_list_does():
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of([1, 2]) != fingerprint_of([2, 1])
    assert fingerprint_of({"x", "y"}) == fingerprint_of({"y", "x"})


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, "1"), (None, "null"), (True, 1), ({"a": None}, {}), (0.1, 0.1 + 1e-12)]
)
def test_values_that_differ_have_other_fingerprints(one: object, other: object):
    assert fingerprint_of(one) != fingerprint_of(other)


def test_models_dataclasses_paths_and_enums_count_by_their_values():
    assert fingerprint_of(Settings()) == fingerprint_of({"rate": 0.1, "names": ["a"]})
    assert fingerprint_of(Point(1, Path("a/b"))) == fingerprint_of({"x": 1, "where": "a/b"})
    assert fingerprint_of(Kind.PROMPTS) == fingerprint_of("prompts")


def test_what_has_no_stable_text_is_refused():
    with pytest.raises(TypeError, match="no stable text"):
        fingerprint_of({"f": object()})


def test_the_fingerprint_of_a_file_changes_with_its_bytes_and_not_with_its_place_or_time(tmp_path: Path):
    (tmp_path / "a").mkdir()
    one, other = tmp_path / "a" / "x.txt", tmp_path / "y.txt"
    one.write_text("same")
    other.write_text("same")
    os.utime(other, ns=(1, 1))
    first = content_fingerprint(one)
    assert first == content_fingerprint(other)
    one.write_text("else")
    os.utime(one, ns=(2, 2))
    assert content_fingerprint(one) != first


def test_a_folder_counts_by_names_and_content_but_not_by_its_card_or_checkpoints(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"1")
    before = content_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.bin").write_bytes(b"0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    assert content_fingerprint(tmp_path) == before
    (tmp_path / "model.bin").rename(tmp_path / "other.bin")
    assert content_fingerprint(tmp_path) != before


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.txt"):
        content_fingerprint(tmp_path / "gone.txt")
