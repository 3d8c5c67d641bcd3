"""Do our counts of sentences and of words in capitals agree with nltk's, which IFEval's reference checkers use?

nltk and its English Punkt model are needed for this comparison only: `pip install nltk==3.9.1`, and `punkt_tab` in a
folder that NLTK_DATA names. Every text of more than 40 characters in the files is counted.

    python benchmarks/sentences.py [--out FILE.json] FILE.jsonl ...
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reward.ifeval.sentences import count_sentences
from reward.ifeval.words import count_capital_words


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        if 40 < len(value) < 20_000:
            yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def main() -> None:
    import nltk
    from nltk.tokenize import sent_tokenize, word_tokenize

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for file in settings.files:
        lines = file.read_text("utf-8").splitlines()
        counts: Counter[str] = Counter(texts=0, other_sentences=0, sentences_off_by=0, other_capital_words=0)
        for text in dict.fromkeys(text for line in lines for text in texts(json.loads(line))):
            counts["texts"] += 1
            off = abs(len(sent_tokenize(text)) - count_sentences(text))
            counts["other_sentences"] += off > 0
            counts["sentences_off_by"] += off
            counts["other_capital_words"] += sum(map(str.isupper, word_tokenize(text))) != count_capital_words(text)
        found[f"{file.parent.name}/{file.name}"] = dict(counts)
        print(file.name, json.dumps(counts), flush=True)
    result = {
        "question": "texts for which nltk counts other sentences or other words in capitals",
        "files": found,
        "nltk": nltk.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
