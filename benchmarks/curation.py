"""How good the made pairs are, before and after they are curated: in the tiny world a program can tell.

    align run synthesis/repurpose out=runs/repurpose
    align run synthesis/back_translate out=runs/back_translate
    python benchmarks/curation.py runs/repurpose/repurposed runs/back_translate/round_1 runs/back_translate/round_2

An instruction that the world's own program can read has a reference, and its verifier says whether the completion is
right. Those that it can't read (all sparse and medium ones of the tiny writer, and broken ones) are counted apart.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from align.core.records import Row, message_text
from align.core.store import Table
from align.tiny.solve import solve
from reward.verifiers import Verifiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path, nargs="+", help="folders of steps that gave COMPLETIONS with `kept`")
    parser.add_argument("--save", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    figures = {str(step): measured(list(Table.open(step).rows())) for step in options.steps}
    for step, found in figures.items():
        print(step, json.dumps(found))
    if options.save is not None:
        options.save.write_text(json.dumps(figures, indent=2) + "\n")


def measured(rows: list[Row]) -> dict[str, object]:
    """Counts of pairs, of those that can be checked, and the shares of right ones among all and among the kept."""
    items = [solve(row["prompt"][-1]["content"]) for row in rows]
    checked = [(row, item) for row, item in zip(rows, items, strict=True) if item is not None]
    with Verifiers() as verifiers:
        questions = [
            (item.task, message_text(row["completion"]), item.reference, item.instruction) for row, item in checked
        ]
        right = [verdict.verdict == "passed" for verdict in verifiers.verify_many(questions)]
    counts: Counter[str] = Counter()
    for (row, _), is_right in zip(checked, right, strict=True):
        counts["all"] += 1
        counts["right"] += is_right
        counts["kept"] += row["kept"]
        counts["kept_right"] += row["kept"] and is_right
    return {
        "pairs": len(rows),
        "kept": sum(row["kept"] for row in rows),
        "can be checked": counts["all"],
        "right, of all": round(counts["right"] / max(1, counts["all"]), 3),
        "right, of the kept": round(counts["kept_right"] / max(1, counts["kept"]), 3),
        "kept, of the right": round(counts["kept_right"] / max(1, counts["right"]), 3),
    }


if __name__ == "__main__":
    main()
