import time
from itertools import product

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from data_synthesis.neighbours import clusters
from data_synthesis.tag_merging import by_association, by_meaning, by_rules, key_of, merged, parents_of
from data_synthesis.top_level import by_company, covering


def test_rules_join_case_special_characters_and_word_forms_under_the_commonest_form() -> None:
    counts = {"Word Problems": 3, "word-problem": 5, "WORD_PROBLEM": 1, "wording": 2, "c++": 1, "C": 4, "!!": 9}
    assert by_rules(counts) == {
        "Word Problems": "word problem", "word-problem": "word problem", "WORD_PROBLEM": "word problem",
        "wording": "wording", "c++": "c++", "C": "c", "!!": None,
    }  # fmt: skip


def test_rules_keep_the_words_of_other_scripts_whole_and_plus_and_hash_after_letters() -> None:
    """Marks (of Hindi, Arabic, Thai) belong to their letters; full-width forms are normalised; digits stay."""
    counts = {
        "गणित": 1, "قَواعِد": 1, "คณิตศาสตร์": 1, "数学-问题": 1, "ＡＩ": 1, "ai": 2, "C++": 3, "c++ ": 1, "C#": 1,
        "# 1": 1, "1 + 2": 1, "Résumé_writing": 1,
    }  # fmt: skip
    found = by_rules(counts)
    assert found == {
        "गणित": "गणित", "قَواعِد": "قَواعِد", "คณิตศาสตร์": "คณิตศาสตร์", "数学-问题": "数学 问题", "ＡＩ": "ai", "ai": "ai",
        "C++": "c++", "c++ ": "c++", "C#": "c#", "# 1": "1", "1 + 2": "1 2", "Résumé_writing": "résumé writing",
    }  # fmt: skip
    assert key_of("Word-Problems!") == key_of("word problem")


def test_meaning_joins_what_is_nearly_the_same_and_reads_005_as_a_distance() -> None:
    """The tags "question answering task" and "… tasks" share nearly all character n-grams; "poetry" has none of them.

    Read as a *similarity* of at least 0.05, all that share a few n-grams ("question ...") would be one tag.
    """
    counts = {"question answering task": 2, "question answering tasks": 7, "question generation": 3, "poetry": 1}
    near = by_meaning(counts, None, 0.2)
    assert near["question answering task"] == near["question answering tasks"] == "question answering tasks"
    assert near["question generation"] == "question generation" and near["poetry"] == "poetry"
    assert len(set(by_meaning(counts, None, 0.0).values())) == 4
    assert by_meaning(counts, None, 0.95)["question generation"] == "question answering tasks"


def test_meaning_joins_through_a_chain_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit vectors at 0°, 15°, 30°, 90°: cos 15° = 0.966 is within 0.05, cos 30° = 0.866 is not; 15° leads to 30°."""
    angles = {"a": 0.0, "b": 15.0, "c": 30.0, "d": 90.0}
    vectors = np.array([[np.cos(np.radians(x)), np.sin(np.radians(x))] for x in angles.values()], dtype=np.float32)
    monkeypatch.setattr("data_synthesis.tag_merging.vectors_of", lambda tags, embedding: vectors)
    assert by_meaning({"a": 1, "b": 1, "c": 5, "d": 1}, "model", 0.05) == {"a": "c", "b": "c", "c": "c", "d": "d"}


def test_clusters_are_those_of_dbscan_with_two_points_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.cluster import DBSCAN

    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 6))[rng.integers(0, 40, 3000)] + 0.22 * rng.normal(size=(3000, 6))  # more than BLOCK
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr("data_synthesis.tag_merging.vectors_of", lambda tags, embedding: vectors)
    tags = [f"{number:04d}" for number in range(3000)]
    found = by_meaning(dict.fromkeys(tags, 1), "model", 0.005)
    labels = DBSCAN(eps=0.005, min_samples=2, metric="cosine").fit_predict(vectors)
    firsts = {int(label): tags[place] for place, label in reversed([*enumerate(labels)])}
    expected = {tag: tag if label < 0 else firsts[int(label)] for tag, label in zip(tags, labels, strict=True)}
    assert found == expected
    assert 100 < len(set(found.values())) < 2900


def incidence(rows: list[str], names: str) -> csr_matrix:
    return csr_matrix(np.array([[name in row for name in names] for row in rows], dtype=np.int32))


def test_a_tag_that_nearly_always_comes_with_another_becomes_part_of_it() -> None:
    """a is on 4 instructions, always with b (6): a -> b has support 4, confidence 1. b -> a: 4/6. c -> b: 1/2."""
    matrix = incidence(["ab", "ab", "ab", "ab", "bc", "b", "c"], "abc")
    assert by_association(matrix, "abc", "one_way", 4, 0.99) == ({"a": "b", "b": "b", "c": "c"}, 1)
    assert by_association(matrix, "abc", "one_way", 5, 0.99)[1] == 0  # the support
    assert by_association(matrix, "abc", "mutual", 4, 0.99)[1] == 0  # b comes without a
    assert by_association(matrix, "abc", "mutual", 4, 0.66)[0]["a"] == "b"
    assert by_association(matrix, "abc", "off", 1, 0.01)[1] == 0


def test_the_confidence_is_a_least_one() -> None:
    """99 of 100 instructions with a have b: 0.99 passes 0.99; 98 of 100 do not."""
    for extra, expected in ((1, "b"), (2, "a")):
        matrix = incidence(["ab"] * (100 - extra) + ["a"] * extra + ["b"] * 50, "ab")
        assert by_association(matrix, "ab", "one_way", 40, 0.99)[0]["a"] == expected


def test_merges_follow_chains_and_never_a_circle() -> None:
    """a and b are always together (a mutual pair); both always with c, which is also alone: all are c."""
    matrix = incidence(["abc", "abc", "abc", "c"], "abc")
    assert by_association(matrix, "abc", "one_way", 3, 0.99)[0] == {"a": "c", "b": "c", "c": "c"}
    assert by_association(matrix, "abc", "mutual", 3, 0.99)[0] == {"a": "a", "b": "a", "c": "c"}


def test_merges_are_repeated_on_the_merged_counts() -> None:
    """At 0.8: d is with b in 3 of its 4 rows (0.75) and with c in the fourth. c -> b holds at once (4 of 5), and only
    when c is part of b does d -> b hold (4 of 4).
    """
    matrix = incidence(["db", "db", "db", "dc", "bc", "bc", "bc", "bc", "b"], "bcd")
    into, rules = by_association(matrix, "bcd", "one_way", 2, 0.8)
    assert into == {"b": "b", "c": "b", "d": "b"} and rules == 2


def test_merged_columns_count_an_instruction_once() -> None:
    matrix = incidence(["ab", "a", "c"], "abc")
    found = merged(matrix, "abc", {"a": "x", "b": "x", "c": None}, ["x"])
    assert found.toarray().tolist() == [[1], [1], [0]]


def test_a_parent_is_the_least_general_tag_that_comes_with_nearly_all_instructions() -> None:
    """s (2) always with a (4) and m (6); a always with m. The parent of s is a, of a it is m, of m none."""
    matrix = incidence(["sam", "sam", "am", "am", "m", "m"], "ams")
    assert parents_of(matrix, "ams", 0.8) == {"a": "m", "m": None, "s": "a"}
    assert parents_of(incidence(["am", "a", "m", "m"], "am"), "am", 0.8) == {"a": None, "m": None}


@pytest.mark.parametrize(("mode", "seed"), [*product(("one_way", "mutual"), range(5))])
def test_association_agrees_with_counting_by_hand(mode: str, seed: int) -> None:
    """One round's rules, found by looking at every pair of tags in every row."""
    from data_synthesis.tag_merging import _one_round

    rng = np.random.default_rng(seed)
    rows = rng.random((60, 8)) < 0.5
    rows[:, 1] |= rows[:, 0]
    names = list("abcdefgh")
    expected = set()
    for a, b in product(range(8), repeat=2):
        both, of_a, of_b = (rows[:, a] & rows[:, b]).sum(), rows[:, a].sum(), rows[:, b].sum()
        share = both / of_a if mode == "one_way" else both / max(of_a, of_b)
        if a != b and both >= 10 and share >= 0.56 and (of_b > of_a or (of_b == of_a and b < a)):
            expected.add(names[a])
    found = _one_round(csr_matrix(rows.astype(np.int32)), names, mode, 10, 0.56)  # type: ignore[arg-type]
    assert set(found) == expected and expected
    assert all(target not in found for target in found.values())


def test_100_000_rows_of_tags_are_mined_in_seconds() -> None:
    rng = np.random.default_rng(0)
    columns = (2000 * rng.random((100_000, 5)) ** 3).astype(np.int64)
    places = (np.repeat(np.arange(100_000), 5), columns.ravel())
    matrix = csr_matrix((np.ones(500_000, np.int32), places), (100_000, 2000))
    matrix.data[:] = 1
    start = time.process_time()
    by_association(matrix, [f"t{i}" for i in range(2000)], "one_way", 40, 0.99)
    assert time.process_time() - start < 10  # about 0.5 s on a quiet core; the bound is for busy machines


def test_near_pairs_of_dense_and_sparse_vectors_are_all_found_and_no_others() -> None:
    """Against all similarities in full, for several distances; 1,500 vectors are more than one block.

    Some dense vectors lie beyond the first axes, some are nothing but zeros; sparse ones have signs.
    """
    from scipy.sparse import random as random_sparse

    rng = np.random.default_rng(1)
    dense = rng.normal(size=(300, 90))[rng.integers(0, 300, 1500)] + 0.3 * rng.normal(size=(1500, 90))
    dense[:400, :80] *= 0.01
    sparse = random_sparse(700, 300, density=0.03, random_state=2, format="csr")[rng.integers(0, 700, 1500)].tolil()
    sparse[rng.integers(0, 1500, 900), rng.integers(0, 300, 900)] = -0.4
    for vectors in (dense, sparse.toarray()):
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        vectors[5] = 0
        full = vectors.astype(np.float32)
        given = csr_matrix(full) if vectors is not dense else full
        for distance in (0.01, 0.05, 0.2, 0.6):
            near = coo_matrix(full @ full.T >= 1 - distance - 1e-6)
            number, labels = connected_components(near, directed=False)
            found = clusters(given, distance)
            assert len(set(found.tolist())) == number
            assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == number


def test_005_read_as_a_similarity_would_make_one_tag_of_nearly_all() -> None:
    """Twelve tags of four families: at a distance of 0.05 all twelve stay, at a similarity of 0.05 (a distance of
    0.95) the families are gone.
    """
    words = (
        "math word problem|math proof|math equation|poem writing|poem analysis|story writing|code writing|code review"
    )
    counts = dict.fromkeys([*words.split("|"), "story analysis", "code problem", "review of a story", "proof"], 1)
    assert len(set(by_meaning(counts, None, 0.05).values())) == 12
    assert len(set(by_meaning(counts, None, 0.95).values())) == 1


def test_top_tags_cover_most_instructions_between_them() -> None:
    """b is on 3; then a adds 2 and c only 1 (its other instruction has b); d adds none."""
    matrix = incidence(["b", "bc", "bd", "a", "a", "c"], "abcd")
    assert covering(matrix, "abcd", 2) == ["b", "a"]
    assert covering(matrix, "abcd", 9) == ["b", "a", "c"]
    assert covering(matrix, "abcd", 2, ["c"]) == ["c", "a"]  # after c, a and b add 2 each
    assert by_company(matrix, "abcd", ["a", "b"]) == {"c": "b", "d": "b"}
    assert by_company(incidence(["a", "d"], "ad"), "ad", ["a"]) == {"d": "other"}
