"""The plot of alignment_tax.py: what was gained on the trained families against what became of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.core.html import Child, Html, el, join, svg
from align.core.plots import STYLE

COLOURS = {
    "AdamW": "#1f2328", "NLL": "#b3372f", "OnDARE": "#0f6e6a", "OnTIES": "#1a7f4b",
    "linear": "#8b929c", "dare": "#c98a00", "ties": "#6a4fb3",
}  # fmt: skip
"""By a method's first word."""
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 420.0, 330.0, 50.0, 12.0, 34.0, 44.0


def drawn(means: Mapping[str, Any], trained: Sequence[str], others: Sequence[str]) -> str:
    """Gain against what became of the others, at T = 1: a frame for each training, a dot for each method."""
    frames = [frame(training, methods, trained, others) for training, methods in means.items()]
    placed = [el("g", one, transform=f"translate({place * WIDE:g} 0)") for place, one in enumerate(frames)]
    wide, high = WIDE * len(frames), HIGH
    label = "Gain on the trained families against change of the others, by method"
    paper = el("rect", x=0.5, y=0.5, width=wide - 1, height=high - 1, rx=10, class_="paper")
    whole = svg(wide, high, label, Html(f"<style>{STYLE}</style>"), paper, *placed)
    return whole.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def frame(training: str, methods: Mapping[str, Any], trained: Sequence[str], others: Sequence[str]) -> Html:
    """One training's dots with their names; crosses are a standard error over the seeds."""
    points = {m: (modes["sampled"]["gain"], modes["sampled"]["others"]) for m, modes in methods.items()}
    spans: list[tuple[float, float]] = []
    for axis in (0, 1):
        ends: list[float] = [0.0] + [
            p[axis]["mean"] + s * p[axis]["standard_error"] for p in points.values() for s in (-1, 1)
        ]
        spare = 0.06 * (max(ends) - min(ends))
        spans.append((min(ends) - spare, max(ends) + spare))
    (x0, x1), (y0, y1) = spans

    def x(value: float) -> float:
        return LEFT + (WIDE - LEFT - RIGHT) * (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        return TOP + (HIGH - TOP - BOTTOM) * (y1 - value) / (y1 - y0)

    parts: list[Child] = [el("text", f"{training}: DPO on {', '.join(trained)}", x=LEFT, y=20, class_="title")]
    for tick in ticks(x0, x1):
        parts.append(el("line", x1=x(tick), x2=x(tick), y1=TOP, y2=HIGH - BOTTOM, class_="grid"))
        parts.append(
            el(
                "text",
                f"{tick:+g}" if tick else "0",
                x=x(tick),
                y=HIGH - BOTTOM + 15,
                class_="tick",
                text_anchor="middle",
            )
        )
    for tick in ticks(y0, y1):
        parts.append(el("line", x1=LEFT, x2=WIDE - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", f"{tick:+g}" if tick else "0", x=LEFT - 6, y=y(tick) + 4, class_="tick end"))
    parts.append(el("text", "points gained on the trained families", x=LEFT, y=HIGH - 10, class_="tick"))
    turned = f"rotate(-90 14 {HIGH - BOTTOM:g})"
    parts.append(el("text", f"points on {', '.join(others)}", x=14, y=HIGH - BOTTOM, class_="tick", transform=turned))
    labels: list[tuple[float, float]] = []
    for method, (gain, rest) in sorted(points.items(), key=lambda item: -item[1][1]["mean"]):
        colour = COLOURS[method.split()[0]]
        (a, da), (b, db) = ((one["mean"], one["standard_error"]) for one in (gain, rest))
        for p, q, r, s in ((a - da, a + da, b, b), (a, a, b - db, b + db)):
            parts.append(el("line", x1=x(p), x2=x(q), y1=y(r), y2=y(s), stroke=colour, opacity=0.3))
        told = el("title", f"{method}: {a:+.1f} ± {da:.1f} trained, {b:+.1f} ± {db:.1f} others")
        parts.append(el("circle", told, cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r=4, fill=colour))
        left = x(a) > WIDE - 120
        place = (x(a) + 12, y(b) - 8) if left else (x(a) + 8, y(b) + 4)
        while any(abs(place[0] - other[0]) < 130 and abs(place[1] - other[1]) < 11 for other in labels):
            place = (place[0], place[1] + 3)
        labels.append(place)
        anchor = "end" if left else "start"
        parts.append(el("text", method, x=place[0], y=place[1], style=f"fill: {colour}; font-size: 10px",
                        text_anchor=anchor))  # fmt: skip
    return join(*parts)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at most seven."""
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (high - low) / s <= 7)
    return [float(n * step) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
