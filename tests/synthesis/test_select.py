from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError, EngineError
from align.core.records import Kind, Row
from align.core.store import Table
from data_synthesis.select import STAGE, SelectConfig, richness
from data_synthesis.selection import complexity_first, quotas

from .conftest import Bench, a_prompt
from .kills import assert_survives_kills


def selected(rows: list[str] | list[set[int]], count: int) -> list[int]:
    flat = [ord(tag) if isinstance(tag, str) else tag for row in rows for tag in row]
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return complexity_first(np.array(flat, dtype=np.int32), ends, np.arange(len(rows)), count)


GOLDEN = ["ab", "abc", "d", "bc", "abd", "", "c", "e"]
"""By hand. By number of tags, ties in the order given: 1 abc, 4 abd, 0 ab, 3 bc, 2 d, 6 c, 7 e, 5 (none).
Pass 1: abc (T = abc), abd (adds d), ab no, bc no, d no, c no, e (adds e). Left: 0 ab, 3 bc, 2 d, 6 c, 5.
Pass 2: ab (T = ab), bc (adds c), d (adds d), c no. Left: 6 c, 5.
Pass 3: c. Left: 5. Pass 4: nothing moves."""


def test_complexity_first_diverse_sampling_takes_what_the_paper_takes() -> None:
    order = [1, 4, 7, 0, 3, 2, 6]
    for count in range(1, 8):
        assert selected(GOLDEN, count) == order[:count]


def test_untagged_instructions_never_qualify() -> None:
    assert selected(GOLDEN, 100) == [1, 4, 7, 0, 3, 2, 6]
    assert selected(["", ""], 1) == []
    assert selected(list[str](), 1) == []


def by_the_papers_loop(tags: list[set[int]], count: int) -> list[int]:
    """InsTag's pseudo-code, line by line."""
    left, chosen = sorted(range(len(tags)), key=lambda i: -len(tags[i])), list[int]()
    while len(chosen) < count and left:
        covered: set[int] = set()
        moved = list[int]()
        for i in left:
            if len(covered | tags[i]) > len(covered):
                moved.append(i)
                chosen.append(i)
                covered |= tags[i]
                if len(chosen) == count:
                    break
        if not moved:
            break
        left = [i for i in left if i not in moved]
    return chosen


def test_the_queues_of_the_tags_select_what_the_papers_loop_selects() -> None:
    """On 300 random pools: few and many tags, untagged instructions, and counts below and above what qualifies."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, of = int(rng.integers(1, 40)), int(rng.integers(1, 15))
        tags = [set(rng.integers(0, of, rng.integers(0, 6)).tolist()) for _ in range(size)]
        count = int(rng.integers(1, size + 5))
        assert selected(tags, count) == by_the_papers_loop(tags, count)


def test_richness_is_distinct_words_over_the_root_of_all_words() -> None:
    """Four words, two of them distinct: 2 / sqrt(4) = 1. Nine distinct words: 9 / 3 = 3."""
    assert richness("Buy, buy! Sell sell.") == 1.0
    assert richness("a b c d e f g h i") == 3.0
    assert richness("...") == 0.0


def pool() -> list[Row]:
    return [a_prompt(i, f"say {i}", tags=list(tags), family="ab"[i % 2]) for i, tags in enumerate(GOLDEN)]


def test_the_selected_rows_come_in_order_with_their_scores(bench: Bench) -> None:
    rows = bench.run(STAGE, {"count": 3}, prompts=pool())
    chosen = sorted(rows, key=lambda row: row["selection_rank"])
    assert {row["prompt_id"] for row in chosen[:2]} == {"p1", "p4"} and chosen[2]["prompt_id"] == "p7"
    assert [row["prompt_id"] for row in rows] == ["p1", "p4", "p7"]
    assert [row["score_diversity"] for row in chosen] == [3, 1, 1]
    assert [row["score_complexity"] for row in chosen] == [3, 3, 1]
    assert rows[0]["score_richness"] == pytest.approx(2 / 2**0.5)
    assert rows[0]["score_completeness"] is None
    summary = bench.summary
    assert (summary["pool"], summary["selected"], summary["untagged"], summary["tags"]) == (8, 3, 1, 5)
    assert (summary["coverage_before"], summary["coverage_after"]) == (1.0, 1.0)
    assert (summary["complexity_before"], summary["complexity_after"]) == (1.625, 2.3333)  # 13 tags of 8, 7 of 3
    assert summary["tags_before"] == {"b": 4, "c": 3, "a": 3, "d": 2, "e": 1}
    assert summary["tags_after"] == {"b": 2, "c": 1, "a": 2, "d": 1, "e": 1}


def test_fewer_instructions_cover_fewer_tags(bench: Bench) -> None:
    bench.run(STAGE, {"count": 1}, prompts=pool())
    assert bench.summary["coverage_after"] == 0.6


def test_the_random_control_needs_no_tags_and_follows_the_seed(bench: Bench) -> None:
    prompts = [a_prompt(i) for i in range(40)]
    draws = [
        tuple(
            row["prompt_id"] for row in bench.run(STAGE, {"count": 5, "method": "random"}, seed=seed, prompts=prompts)
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    with pytest.raises(DataError, match="method=complexity_first needs a column `tags`"):
        bench.run(STAGE, {"count": 5}, prompts=prompts)


def test_complexity_alone_takes_the_most_tags(bench: Bench) -> None:
    rows = bench.run(STAGE, {"count": 4, "method": "complexity"}, prompts=pool())
    assert {row["prompt_id"] for row in rows} == {"p0", "p1", "p3", "p4"}


def test_richness_alone_takes_the_richest(bench: Bench) -> None:
    prompts = [a_prompt(i, text) for i, text in enumerate(("a a a a", "a b c d", "a b c d e f"))]
    rows = bench.run(STAGE, {"count": 2, "method": "richness"}, prompts=prompts)
    assert [row["prompt_id"] for row in rows] == ["p1", "p2"]


def test_tags_go_through_the_ontology(bench: Bench) -> None:
    """`letter` only groups the other two: no instruction has it, so coverage is 2 of the 3 tags that have members."""
    ontology = bench.table(
        [
            {"tag": "letter", "count": 6, "members": [], "parent": None, "examples": []},
            {"tag": "vowel", "count": 3, "members": ["a", "e"], "parent": "letter", "examples": []},
            {"tag": "b", "count": 3, "members": ["b"], "parent": None, "examples": []},
            {"tag": "unseen", "count": 3, "members": ["z"], "parent": None, "examples": []},
        ],
        Kind.ONTOLOGY,
    )
    rows = bench.run(STAGE, {"count": 10}, prompts=pool(), ontology=ontology)
    assert {row["prompt_id"]: row["tags"] for row in rows} == {
        "p0": ["vowel", "b"], "p1": ["vowel", "b"], "p3": ["b"], "p4": ["vowel", "b"], "p7": ["vowel"]
    }  # fmt: skip
    assert bench.summary["tags"] == 3 and bench.summary["coverage_after"] == 0.6667


def test_held_out_instructions_are_never_selected(bench: Bench) -> None:
    prompts = [*pool(), a_prompt(9, tags=list("abcdefgh"), split="test")]
    rows = bench.run(STAGE, {"count": 100}, prompts=prompts)
    assert {row["split"] for row in rows} == {"train"}
    assert bench.summary["skipped"] == {"split test": 1}


def test_instructions_that_the_judge_finds_incomplete_are_not_selected(bench: Bench) -> None:
    """On 1 to 10 the threshold is 6: "say 1" gets 5 and "say 4" gets 6, (6−1)/9 = 0.556; the others 10. Without "say 1"
    the first is abd, and the next that adds a tag is bc.
    """

    def judge(prompt: Any, index: int) -> str:
        text = prompt[0]["content"].splitlines()[5]
        return {"say 1": "5", "say 4": "6"}.get(text, "10")

    rows = bench.run(STAGE, {"count": 2}, {"judge": ScriptedEngine(judge)}, prompts=pool())
    assert [row["prompt_id"] for row in rows] == ["p3", "p4"]
    assert {row["prompt_id"]: row["score_completeness"] for row in rows}["p4"] == pytest.approx(5 / 9)
    assert bench.summary["candidates"] == 7
    with pytest.raises(EngineError, match=r"select \(judge\): 8 of 8"):
        bench.run(STAGE, {"count": 2}, {"judge": ScriptedEngine(["hm"])}, prompts=pool())


def test_nothing_to_select_is_an_error(bench: Bench) -> None:
    with pytest.raises(DataError, match="none of the 1 instructions qualifies"):
        bench.run(STAGE, {"count": 2}, prompts=[a_prompt(1, tags=[])])
    with pytest.raises(DataError, match="no instruction in the splits train"):
        bench.run(STAGE, {"count": 2}, prompts=[a_prompt(1, tags=["a"], split="dev")])


def test_several_tables_of_prompts_are_one_pool(bench: Bench) -> None:
    one = bench.table([a_prompt(1, tags=["a"])], Kind.PROMPTS)
    two = bench.table([a_prompt(2, tags=["b"])], Kind.PROMPTS)
    rows = bench.run(STAGE, {"count": 2}, prompts=Table([*one.files, *two.files], "both", "f"))
    assert len(rows) == 2


def levels(bench: Bench) -> Table:
    """Two top-level tags, m over a and b, c by itself over d."""
    parents = {"m": None, "a": "m", "b": "a", "c": None, "d": "c"}
    rows = [{"tag": tag, "count": 1, "members": [tag], "parent": up, "examples": []} for tag, up in parents.items()]
    return bench.table(rows, Kind.ONTOLOGY)


def test_a_mixture_is_met_by_top_level_tags(bench: Bench) -> None:
    """Half of 4 is 2: of those under m, ab (two tags) and then, in the second pass, the other ab; d and d for the rest.

    An instruction under both counts where most of its tags are: "abd" under m.
    """
    texts = ["ab", "ab", "a", "b", "d", "d", "abd", ""]
    prompts = [a_prompt(i, tags=list(tags)) for i, tags in enumerate(texts)]
    rows = bench.run(STAGE, {"count": 4, "mixture": {"c": 0.5, "m": 0.5}}, prompts=prompts, ontology=levels(bench))
    assert {row["prompt_id"] for row in rows} >= {"p4", "p5", "p6"} and len(rows) == 4
    assert {row["prompt_id"]: row["top_tags"] for row in rows}["p6"] == ["m", "c"]
    found = bench.summary["mixture"]
    assert found["instructions_with_several_top_level_tags"] == 1
    assert found["parts"] == {
        "c": {"share": 0.5, "wanted": 2, "in_pool": 2, "selected": 2, "selected_share": 0.5, "missing": 0},
        "m": {"share": 0.5, "wanted": 2, "in_pool": 5, "selected": 2, "selected_share": 0.5, "missing": 0},
    }
    assert bench.summary["by_top_level_tag"] == {
        "m": {"instructions_before": 5, "instructions_after": 2, "tags": 2, "coverage_after": 1.0},
        "c": {"instructions_before": 3, "instructions_after": 3, "tags": 1, "coverage_after": 1.0},
    }
    assert bench.summary["yield"]["read"] == 8
    assert bench.summary["lost"] == {"untagged": 1, "not selected": 3}


def test_a_share_that_can_not_be_met_is_told_and_its_places_are_filled_or_left_empty(bench: Bench) -> None:
    prompts = [a_prompt(i, tags=[tag]) for i, tag in enumerate("aaaaaaaad")]
    settings = {"count": 6, "mixture": {"d": 0.5, "a": 0.5}}
    assert len(bench.run(STAGE, settings, prompts=prompts)) == 6
    parts = bench.summary["mixture"]["parts"]
    assert [(part["wanted"], part["selected"], part["missing"]) for part in parts.values()] == [(3, 1, 2), (3, 5, 0)]
    rows = bench.run(STAGE, {**settings, "fill": False}, prompts=prompts)
    assert sorted(row["tags"][0] for row in rows) == ["a", "a", "a", "d"]


def test_what_a_mixture_leaves_is_for_the_other_instructions(bench: Bench) -> None:
    prompts = [a_prompt(i, tags=[tag]) for i, tag in enumerate("aaaaabcde")]
    rows = bench.run(STAGE, {"count": 4, "mixture": {"a": 0.25}}, prompts=prompts)
    assert sorted(row["tags"][0] for row in rows)[0] == "a" and len({row["tags"][0] for row in rows}) == 4
    rows = bench.run(STAGE, {"count": 4, "mixture": {"a": 1}}, prompts=prompts)
    assert [row["tags"][0] for row in rows] == ["a"] * 4


def test_a_tag_of_the_mixture_that_is_not_at_the_top_is_refused(bench: Bench) -> None:
    prompts = [a_prompt(1, tags=["a", "b"])]
    with pytest.raises(DataError, match="'a' is no top-level tag of the pool; it lies under 'm'"):
        bench.run(STAGE, {"count": 1, "mixture": {"a": 0.5}}, prompts=prompts, ontology=levels(bench))
    with pytest.raises(DataError, match="'z' is no top-level tag of the pool; the top-level tags are m"):
        bench.run(STAGE, {"count": 1, "mixture": {"z": 0.5}}, prompts=prompts, ontology=levels(bench))
    for wrong in ({"a": 0.7, "b": 0.4}, {"a": 0.0}, {"a": -1}):
        with pytest.raises(ValidationError, match="shares above 0 that add up to 1 at most"):
            SelectConfig(count=1, mixture=wrong)


def test_quotas_are_whole_numbers_that_add_up() -> None:
    """Of 10 in thirds: 3 1/3 each, so one of them, the first, has 4."""
    assert quotas([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]
    assert quotas([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert quotas([0.0, 0.0], 7) == [0, 0]


def test_the_judging_of_intents_survives_kills(tmp_path: Path) -> None:
    def judge(prompt: Any, index: int) -> str:
        return str(1 + len(prompt[0]["content"]) % 10)

    settings = {"count": 3, "judge_threshold": 1.0}
    assert len(assert_survives_kills(tmp_path, "select", settings, {"prompts": pool()}, {"judge": judge})) == 3
