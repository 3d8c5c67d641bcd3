from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_synthesis.near_duplicates import HASHES, later_duplicates, signatures

WORDS = [f"word{n}" for n in range(1000)]


def found(tmp_path: Path, texts: list[str], threshold: float = 0.8, rank: list[int] | None = None) -> list[bool]:
    file = tmp_path / "signatures"
    assert signatures(texts, file) == len(texts)
    ranks = np.array(rank or [0] * len(texts), dtype=np.uint8)
    return [bool(x) for x in later_duplicates(file, ranks, threshold)]


def test_the_share_of_equal_hashes_estimates_the_jaccard_similarity(tmp_path: Path):
    """Texts of 200 words have 196 5-grams each. The second keeps the first 150 words: 146 are shared, of 246 in all.

    The similarity is 0.593. The standard error of 128 hashes is sqrt(0.593·0.407/128) = 0.043;
    the mean of 40 pairs has 0.0069.
    """
    texts = []
    for pair in range(40):
        mine = [f"{word}x{pair}" for word in WORDS[:200]]
        texts += [" ".join(mine), " ".join(mine[:150] + [f"other{pair}y{n}" for n in range(50)])]
    signatures(texts, tmp_path / "s")
    table = np.fromfile(tmp_path / "s", dtype=np.uint32).reshape(len(texts), HASHES)
    shares = (table[0::2] == table[1::2]).mean(axis=1)
    assert abs(shares.mean() - 146 / 246) < 3 * 0.0069


def test_one_changed_word_in_many_is_nearly_the_same_and_another_text_is_not(tmp_path: Path):
    first = " ".join(WORDS[:100])
    changed = first.replace("word50", "instead")
    other = " ".join(WORDS[200:300])
    assert found(tmp_path, [first, other, changed, first.upper() + "!"]) == [False, False, True, True]


def test_the_same_template_with_other_numbers_is_another_text(tmp_path: Path):
    one = "Eva has 6 cards and doubles them, then drops 8 of them. How many cards does she have now?"
    two = "Eva has 9 coins and halves them, then finds 3 of them. How many coins does she have now?"
    assert found(tmp_path, [one, two]) == [False, False]


def test_short_texts_are_duplicates_only_when_their_words_are_equal(tmp_path: Path):
    assert found(tmp_path, ["Add 2", "add 2.", "Add 3", "!!", "??", "!!"]) == [False, True, False, False, False, True]


def test_of_equals_the_one_of_lower_rank_stays_and_then_the_first(tmp_path: Path):
    text = " ".join(WORDS[:30])
    assert found(tmp_path, [text, text, text], rank=[2, 1, 2]) == [True, False, True]
    assert found(tmp_path, [text, text, text], rank=[2, 2, 2]) == [False, True, True]


@pytest.mark.parametrize("count", [0, 1])
def test_few_texts_have_no_duplicates(tmp_path: Path, count: int):
    assert found(tmp_path, ["one text"] * count) == [False] * count


def test_signatures_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path):
    texts = [" ".join(WORDS[n : n + 20]) for n in range(1500)]
    signatures(texts, tmp_path / "all")
    signatures(texts[1200:1201], tmp_path / "one")
    table = np.fromfile(tmp_path / "all", dtype=np.uint32).reshape(-1, HASHES)
    assert (table[1200] == np.fromfile(tmp_path / "one", dtype=np.uint32)).all()


def test_chinese_is_compared_by_runs_of_five_characters(tmp_path: Path):
    """56 characters have 52 runs; one other character in the middle changes 5 of them: 47 of 57, 0.82."""
    text = (
        "小明有十四块石头他又买了七块后来丢了三块请问他现在一共还有多少块石头"
        + "如果他再把其中的一半送给小红他还剩下几块呢好"
    )
    assert found(tmp_path, [text, text.replace("送", "借"), text[::-1]], 0.7) == [False, True, False]


def test_short_texts_keep_the_order_of_their_words(tmp_path: Path):
    assert found(tmp_path, ["add two", "two add", "Add two!"]) == [False, False, True]
