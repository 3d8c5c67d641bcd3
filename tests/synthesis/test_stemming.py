import pytest

from data_synthesis.stemming import stem


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # examples of Porter's article, by step
        ("caresses", "caress"), ("ponies", "poni"), ("cats", "cat"), ("feed", "feed"), ("agreed", "agre"),
        ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"),
        ("troubled", "troubl"), ("sized", "size"), ("hopping", "hop"), ("falling", "fall"), ("hissing", "hiss"),
        ("filing", "file"), ("happy", "happi"), ("sky", "sky"), ("relational", "relat"), ("vietnamization", "vietnam"),
        ("triplicate", "triplic"), ("hopefulness", "hope"), ("goodness", "good"), ("revival", "reviv"),
        ("adoption", "adopt"), ("probate", "probat"), ("rate", "rate"), ("cease", "ceas"), ("controll", "control"),
        ("roll", "roll"), ("generalizations", "gener"), ("oscillators", "oscil"),
        # not for stemming
        ("as", "as"), ("qa", "qa"), ("数学", "数学"), ("2d", "2d"), ("café", "café"),
    ],
)  # fmt: skip
def test_words_have_porters_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_forms_of_one_word_share_a_stem() -> None:
    assert len({stem(word) for word in ("translate", "translates", "translated", "translating", "translation")}) == 1
