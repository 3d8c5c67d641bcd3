from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.core.sources import open_source
from align.core.text import words
from data_synthesis.leaks import LeakConfig, leak, shared, units
from data_synthesis.passages import PassageConfig, cut, no_prose, passages_of

FIRST = "The old mill stood by the river. Nobody had lived there for years, and the wheel had long stopped turning."
SECOND = "In spring the water rose. It took the lower fence with it, and two apple trees that Marten had planted."
BOOK = f"""The Mill

CONTENTS

Chapter 1 ........ 3
Chapter 2 ........ 17
Chapter 3 ........ 40

CHAPTER I

{FIRST}

{SECOND}

* * * * *

Chapter 2. The Flood

{SECOND.replace("spring", "autumn")}
"""


def pieces(text: str, **settings: object) -> tuple[list[str], Counter[str]]:
    skipped: Counter[str] = Counter()
    places = list(cut(text, PassageConfig(**settings), skipped))  # type: ignore[arg-type]
    return [text[start:end] for start, end in places], skipped


def test_a_text_is_cut_at_its_paragraphs_and_what_is_no_prose_is_passed_by_and_counted() -> None:
    """FIRST and SECOND have 20 words each, so a passage of 20 to 42 words is one of them, or both.

    Headings: the title, CONTENTS, CHAPTER I and "Chapter 2. The Flood".
    """
    found, skipped = pieces(BOOK, min_words=20, max_words=42)
    assert found in (
        [FIRST, SECOND, SECOND.replace("spring", "autumn")],
        [f"{FIRST}\n\n{SECOND}", SECOND.replace("spring", "autumn")],
    )
    assert skipped == {"heading": 4, "table of contents": 1, "few letters": 1}


def test_the_same_text_is_always_cut_alike_and_passages_are_of_various_lengths() -> None:
    text = "\n\n".join(f"Sentence number {n} stands here with just ten words." for n in range(400))
    found, _ = pieces(text, min_words=20, max_words=100)
    assert found == pieces(text, min_words=20, max_words=100)[0]
    sizes = {len(words(passage)) for passage in found}
    assert all(20 <= size <= 100 for size in sizes) and len(sizes) > 4


def test_a_paragraph_that_is_too_long_is_cut_at_its_sentences() -> None:
    """Twelve sentences of 5 words, at most 20 words a passage and 10 at least: every passage is 2 to 4 sentences."""
    text = " ".join(f"This is sentence number {n}." for n in range(12))
    found, skipped = pieces(text, min_words=10, max_words=20)
    assert " ".join(found) == text and not skipped
    assert all(passage.endswith(".") and len(words(passage)) in (10, 15, 20) for passage in found)


def test_a_chinese_text_is_cut_by_characters_and_at_its_own_full_stops() -> None:
    """Each sentence has 12 characters and a stop; 24 characters at most make two sentences."""
    text = "第一章 山里的村子\n" + "春天的河水慢慢流过石桥。" * 6 + "\n"
    found, skipped = pieces(text, min_words=20, max_words=24)
    assert found == ["春天的河水慢慢流过石桥。" * 2] * 3
    assert skipped == {"heading": 1}


def test_a_sentence_longer_than_a_passage_may_be_is_lost_and_no_passage_runs_across_it() -> None:
    long = "word " * 60
    found, skipped = pieces(f"{FIRST}\n\n{long}end.\n\n{SECOND}", min_words=20, max_words=45)
    assert found == [FIRST, SECOND]
    assert skipped == {"longer than max_words, and no sentence ends": 1}


def test_a_distributors_header_and_footer_are_left_out() -> None:
    text = (
        "Some terms of use that are long enough to be taken for a passage of their own.\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n\n"
        f"{FIRST}\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE MILL ***\nMore terms, quite as long as those before.\n"
    )
    found, skipped = pieces(text, min_words=5, max_words=40)
    assert found == [FIRST]
    assert skipped == {"a distributor's header and footer": 1}


@pytest.mark.parametrize(
    ("paragraph", "reason"),
    [
        (FIRST, None),
        ('"Come in," he said.', None),
        ("“进来吧。”", None),
        ("他走了。", None),
        ("The Mill by the River", "heading"),
        ("## How it began", "heading"),
        ("A title\n=======", "heading"),
        ("第三回 夜走石桥", "heading"),
        ("- [Install](#install)\n- [Use](#use)\n- [Help](#help)", "table of contents"),
        ("1 Beginnings   3\n2 The flood   9\n3 The end   27", "table of contents"),
        ("| 12 | 34 | 56 |\n|----|----|----|", "few letters"),
        ("O wild West Wind, thou breath\nof Autumn's being,\nthou from whose unseen presence", None),
    ],
)
def test_what_is_prose(paragraph: str, reason: str | None) -> None:
    assert no_prose(paragraph) == reason


def test_passages_of_a_folder_of_texts_have_their_place_in_the_file_their_licence_and_no_twins(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "old").mkdir(parents=True)
    text = f"\ufeff{FIRST}\r\n\r\n# End\r\n\r\nShort.\r\n"
    (folder / "a.txt").write_text(text, encoding="utf-8", newline="")
    (folder / "old" / "b.md").write_text(f"# Title\n\n{SECOND}\n\n# No\n\n{FIRST}\n")
    (folder / "empty.txt").write_text("")
    table = open_source({"path": str(folder), "license": "public domain"}, None, tmp_path / "cache")
    skipped: Counter[str] = Counter()
    config = PassageConfig(min_words=20, max_words=23, dev=0.0, test=0.0)
    found = list(passages_of(table, config, skipped))
    assert [(p.text, p.row["source"], p.license) for p in found] == [
        (FIRST, "books/a.txt", "public domain"),
        (SECOND, "books/old/b.md", "public domain"),
    ]
    for passage in found:
        read = (tmp_path / passage.row["source"]).read_bytes().decode("utf-8-sig")
        assert read[passage.start : passage.end] == passage.text
    assert skipped["passage seen before"] == 1 and skipped["shorter than min_words"] == 1


def test_a_held_out_passage_is_held_out_wherever_it_comes_and_a_held_out_row_stays_so(tmp_path: Path) -> None:
    """With half of all passages held out, a passage's split is the same from two files, and rows of `test` stay."""
    texts = [f"Passage number {n} of the text is about something else than all others." for n in range(40)]
    rows = [{"text": text} for text in texts]
    config = PassageConfig(whole=True, min_words=5, dev=0.25, test=0.25, splits=["train", "dev", "test"])

    def splits(name: str, rows: list[dict[str, str]]) -> dict[str, str]:
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        table = open_source(tmp_path / name, None, tmp_path / "cache")
        return {p.text: p.split for p in passages_of(table, config, Counter())}

    first = splits("a.jsonl", rows)
    again = splits("b.jsonl", [{"text": f"  {row['text'].upper()} "} for row in reversed(rows)])
    assert {text.upper(): split for text, split in first.items()} == again
    assert 5 <= Counter(first.values())["train"] <= 35
    assert set(splits("c.jsonl", [row | {"split": "test"} for row in rows]).values()) == {"test"}


def test_answers_of_a_chat_or_of_a_table_can_be_passages_and_a_wrong_column_is_told(tmp_path: Path) -> None:
    chat = {"question": "q", "answer": [{"role": "assistant", "content": FIRST}], "n": 3}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "written.jsonl").write_text(json.dumps({"answer": FIRST, "n": 3}) + "\n")

    def found(file: str, column: str) -> list[str]:
        table = open_source(tmp_path / file, None, tmp_path / "cache")
        config = PassageConfig(text=column, whole=True, min_words=5, dev=0.0, test=0.0)
        return [p.text for p in passages_of(table, config, Counter())]

    assert found("chat.jsonl", "answer") == found("written.jsonl", "answer") == [FIRST]
    with pytest.raises(DataError, match=r"has no column 'text' with the passages' text; it has .*answer, n; name one"):
        found("written.jsonl", "text")
    with pytest.raises(DataError, match=r"the column 'n' holds 3; text or messages were expected"):
        found("chat.jsonl", "n")


def test_a_share_of_the_passages_is_the_same_whatever_comes_with_them_and_count_takes_the_first(tmp_path: Path) -> None:
    texts = [f"Passage number {n} of the text is about something else than all others." for n in range(60)]

    def found(texts: list[str], **settings: object) -> list[str]:
        (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
        table = open_source(tmp_path / "x.jsonl", None, tmp_path / "cache")
        config = PassageConfig(whole=True, min_words=5, dev=0.0, test=0.0, **settings)  # type: ignore[arg-type]
        return [p.text for p in passages_of(table, config, Counter())]

    half = found(texts, share=0.5)
    assert 15 <= len(half) <= 45
    assert found(texts[20:], share=0.5) == [text for text in half if text in texts[20:]]
    assert found(texts, count=7) == texts[:7]


def test_an_instruction_that_quotes_the_passage_is_found_in_any_script() -> None:
    """Eight words in a row, or twelve characters of Chinese, are the limits; one less is none."""
    config = LeakConfig(leak_share=1.0)
    assert leak("Write: nobody had lived there for years, and the", FIRST, config) is not None
    assert leak("Write: nobody had lived there for years, and a", FIRST, config) is None
    passage = "很久以前山里住着一位老猎人，他从不打怀孕的鹿。"
    assert leak("请写一个故事：很久以前山里住着一位老猎", passage, config) is not None
    assert leak("请写一个故事：以前山里住着一位老猎", passage, config) is None
    assert "quotes the passage" in str(leak("很久以前山里住着一位老猎人", passage, config))


def test_an_instruction_that_holds_most_of_a_short_passage_gives_it_away() -> None:
    """Of "cat, dog, sun, OK" (4 words) the run "cat dog sun" is 75%; of FIRST's 20 words "by the river" is 15%."""
    assert leak("Copy these words: cat, dog, sun.", "cat, dog, sun\nOK", LeakConfig()) == "holds 75% of the passage"
    assert leak("Copy these words: dog, cat.", "cat, dog", LeakConfig()) is None
    assert leak("Tell of a house by the river.", FIRST, LeakConfig()) is None


def test_the_weight_of_a_run_is_that_of_its_words_and_its_characters() -> None:
    """4 of 8 words are 0.5 and 3 of 12 characters 0.25."""
    found = shared(units("use the new tool 石桥上 now"), units("He said: use the new tool 石桥上!"), 8, 12)
    assert found.run == "use the new tool 石 桥 上"
    assert found.weight == pytest.approx(0.75)
    assert found.share == pytest.approx(7 / 9)


def test_thai_is_compared_by_characters_though_it_has_no_spaces() -> None:
    assert units("แมว cat") == ["แ", "ม", "ว", "cat"]


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_words=50 must not be above max_words=40; swap them"):
        PassageConfig(min_words=50, max_words=40)
    with pytest.raises(ValueError, match=r"dev=0\.5 and test=0\.5 leave nothing to train on"):
        PassageConfig(dev=0.5, test=0.5)


@pytest.mark.real_data
def test_passages_of_real_answers_stand_where_they_say(tmp_path: Path) -> None:
    folder = os.environ.get("ALIGN_TEST_DATA")
    if not folder:
        pytest.skip("ALIGN_TEST_DATA is not set")
    table = open_source(f"{folder}/gsm8k/test.jsonl", None, tmp_path)
    config = PassageConfig(text="question", min_words=15, max_words=40, count=300)
    found = list(passages_of(table, config, Counter()))
    assert len(found) == 300 and {p.split for p in found} == {"train"}
    assert all(p.row["question"][p.start : p.end] == p.text and 15 <= len(words(p.text)) <= 40 for p in found)
