from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from align.core.text import ngrams, normalise, prompt_id_of, root_text, split_of, stable_hash, words


def test_full_width_letters_case_and_spacing_are_made_alike():
    assert normalise("  Ｈello\u00a0 WORLD\n") == "hello world"


def test_words_leave_punctuation_out_and_cut_chinese_by_character():
    assert words("Don't stop: 3 apples!") == ["don", "t", "stop", "3", "apples"]
    assert words("请列出 three 水果") == ["请", "列", "出", "three", "水", "果"]


def test_there_are_length_minus_n_plus_one_ngrams_and_none_of_a_shorter_text():
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a"], 2)) == []


def test_a_hash_is_the_same_in_a_process_with_another_hash_seed():
    code = "from align.core.text import stable_hash; print(stable_hash('sämple'))"
    found = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {stable_hash("sämple")}


def test_a_hash_is_blake2b_of_the_utf8_bytes():
    # BLAKE2b with 8 bytes of digest of the empty message, as b2sum -l 64 gives it.
    assert stable_hash("") == "e4a6a0577479b2b4"


def test_a_lone_surrogate_can_be_hashed():
    assert len(stable_hash("\ud800")) == 16


def test_prompts_that_differ_in_a_system_message_have_other_ids_and_one_root():
    bare = [{"role": "user", "content": "Add 2 and 3."}]
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add 2 and  3."}]
    assert prompt_id_of(bare) != prompt_id_of(with_system)
    assert root_text(bare) == root_text(with_system) == "add 2 and 3."


@given(st.text(max_size=40), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_prompt_held_out_at_some_share_stays_held_out_when_the_test_share_grows(text: str, dev: float, test: float):
    split = split_of(text, dev, test)
    assert split == split_of(text, dev, test)
    if split == "test":
        assert split_of(text, dev, min(1.0, test + 0.1)) == "test"


def test_splits_have_about_their_shares():
    """Of 10,000 texts 500 ± 3·sqrt(10000·0.05·0.95) = 500 ± 65 fall into a share of 5%."""
    splits = [split_of(f"text {i}", 0.05, 0.05) for i in range(10_000)]
    assert abs(splits.count("dev") - 500) < 66
    assert abs(splits.count("test") - 500) < 66
    assert splits != [split_of(f"text {i}", 0.05, 0.05, seed=1) for i in range(10_000)]


def test_shares_of_nothing_leave_all_for_training():
    assert {split_of(f"text {i}", 0.0, 0.0) for i in range(1000)} == {"train"}


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_ascii_text_has_the_same_words_on_its_quick_way(text: str):
    assert [*words(text), "é"] == words(f"{text} é")
