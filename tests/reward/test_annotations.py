"""The file of what people said: it only grows, what it says is kept is kept, and a torn end is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.core.errors import DataError, RunError
from reward.annotations import Annotation, AnnotationFile, completion_id, dense, read_all, read_annotations

RANKED = Annotation("p1", "ann", "ranked", {"a": 1, "b": 2}, good=False, seconds=3.5, at="2024-01-02T03:04:05+00:00")


def test_what_was_added_is_read_back_and_the_last_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    with AnnotationFile(path) as file:
        file.add(RANKED)
        file.add(Annotation("p2", "ann", "skipped"))
        file.add(Annotation("p2", "bob", "ranked", {"a": 1}))
        file.add(Annotation("p2", "ann", "undone"))
    assert read_annotations(path).standing == file.standing == {
        ("ann", "p1"): RANKED, ("bob", "p2"): Annotation("p2", "bob", "ranked", {"a": 1}),
    }  # fmt: skip
    assert len(path.read_text().splitlines()) == 4


def test_a_torn_last_line_is_left_out_told_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(RANKED.line() + RANKED.line()[:30])
    found = read_annotations(path)
    assert list(found.standing) == [("ann", "p1")]
    assert found.torn == RANKED.line()[:30]
    with AnnotationFile(path) as file:
        assert file.torn == RANKED.line()[:30]
        file.add(Annotation("p2", "ann", "skipped"))
    assert read_annotations(path).torn == ""
    assert len(path.read_text().splitlines()) == 2


def test_a_whole_last_line_without_its_newline_counts_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(RANKED.line().rstrip("\n"))
    with AnnotationFile(path) as file:
        file.add(Annotation("p2", "ann", "skipped"))
    assert list(read_annotations(path).standing) == [("ann", "p1"), ("ann", "p2")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("no json", "line 2: is no JSON"),
        ("[1]", "line 2: found list"),
        ('{"prompt_id": "p", "annotator": "", "did": "ranked"}', "prompt_id and annotator are texts; ranks name"),
        ('{"prompt_id": "p", "annotator": "a", "did": "guessed"}', "did is one of ranked, skipped, undone"),
        ('{"prompt_id": "p", "annotator": "a", "did": "ranked", "ranks": {"x": 0}}', "ranks are whole numbers from 1"),
        ('{"prompt_id": "p", "annotator": "a", "did": "ranked", "ranks": {"x": true}}', "ranks are whole numbers"),
        ('{"prompt_id": "p", "annotator": "a", "did": "skipped", "good": 1, "seconds": "x"}', "good is .*; seconds is"),
    ],
)
def test_a_broken_line_within_is_an_error_that_names_it(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{RANKED.line()}{line}\n{RANKED.line()}")
    with pytest.raises(DataError, match=problem):
        read_annotations(path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with AnnotationFile(tmp_path / "a.jsonl"), pytest.raises(RunError, match="another process adds to this file"):
        AnnotationFile(tmp_path / "a.jsonl")
    AnnotationFile(tmp_path / "a.jsonl").close()


def test_a_full_disk_saves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes only a part of the line, as it does when the disk fills up."""
    import reward.annotations as module

    path = tmp_path / "a.jsonl"
    write = module.os.write
    with AnnotationFile(path) as file:
        file.add(RANKED)
        monkeypatch.setattr(module.os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        with pytest.raises(RunError, match="nothing was saved"):
            file.add(Annotation("p2", "ann", "skipped"))
        assert list(file.standing) == [("ann", "p1")]
    assert path.read_text() == RANKED.line()


def test_one_persons_word_in_two_files_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    one.write_text(RANKED.line())
    two.write_text(Annotation("p1", "bob", "skipped").line())
    standing, torn = read_all([one, two])
    assert (len(standing), torn) == (2, {})
    with pytest.raises(DataError, match="ann ranked the prompt p1 in another file too"):
        read_all([one, one])


def test_a_completion_is_known_by_what_it_says_but_for_white_space_at_its_ends() -> None:
    def of(text: str, **more: object) -> str:
        return completion_id([{"role": "assistant", "content": text, **more}])  # type: ignore[typeddict-item]

    assert of("yes") == of(" yes\n")
    assert len({of("yes"), of("Yes"), of("yes", tool_calls=[{"name": "f"}])}) == 3


def test_ranks_without_gaps() -> None:
    assert dense({"a": 9, "b": 2, "c": 5, "d": 5}) == {"a": 3, "b": 1, "c": 2, "d": 2}
