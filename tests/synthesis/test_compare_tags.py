from __future__ import annotations

import numpy as np
import pytest

from align.core.errors import DataError
from align.core.records import Kind, Row
from data_synthesis import compare_tags
from data_synthesis.compare_tags import STAGE
from tests.synthesis.conftest import Bench, a_prompt


def tagged(*tags: str, **more: str) -> list[Row]:
    """A row for each text: the tags are its words."""
    return [a_prompt(i, tags=text.split(), **more) for i, text in enumerate(tags)]


def test_exact_f1_is_over_all_rows_after_normalisation(bench: Bench):
    """The tagger has 2 + 1 + 0 tags, the reference 2 + 2 + 1; 1 + 1 are the same: precision 2/3, recall 2/5, F1 4/8."""
    rows = bench.run(
        STAGE, {}, prompts=tagged("Math poem", "code", ""), reference=tagged("math verse", "code list", "诗")
    )
    found = bench.summary["exact"]
    assert (found["precision"], found["recall"], found["f1"]) == (66.7, 40.0, 50.0)
    assert found["interval"][0] < 50 < found["interval"][1]
    assert bench.summary["all_tags_right"] == 0.0
    assert bench.summary["tags_per_row"] == {"tagger": 1.0, "reference": 1.67}
    assert [(row["tags"], row["reference_tags"], row["exact"]) for row in rows] == [
        (["math", "poem"], ["math", "verse"], 1), (["code"], ["code", "list"], 1), ([], ["诗"], 0),
    ]  # fmt: skip


def test_tags_match_fuzzily_from_the_cosine_on_and_one_with_one_at_most(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Angles in degrees: a 0, b 30, c 50, d 120. Cosines: a-b 0.87, b-c 0.94, a-c 0.64, d none.

    a, c against b: either matches b, but only one of them may. b, d against a, c: b matches one, d none. a, c against
    b, b' (at 31): both match.
    """
    angles = {"a": 0, "b": 30, "b2": 31, "c": 50, "d": 120}

    def vectors(names: list[str], embedding: str | None, stage: str) -> np.ndarray:
        radians = np.deg2rad([angles[name] for name in names])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)

    monkeypatch.setattr(compare_tags, "vectors_of", vectors)
    rows = bench.run(
        STAGE, {"embedding": "m"}, prompts=tagged("a c", "b d", "a c"), reference=tagged("b", "a c", "b b2")
    )
    assert [row["fuzzy"] for row in rows] == [1, 1, 2]
    assert [row["exact"] for row in rows] == [0, 0, 0]
    assert bench.summary["fuzzy"]["f1"] == 72.7  # 2·4 / (6 + 5)
    assert bench.summary["vectors"] == "m"


def test_character_ngrams_match_spellings_and_say_that_they_are_weaker(bench: Bench):
    bench.run(STAGE, {}, prompts=tagged("multiplications verse"), reference=tagged("multiplication poem"))
    assert bench.summary["exact"]["f1"] == 0.0
    assert bench.summary["fuzzy"]["f1"] == 50.0
    assert "weaker" in bench.summary["vectors"]


def test_rows_that_the_tagger_lacks_are_missed_and_rows_without_reference_do_not_count(bench: Bench):
    reference = [*tagged("a", "b", ""), a_prompt(9, tags=["c"], split="test")]
    rows = bench.run(STAGE, {"splits": ["train"]}, prompts=tagged("a"), reference=reference)
    assert len(rows) == 2 and bench.summary["missing_from_tagger"] == 1
    assert (bench.summary["exact"]["precision"], bench.summary["exact"]["recall"]) == (100.0, 50.0)
    assert bench.summary["yield"] == {"reference": 4, "compared": 2}
    assert bench.summary["lost"] == {"the reference has no tags": 1, "split test": 1}
    other = [a_prompt(77, tags=["a"])]
    with pytest.raises(DataError, match="no tagged instruction of the splits train, dev, test in common"):
        bench.run(STAGE, {}, prompts=other, reference=tagged("a"))


def test_an_ontology_makes_raw_tags_of_both_atomic(bench: Bench):
    rows = [{"tag": "verse", "count": 1, "members": ["poem", "poetry"], "parent": None, "examples": []}]
    bench.run(STAGE, {}, prompts=tagged("poem"), reference=tagged("poetry"), ontology=bench.table(rows, Kind.ONTOLOGY))
    assert bench.summary["exact"]["f1"] == 100.0 == bench.summary["all_tags_right"]
