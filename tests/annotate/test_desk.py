"""What is shown to an annotator, in which order, and what becomes of what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.annotate.desk import Desk, Item, RefusedError, read_items
from align.core.errors import DataError
from reward.annotations import AnnotationFile, read_annotations
from tests.annotate.answers import PROMPTS, ids, make_items, make_table


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return make_items(tmp_path_factory.mktemp("table"))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[AnnotationFile]:
    with AnnotationFile(tmp_path / "a.jsonl") as file:
        yield file


def test_prompts_with_one_completion_only_are_left_out_and_equal_ones_are_shown_once(items: list[Item]) -> None:
    assert [(item.prompt_id, len(item.completions)) for item in items] == [("p0", 4), ("p1", 3), ("p2", 8), ("p4", 2)]


def test_only_the_first_prompts_are_read_where_so_many_are_asked_for(tmp_path: Path) -> None:
    assert [item.prompt_id for item in read_items(str(make_table(tmp_path)), 2)] == ["p0", "p1"]


def test_nothing_shown_tells_what_wrote_it_and_each_annotator_sees_another_order(
    items: list[Item], file: AnnotationFile
) -> None:
    orders = []
    for annotator in ("ann", "bob", "cat"):
        shown = Desk(items, file, annotator).state("p2")
        assert "secret" not in json.dumps(shown)
        orders.append([answer["id"] for answer in shown["item"]["answers"]])
        assert orders[-1] == [a["id"] for a in Desk(items, file, annotator).state("p2")["item"]["answers"]]
        assert sorted(orders[-1]) == sorted(ids(2))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != [a["id"] for a in Desk(items, file, "ann", seed=1).state("p2")["item"]["answers"]]


def test_it_goes_on_at_the_first_prompt_that_nothing_was_said_of(items: list[Item], file: AnnotationFile) -> None:
    desk = Desk(items, file, "ann")
    ranks = dict(zip(ids(0), (9, 9, 2, 5), strict=True))
    after = desk.rank({"prompt_id": "p0", "ranks": ranks, "good": False, "seconds": 30})
    assert after["item"]["prompt_id"] == "p1"
    assert after["progress"] == {"annotator": "ann", "all": 4, "ranked": 1, "skipped": 0, "minutes_left": 1.5}
    assert desk.skip({"prompt_id": "p1"})["item"]["prompt_id"] == "p2"
    said = read_annotations(file.path).standing
    assert list(said["ann", "p0"].ranks.values()) == [3, 3, 1, 2]
    assert said["ann", "p0"].good is False
    assert Desk(items, file, "ann").state()["item"]["prompt_id"] == "p2", "started again"
    assert Desk(items, file, "bob").state()["item"]["prompt_id"] == "p0", "somebody else begins at the start"
    assert desk.skipped()["item"]["prompt_id"] == "p1"


def test_undo_shows_the_last_judgement_as_it_was_and_takes_it_back(items: list[Item], file: AnnotationFile) -> None:
    desk = Desk(items, file, "ann")
    ranks = dict(zip(ids(0), (1, 1, 2, 3), strict=True))
    desk.rank({"prompt_id": "p0", "ranks": ranks, "good": False})
    back = desk.undo()
    assert (back["item"]["prompt_id"], back["item"]["ranks"], back["item"]["good"]) == ("p0", ranks, False)
    assert back["progress"]["ranked"] == 0
    with pytest.raises(RefusedError, match="nothing was judged yet"):
        desk.undo()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt_id": "p9"}, "no such prompt"),
        ({"ranks": {}}, "a rank for every completion"),
        ({"ranks": {"x": 1}}, "a rank for every completion"),
        ({"ranks": dict.fromkeys(ids(0), 0)}, "whole numbers from 1"),
        ({"ranks": dict.fromkeys(ids(0), True)}, "whole numbers from 1"),
        ({"good": "yes"}, "good is true or false"),
    ],
)
def test_what_is_no_ranking_of_the_prompt_is_refused(
    items: list[Item], file: AnnotationFile, change: dict[str, object], problem: str
) -> None:
    sent = {"prompt_id": "p0", "ranks": dict.fromkeys(ids(0), 1), "good": True, **change}
    with pytest.raises(RefusedError, match=problem):
        Desk(items, file, "ann").rank(sent)
    assert file.standing == {}


def test_a_break_counts_for_no_time(items: list[Item], file: AnnotationFile) -> None:
    desk = Desk(items, file, "ann")
    desk.rank({"prompt_id": "p0", "ranks": dict.fromkeys(ids(0), 1), "good": True, "seconds": 7200})
    assert desk.state()["progress"]["minutes_left"] is None


def test_a_table_with_nothing_to_rank_is_refused(file: AnnotationFile) -> None:
    with pytest.raises(DataError, match="no prompt with two different completions"):
        Desk([], file, "ann")
    assert len(PROMPTS) == 5
