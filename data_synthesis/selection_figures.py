"""What `select` tells of a selection: coverage and scores before and after, by tag; what a mixture came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_synthesis.selection import I64, Part, Pool, top_counts

TOP = 30
"""Tags counted before and after in the summary, for the report's chart."""


def figures(method: str, pool: Pool, allowed: I64, chosen: Sequence[int], ontology_size: int | None) -> dict[str, Any]:
    """Figures before and after. Coverage is of the ontology's tags, or of those in the pool."""
    before, after = pool.counts(), pool.counts(chosen)
    all_tags = ontology_size or len(pool.names)
    top = sorted(range(len(pool.names)), key=lambda n: (-before[n], pool.names[n]))[:TOP]
    qualify = int((pool.complexity[allowed] > 0).sum()) if method == "complexity_first" else len(allowed)
    lost = {
        **pool.skipped,
        "the judge finds it incomplete": len(pool) - len(allowed),
        "untagged": len(allowed) - qualify,
        "not selected": qualify - len(chosen),
    }
    return {
        "yield": {
            "read": len(pool) + pool.skipped.total(), "pool": len(pool), "complete": len(allowed), "tagged": qualify,
            "selected": len(chosen),
        },
        "lost": {why: count for why, count in lost.items() if count},
        "pool": len(pool),
        "selected": len(chosen),
        "candidates": len(allowed),
        "untagged": int((pool.complexity == 0).sum()),
        "skipped": dict(pool.skipped),
        "tags": all_tags,
        "coverage_before": round(int((before > 0).sum()) / all_tags, 4) if all_tags else None,
        "coverage_after": round(int((after > 0).sum()) / all_tags, 4) if all_tags else None,
        "complexity_before": round(float(pool.complexity.mean()), 4),
        "complexity_after": round(float(pool.complexity[list(chosen)].mean()), 4),
        "richness_before": round(float(pool.richness.mean()), 4),
        "richness_after": round(float(pool.richness[list(chosen)].mean()), 4),
        "tags_before": {pool.names[n]: int(before[n]) for n in top},
        "tags_after": {pool.names[n]: int(after[n]) for n in top},
        "by_top_level_tag": top_figures(pool, before, after, chosen),
    }  # fmt: skip


def top_figures(pool: Pool, before: I64, after: I64, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Of the commonest top-level tags: instructions and coverage of the tags under it, before and after."""
    width = len(pool.tops)
    tags = np.bincount(pool.roots, minlength=width)
    reached = np.bincount(pool.roots[after > 0], minlength=width)
    pool_counts, counts = top_counts(pool), top_counts(pool, chosen)
    order = sorted(range(width), key=lambda top: (-pool_counts[top], pool.tops[top]))[:TOP]
    return {
        pool.tops[top]: {
            "instructions_before": int(pool_counts[top]), "instructions_after": int(counts[top]),
            "tags": int(tags[top]), "coverage_after": round(int(reached[top]) / int(tags[top]), 4),
        }
        for top in order
    }  # fmt: skip


def mixture_figures(parts: Mapping[str, Part], selected: int, several: int) -> dict[str, Any]:
    """What the target mixture came to; `missing` is what a part lacks of its share of `count`."""
    return {
        "parts": {
            name: {
                "share": round(part.share, 4), "wanted": part.wanted, "in_pool": len(part.places),
                "selected": len(part.chosen), "selected_share": round(len(part.chosen) / selected, 4),
                "missing": max(0, part.wanted - len(part.chosen)),
            }
            for name, part in parts.items() if part.share > 0 or part.chosen
        },
        "instructions_with_several_top_level_tags": several,
    }  # fmt: skip
