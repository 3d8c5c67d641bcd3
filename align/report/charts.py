"""Charts as inline SVG that take their colours from the page: the ladder's intervals, tag bars; see also core/plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.core.html import Child, Html, el, svg


def ladder_chart(rows: Sequence[tuple[str, Mapping[str, Any]]], width: float = 720) -> Html:
    """A row a step: its greedy (filled) and sampled (open) score, each on its 95% interval.

    Args:
        rows: the step's name and its scores by mode.
        width: in units of the picture.
    """
    left, right, high = 170.0, 24.0, 34.0
    height = high * len(rows) + 34

    def at(score: float) -> float:
        return left + (width - left - right) * score / 100

    parts: list[Child] = []
    for tick in range(0, 101, 20):
        parts.append(el("line", x1=at(tick), x2=at(tick), y1=6, y2=height - 24, class_="grid"))
        parts.append(el("text", f"{tick}", x=at(tick), y=height - 8, class_="tick middle"))
    for number, (name, scores) in enumerate(rows):
        y = high * number + 22
        parts.append(el("text", name if len(name) < 24 else name[:22] + "…", x=left - 14, y=y + 4, class_="label end"))
        for mode, shift in (("greedy", -5), ("sampled", 6)):
            if mode not in scores:
                continue
            one = scores[mode]["overall"]
            told = f"{name}, {mode}: {one['score']:.1f} ({one['low']:.1f} to {one['high']:.1f})"
            parts += [
                el(
                    "line", x1=at(one["low"]), x2=at(one["high"]), y1=y + shift, y2=y + shift, class_=f"interval {mode}"
                ),
                el("circle", el("title", told), cx=at(one["score"]), cy=y + shift, r=4.5, class_=f"dot {mode}"),
            ]
    return svg(width, height, "Verified scores with their 95% intervals", *parts)


def bars(before: Mapping[str, float], after: Mapping[str, float], width: float = 720, most: int = 20) -> Html:
    """Two bars for each name: its share before (pale) and after, in percent."""
    names = sorted(set(before) | set(after), key=lambda name: -max(before.get(name, 0), after.get(name, 0)))[:most]
    left, right, high = 190.0, 56.0, 26.0
    top = max([*before.values(), *after.values(), 1e-9])
    parts: list[Child] = []
    for number, name in enumerate(names):
        y = high * number + 4
        parts.append(el("text", name if len(name) < 26 else name[:24] + "…", x=left - 12, y=y + 13, class_="label end"))
        for share, shift, which in ((before.get(name, 0), 0, "before"), (after.get(name, 0), 10, "after")):
            long = (width - left - right) * share / top
            told = el("title", f"{name}, {which}: {100 * share:.1f}%")
            parts.append(
                el("rect", told, x=left, y=y + shift, width=f"{long:.1f}", height=8, rx=2, class_=f"bar {which}")
            )
        end = left + (width - left - right) * max(before.get(name, 0), after.get(name, 0)) / top
        text = f"{100 * before.get(name, 0):.0f} → {100 * after.get(name, 0):.0f}"
        parts.append(el("text", text, x=f"{end + 8:.1f}", y=y + 13, class_="tick"))
    return svg(width, high * len(names) + 6, "Tags before and after selection, in percent of instructions", *parts)
