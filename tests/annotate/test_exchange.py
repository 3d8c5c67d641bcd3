"""Argilla's and Label Studio's files: their documented shapes are read, and what is written comes back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.annotate import argilla, label_studio
from align.annotate.commands import run
from align.core.errors import DataError, RecipeError
from reward.annotations import Annotation, AnnotationFile, read_annotations
from tests.annotate.answers import ids, make_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_table(tmp_path / "table")
    return tmp_path


def ranked(number: int, annotator: str, *ranks: int) -> Annotation:
    return Annotation(f"p{number}", annotator, "ranked", dict(zip(ids(number), ranks, strict=True)))


def write(path: Path, *lines: Annotation) -> list[Annotation]:
    with AnnotationFile(path) as file:
        for line in lines:
            file.add(line)
    return list(lines)


def ranks_in(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    return {key: dict(said.ranks) for key, said in read_annotations(path).standing.items()}


def command(folder: Path, option: str, tool: str, *more: str) -> None:
    run([option, tool, f"completions={folder / 'table'}", *more])


@pytest.mark.parametrize(
    ("tool", "question"),
    [("argilla", "rating"), ("label-studio", "ranking"), ("label-studio", "rating")],
)
def test_what_people_said_comes_back_the_same_ties_and_all(folder: Path, tool: str, question: str) -> None:
    write(folder / "a.jsonl", ranked(0, "ann", 1, 2, 2, 3), ranked(0, "bob", 4, 3, 2, 1), ranked(1, "ann", 1, 1, 1))
    command(folder, "--export", tool, f"out={folder / 'out.json'}", f"annotations=[{folder / 'a.jsonl'}]",
            f"question={question}")  # fmt: skip
    users = json.dumps({argilla.user_id(name): name for name in ("ann", "bob")})
    command(folder, "--import", tool, f"source={folder / 'out.json'}", f"out={folder / 'b.jsonl'}",
            f"annotators={users}")  # fmt: skip
    assert ranks_in(folder / "b.jsonl") == ranks_in(folder / "a.jsonl")


def test_an_argilla_ranking_comes_back_the_same(folder: Path) -> None:
    """Only the first prompt, for all records of a ranking have the same number of answers."""
    write(folder / "a.jsonl", ranked(0, "ann", 2, 1, 4, 3))
    command(
        folder, "--export", "argilla", f"out={folder / 'out.json'}", f"annotations=[{folder / 'a.jsonl'}]", "prompts=1"
    )
    (record,) = json.loads((folder / "out.json").read_text())
    (response,) = record["responses"]["ranking"]
    assert response["value"] == ["completion_2", "completion_1", "completion_4", "completion_3"]
    command(folder, "--import", "argilla", f"source={folder / 'out.json'}", f"out={folder / 'b.jsonl'}",
            f"annotators={{{response['user_id']}: ann}}")  # fmt: skip
    assert ranks_in(folder / "b.jsonl") == ranks_in(folder / "a.jsonl")


def test_argilla_rankings_hold_no_ties_and_one_number_of_answers_and_that_is_told(folder: Path) -> None:
    write(folder / "a.jsonl", ranked(0, "ann", 1, 1, 2, 3))
    out = [f"out={folder / 'out.json'}", f"annotations=[{folder / 'a.jsonl'}]"]
    with pytest.raises(DataError, match=r"prompts with 2, 3, 4, 8 completions.*question=rating"):
        command(folder, "--export", "argilla", *out)
    with pytest.raises(DataError, match=r"ann gave completions of the prompt p0 one rank.*question=rating"):
        command(folder, "--export", "argilla", *out, "prompts=1")
    assert not (folder / "out.json").exists()


def records_of_argilla(value: Any, **more: Any) -> list[dict[str, Any]]:
    """As `Record.to_dict` of Argilla 2 writes them."""
    texts = ["Red.", "Blue.", ""]
    fields = {"prompt": "Name a colour.", **{f"completion_{n}": text for n, text in enumerate(texts, start=1)}}
    response = {"value": value, "user_id": "6f1d0f8e-5ef9-4a15-9c1c-0a1b2c3d4e5f", **more}
    return [
        {
            "id": "p1", "fields": fields, "metadata": {}, "suggestions": {"ranking": {"value": [], "score": None,
            "agent": "m"}}, "responses": {"ranking": [response]}, "vectors": {},
            "_server_id": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "ranks"),
    [
        (["completion_2", "completion_1", "completion_3"], [2, 1, 3]),
        ([{"value": "completion_3"}, {"value": "completion_1"}, {"value": "completion_2"}], [2, 3, 1]),
        ([{"value": "completion_1", "rank": 1}, {"value": "completion_2", "rank": 1},
          {"value": "completion_3", "rank": 3}], [1, 1, 2]),
    ],
)  # fmt: skip
def test_argillas_three_ways_of_writing_a_ranking_are_read(folder: Path, value: Any, ranks: list[int]) -> None:
    (folder / "in.json").write_text(json.dumps(records_of_argilla(value)))
    command(folder, "--import", "argilla", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    ((user, prompt), found), *_ = ranks_in(folder / "b.jsonl").items()
    assert (user[:8], prompt) == ("6f1d0f8e", "p1")
    assert [found[each] for each in ids(1)] == ranks


def test_argillas_drafts_do_not_count_and_discarded_records_are_skipped(folder: Path) -> None:
    value = ["completion_2", "completion_1", "completion_3"]
    (folder / "in.json").write_text(json.dumps(records_of_argilla(value, status="draft")))
    with pytest.raises(DataError, match="nobody has ranked or rated anything"):
        command(folder, "--import", "argilla", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    (folder / "in.json").write_text(json.dumps(records_of_argilla(value, status="discarded")))
    command(folder, "--import", "argilla", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    (said,) = read_annotations(folder / "b.jsonl").standing.values()
    assert said.did == "skipped"


def tasks_of_label_studio(value: Any, **more: Any) -> list[dict[str, Any]]:
    """As Label Studio exports them as JSON; the result is that of its page on the tag Ranker."""
    result = {"value": {"ranker": value}, "id": "PpwBv_NMxd", "from_name": "rank", "to_name": "completions",
              "type": "ranker", "origin": "manual"}  # fmt: skip
    annotation = {"id": 1001, "completed_by": 10, "result": [result], "was_cancelled": False, "ground_truth": False,
                  "created_at": "2021-03-09T22:16:08.728353Z", "lead_time": 4.288, "result_count": 1, "task": 1,
                  **more}  # fmt: skip
    return [{"id": 1, "project": 83, "data": {"prompt_id": "p1", "prompt": "Name a colour."},
             "annotations": [annotation], "predictions": []}]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        (lambda a, b, c: {"rank": [b, a, c]}, [2, 1, 3]),
        (lambda a, b, c: [c, b, a], [3, 2, 1]),
        (lambda a, b, c: {"1": [a, c], "2": [], "3": [b], "_": []}, [1, 2, 1]),
        (lambda a, b, c: {"1": [a], "2": [b], "_": [c]}, [1, 2, None]),
    ],
)
def test_label_studios_orders_and_buckets_are_read(folder: Path, order: Any, ranks: list[int | None]) -> None:
    (folder / "in.json").write_text(json.dumps(tasks_of_label_studio(order(*ids(1)))))
    command(folder, "--import", "label-studio", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    (said,) = read_annotations(folder / "b.jsonl").standing.values()
    assert (said.annotator, said.seconds) == ("10", 4.288)
    assert [said.ranks.get(each) for each in ids(1)] == ranks


def test_a_cancelled_annotation_is_skipped_and_a_user_may_be_an_object(folder: Path) -> None:
    user = {"id": 3, "email": "a@b.example", "first_name": "A"}
    (folder / "in.json").write_text(
        json.dumps(tasks_of_label_studio({"rank": ids(1)}, was_cancelled=True, completed_by=user))
    )
    command(folder, "--import", "label-studio", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    (said,) = read_annotations(folder / "b.jsonl").standing.values()
    assert (said.annotator, said.did) == ("a@b.example", "skipped")


def test_the_labelling_configuration_has_a_bucket_for_every_rank(folder: Path) -> None:
    command(folder, "--export", "label-studio", f"out={folder / 'tasks.json'}", "prompts=2")
    written = (folder / "tasks.xml").read_text()
    assert written.count("<Bucket ") == 4 and 'name="4"' in written
    assert '<Ranker name="rank" toName="completions">' in written
    first = json.loads((folder / "tasks.json").read_text())[0]
    assert [item["id"] for item in first["data"]["items"]] == ids(0)
    assert "secret" not in json.dumps(first)
    assert label_studio.config([], "rating").count("<Rating ") == 1


@pytest.mark.parametrize(
    ("tool", "found", "problem"),
    [
        ("argilla", {"a": 1}, "no list of Argilla records"),
        ("argilla", records_of_argilla("best"), "a ranking .* or a rating was expected"),
        ("argilla", records_of_argilla(["completion_9"]), "the field 'completion_9' holds none of the completions"),
        ("label-studio", [{"x": 1}], "no list of Label Studio tasks"),
        ("label-studio", tasks_of_label_studio({"rank": ["zzz"]}), "'zzz' is the id of none"),
        ("label-studio", tasks_of_label_studio({"good": [], "bad": []}), "buckets are named by their rank"),
        ("label-studio", [{"data": {"prompt_id": "other"}}], "none of 1 records is about a prompt"),
    ],
)
def test_what_is_of_another_form_or_about_other_completions_is_refused(
    folder: Path, tool: str, found: Any, problem: str
) -> None:
    (folder / "in.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=problem):
        command(folder, "--import", tool, f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")
    assert not (folder / "b.jsonl").exists()


def test_judgements_are_never_overwritten(folder: Path) -> None:
    (folder / "in.json").write_text(json.dumps(records_of_argilla(["completion_1", "completion_2", "completion_3"])))
    write(folder / "b.jsonl", ranked(1, "ann", 1, 2, 3))
    with pytest.raises(DataError, match="is there already"):
        command(folder, "--import", "argilla", f"source={folder / 'in.json'}", f"out={folder / 'b.jsonl'}")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--server"], "no such option; known are --serve, --export, --import"),
        (["--serve"], "completions: missing: the completions to rank"),
        (["--serve", "completions=x", "out=y", "anotator=z"], "anotator: unknown key; did you mean 'annotator'"),
        (["--serve", "completions=x", "out=y", "port=seven"], "port: expected a whole number"),
        (["--export", "completions=x", "out=y"], "the tool is one of argilla, label-studio, found nothing"),
        (["--export", "prodigy", "completions=x", "out=y"], "found prodigy"),
    ],
)
def test_a_wrong_command_line_is_told_in_plain_words(words: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        run(words)
