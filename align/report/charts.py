"""Charts as inline SVG that take their colours from the page: the ladder's intervals, training curves, tag bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.report.html import Child, Html, el, svg

MOST_POINTS = 240
"""A longer curve is drawn as the means of so many stretches."""

LEFT_OUT = frozenset({"step", "epoch", "num_tokens", "total_flos", "train_runtime"})


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


def curve_charts(lines: Sequence[Mapping[str, float]], most: int = 10) -> list[Html]:
    """A small chart of each figure over the optimizer steps; loss first, then in the order of the lines."""
    names = [name for name in dict.fromkeys(k for line in lines for k in line) if name not in LEFT_OUT]
    names.sort(key=lambda name: (name != "loss", "loss" not in name, _is_machinery(name)))
    charts: list[Html] = []
    for name in names:
        points = [(float(line["step"]), float(line[name])) for line in lines if name in line]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if len(points) > 1 and len(charts) < most:
            charts.append(_curve(name, points))
    return charts


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


def _curve(name: str, points: list[tuple[float, float]]) -> Html:
    width, height, left, bottom, top = 230.0, 138.0, 44.0, 22.0, 26.0
    points = _thinned(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    span = (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - 10) * (x - xs[0]) / span,
            top + (height - top - bottom) * (high - y) / (high - low),
        )

    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
    end_x, end_y = place(*points[-1])
    return svg(
        width, height, f"{name} over optimizer steps, from {ys[0]:.4g} to {ys[-1]:.4g}",
        el("text", name, x=left, y=15, class_="title"),
        el("line", x1=left, x2=width - 10, y1=top, y2=top, class_="grid"),
        el("line", x1=left, x2=width - 10, y1=height - bottom, y2=height - bottom, class_="grid"),
        el("text", _figure(high), x=left - 6, y=top + 4, class_="tick end"),
        el("text", _figure(low), x=left - 6, y=height - bottom + 4, class_="tick end"),
        el("text", f"{xs[0]:g}", x=left, y=height - 6, class_="tick"),
        el("text", f"{xs[-1]:g}", x=width - 10, y=height - 6, class_="tick end"),
        el("polyline", points=line, class_="curve"),
        el("circle", el("title", f"{ys[-1]:.5g} at step {xs[-1]:g}"), cx=f"{end_x:.1f}", cy=f"{end_y:.1f}", r=3,
           class_="curve-end"),
        class_="chart small",
    )  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    size = len(points) / MOST_POINTS
    parts = [points[int(i * size) : int((i + 1) * size)] for i in range(MOST_POINTS)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _is_machinery(name: str) -> bool:
    return any(word in name for word in ("learning_rate", "grad_norm", "time", "second", "logits", "entropy"))


def _figure(value: float) -> str:
    """Short enough to stand beside a chart: 0.214, 1,240, 2e-4."""
    if value != 0 and abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
