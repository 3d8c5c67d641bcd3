from pathlib import Path
from typing import Any

import pytest
import yaml

from align.core.errors import DataError
from align.core.records import COLUMNS, Kind, Row
from data_synthesis.ontology import STAGE

from .conftest import Bench, a_prompt

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
        ({"rename": {"math": "poem"}}, "'poem' is a tag already; use merge"),
        ({"parent": {"math": "poem", "poem": "math"}}, "below itself"),
        ({"parent": {"math": "math"}}, "its own parent"),
        ({"merges": {}}, "merges: unknown section; did you mean 'merge'"),
        ({"merge": {"math": "poem"}}, "merge: a mapping of a tag to a list of tags was expected"),
        ("merge: [", "can't be read"),
        ("- math", "a mapping with merge, rename, drop, parent was expected"),
    ],
)
def test_wrong_refinements_are_errors_that_name_the_place(bench: Bench, edits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        refined(bench, edits)


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


def test_an_embedding_model_without_its_library_is_an_error_that_names_the_extra(bench: Bench) -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"align-toolkit\[embeddings\]"):
            bench.run(STAGE, {**SMALL, "embedding": "phrase-bert"}, prompts=POOL)
    else:
        pytest.skip("sentence-transformers is installed")
