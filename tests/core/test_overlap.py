from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core import word_hashes as hashing
from align.core.overlap import Index, common_lengths
from align.core.text import ngrams, words
from align.core.word_hashes import run_hashes, run_places, word_hashes

TEXTS = ["One two, THREE!", "", "two’s — three", "请列出three水果", "über-Straße", "...", "x" * 30, "₂ﬁ・_two"]


def hashes_of(texts: list[str]) -> list[list[int]]:
    hashes, bounds = word_hashes(texts)
    return [hashes[a:b].tolist() for a, b in pairwise(bounds)]


def test_two_words_have_one_hash_exactly_when_they_are_one_word():
    found: dict[str, int] = {}
    for text, hashes in zip(TEXTS, hashes_of(TEXTS), strict=True):
        assert len(hashes) == len(words(text))
        for word, value in zip(words(text), hashes, strict=True):
            assert found.setdefault(word, value) == value
    assert len(set(found.values())) == len(found) == 14  # one two three s 请 列 出 水 果 über strasse xxx… 2fi ・


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_a_texts_hashes_do_not_depend_on_the_texts_beside_it(texts: list[str]):
    assert hashes_of(texts) == [hashes_of([text])[0] for text in texts]


def test_long_texts_and_long_words_are_hashed_as_short_ones(monkeypatch):
    texts = ["a bb ccc " * 20, "d" * 200 + " bb", "ccc"]
    whole = hashes_of(texts)
    monkeypatch.setattr(hashing, "PIECE", 16)
    assert hashes_of(texts) == whole


def test_hashes_are_the_same_in_every_process():
    code = "from align.core.word_hashes import word_hashes; print(word_hashes(['one two'])[0].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(word_hashes(["one two"])[0].tolist())


def test_runs_stay_inside_their_text():
    """Texts of 3, 0 and 2 words have 2, 0 and 1 runs of two: at the words 0, 1 and 3."""
    hashes, bounds = word_hashes(["a b c", "", "a b"])
    places, texts = run_places(bounds, 2)
    assert (places.tolist(), texts.tolist()) == ([0, 1, 3], [0, 0, 2])
    runs = run_hashes(hashes, 2)
    assert runs[0] == runs[3] != runs[1]


def test_an_index_finds_the_runs_that_plain_python_finds():
    draw = random.Random(0)
    pool = [f"w{n}" for n in range(6)]
    items = [" ".join(draw.choices(pool, k=draw.randint(0, 12))) for _ in range(20)]
    texts = [" ".join(draw.choices(pool, k=draw.randint(0, 30))) for _ in range(30)]
    hits = Index(items, 3).hits(texts)
    expected = {
        (t, p, i, q)
        for t, text in enumerate(texts) for p, run in enumerate(ngrams(words(text), 3))
        for i, item in enumerate(items) for q, other in enumerate(ngrams(words(item), 3)) if run == other
    }  # fmt: skip
    arrays = (hits.texts, hits.places, hits.items, hits.item_places)
    found = list(zip(*(array.tolist() for array in arrays), strict=True))
    assert set(found) == expected and len(found) == len(expected) > 100


def test_the_longest_common_subsequence_may_have_gaps():
    """abcd in axbxcx: abc, 3; of nothing, 0."""
    assert common_lengths(["abcd", ""], ["axbxcx", "a"]).tolist() == [3, 0]
    assert common_lengths([], []).tolist() == []


WORDS = [f"word{n}" for n in range(400)]


def found(
    text: list[str], item: list[str], run: int = 4, least: int = 13, share: float = 0.6
) -> list[tuple[int, int, int]]:
    overlaps = Index([" ".join(item)], run).overlaps([" ".join(text)], least, share)
    return [(o.common, o.text_words, o.item_words) for o in overlaps]


def test_an_item_is_found_from_thirteen_common_words_on():
    assert found(WORDS[:13], WORDS[:13]) == [(13, 13, 13)]
    assert found(WORDS[:12], WORDS[:12]) == []


def test_the_common_words_must_be_a_share_of_the_shorter_text():
    """15 of 25 words are 0.6; 14 are 0.56."""
    item = WORDS[:25]
    assert found([*WORDS[:15], *WORDS[100:140]], item) == [(15, 55, 25)]
    assert found([*WORDS[:14], *WORDS[100:140]], item) == []
    assert found([*WORDS[:14], *WORDS[100:106]], item) == [(14, 20, 25)]  # 14 of 20 are 0.7


def test_every_seventh_word_changed_is_still_found():
    """28 words of which 4 are others: the runs between are 6 long, so a run of 8 does not find it, one of 4 does."""
    edited = [f"new{n}" if n % 7 == 6 else word for n, word in enumerate(WORDS[:28])]
    assert found(edited, WORDS[:28]) == [(24, 28, 28)]
    assert found(edited, WORDS[:28], run=8) == []


def test_of_a_long_text_only_the_stretch_around_the_run_counts():
    """The item's words stand in a text of 8,000 in order but far apart, and 4 of them once in a row."""
    item = WORDS[:22]
    spread = [word for n, own in enumerate(item) for word in [own, *(f"f{n}x{k}" for k in range(300))]]
    text = [*spread, *item[:4], *(f"g{n}" for n in range(100))]
    index = Index([" ".join(item)], 4)
    assert common_lengths([index.coded(words(" ".join(text)))], index.codes).tolist() == [22]
    assert found(text, item) == []
    assert found([*(f"f{n}" for n in range(500)), *item, *(f"g{n}" for n in range(500))], item) == [(22, 1022, 22)]


def test_the_best_of_several_stretches_counts():
    item = WORDS[:30]
    text = [*item[:14], *(f"f{n}" for n in range(300)), *item, *(f"g{n}" for n in range(300)), *item[10:20]]
    assert found(text, item) == [(30, 654, 30)]


def test_chinese_is_compared_by_the_character():
    item = "小明有十四块石头他又买了七块"
    assert [o.common for o in Index([item], 8).overlaps([f"请问：{item}。一共多少？"], 13, 0.6)] == [14]


def test_an_empty_index_and_empty_texts_give_nothing():
    assert Index([], 8).overlaps(["a b c"], 1, 0.1) == []
    assert Index(["a b c"], 2).overlaps([], 1, 0.1) == []
    assert len(Index(["a b c"], 2).hits(["", "a"])) == 0
    assert np.concatenate([word_hashes([])[1], word_hashes([""])[1]]).tolist() == [0, 0, 0]


def test_the_bound_of_the_bytes_rules_out_nothing_that_is_there():
    """With 600 words, so that bytes are shared: against every pair's common subsequence, computed plainly."""
    draw = random.Random(1)
    pool = [f"w{n}" for n in range(600)]
    items = [" ".join(draw.sample(pool, draw.randint(5, 30))) for _ in range(40)]
    copies = [draw.choice(items).split() for _ in range(80)]
    texts = [" ".join(word if draw.random() < 0.7 else draw.choice(pool) for word in copy) for copy in copies]
    index = Index(items, 1)
    expected = {
        (t, i): int(common_lengths([index.coded(words(text))], [index.codes[i]])[0])
        for t, text in enumerate(texts) for i in range(len(items))
    }  # fmt: skip
    needed = {(t, i): max(4, 0.5 * min(len(words(texts[t])), len(words(items[i])))) for t, i in expected}
    overlaps = {(o.text, o.item): o.common for o in index.overlaps(texts, 4, 0.5)}
    assert overlaps == {pair: common for pair, common in expected.items() if common >= needed[pair]}
    assert len(overlaps) > 40
