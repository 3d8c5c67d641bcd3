"""Plots of a training as SVG: curves over the steps, a reward model's best-of-n, how well its margins are calibrated.

The report takes their colours from its own page. `picture` is a file by itself, for the card beside a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align.core.html import Child, Html, el, join, svg

MOST_POINTS = 240
"""A longer curve is drawn as the means of so many stretches."""

MOST_CHARTS = 8
"""Under one heading."""

LEFT_OUT = frozenset(
    {"step", "epoch", "tokens", "supervised_tokens", "num_tokens", "total_flos", "train_runtime", "episode", "pairs",
     "rolled_back"}
)  # fmt: skip

HEADINGS = ("Learning", "Held out", "Preferences", "Machinery")
"""In this order: what is minimised, what it is for, how it gets there, and what a debugger looks at."""

WIDTH, HEIGHT = 230.0, 138.0
"""Of a small chart."""

_SIDES = re.compile(r"(?P<of>.+)[/_](?P<side>chosen|rejected|better|worse)(?P<what>_\w+)?")
_COLOURS = {"chosen": "chosen", "better": "chosen", "rejected": "rejected", "worse": "rejected"}
_FAMILY = re.compile(r"(?P<of>heldout/score)/(?P<family>.+)")
_MACHINERY = ("learning_rate", "grad_norm", "time", "second", "logits", "entropy", "tokens", "router")

Points = list[tuple[float, float]]

STYLE = """
text { fill: #1f2328; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
text.end { text-anchor: end; } .tick { fill: #8b929c; font-size: 11px; } .title { fill: #5b636e; }
.paper { fill: #ffffff; stroke: #e3e0d8; } .grid { stroke: #e3e0d8; }
.curve { fill: none; stroke: #0f6e6a; stroke-width: 1.6; stroke-linejoin: round; } .curve-end { fill: #0f6e6a; }
.curve.chosen { stroke: #1a7f4b; } .curve-end.chosen, .key.chosen { fill: #1a7f4b; }
.curve.rejected { stroke: #b3372f; } .curve-end.rejected, .key.rejected { fill: #b3372f; }
.curve.pale { stroke: #8b929c; stroke-width: 1; opacity: .7; } .curve-end.pale, .key.pale { fill: #8b929c; }
.band { fill: #0f6e6a; opacity: .15; } .dot { fill: #0f6e6a; } .undone { fill: none; stroke: #b3372f; }
"""


class Chart(NamedTuple):
    """One or more curves in one frame.

    Attributes:
        heading: one of `HEADINGS`.
        title: what is shown.
        series: points by name; the name is empty where there is one curve.
        undone: points by name that a roll-back undid (online DPO): beside the curve, not of it.
    """

    heading: str
    title: str
    series: Mapping[str, Points]
    undone: Mapping[str, Points] = {}


def charts_of(lines: Sequence[Mapping[str, float]]) -> list[Chart]:
    """What the lines of metrics.jsonl hold, by heading: chosen beside rejected, and families, in one frame each."""
    found: dict[tuple[str, str], dict[str, Points]] = {}
    undone: dict[tuple[str, str], dict[str, Points]] = {}
    for name in dict.fromkeys(name for line in lines for name in line if name not in LEFT_OUT):
        known = [line for line in lines if name in line and math.isfinite(line[name])]
        points, lost = (
            [(float(line["step"]), float(line[name])) for line in known if bool(line.get("rolled_back")) is back]
            for back in (False, True)
        )
        if len(known) < 2 or not points:
            continue
        if sides := _SIDES.fullmatch(name):
            title, series = sides["of"] + (sides["what"] or "").replace("_", " "), sides["side"]
        elif family := _FAMILY.fullmatch(name):
            title, series = f"{family['of']} by family", family["family"]
        else:
            title, series = name, ""
        found.setdefault((_heading(name), title), {})[series] = points
        if lost:
            undone.setdefault((_heading(name), title), {})[series] = lost
    charts = [Chart(*key, series, undone.get(key, {})) for key, series in found.items()]
    return sorted(charts, key=lambda chart: (HEADINGS.index(chart.heading), chart.title != "loss"))


def _heading(name: str) -> str:
    if name.startswith("heldout/"):
        return "Held out"
    if any(word in name for word in _MACHINERY):
        return "Machinery"
    learning = "loss" in name or name.startswith("eval") or name in ("best_of_n", "mean_token_accuracy")
    return "Learning" if learning else "Preferences"


def curve_charts(lines: Sequence[Mapping[str, float]]) -> dict[str, list[Html]]:
    """A small chart of each figure over the optimizer steps, by heading."""
    drawn: dict[str, list[Html]] = {}
    for chart in charts_of(lines):
        under = drawn.setdefault(chart.heading, [])
        if len(under) < MOST_CHARTS:
            under.append(curve_chart(chart))
    return drawn


def curve_chart(chart: Chart) -> Html:
    """Its curves in one frame, the last point of each marked."""
    series = {name: _thinned(points) for name, points in chart.series.items()}
    frame = _Frame.around([*series.values(), *chart.undone.values()])
    parts: list[Child] = [frame.drawn(chart.title), *_keys([name for name in series if name])]
    told = []
    for name, points in series.items():
        kind = f" {_COLOURS.get(name, 'pale')}" if name else ""
        x, y = frame.place(*points[-1])
        last = f"{name} {points[-1][1]:.5g} at step {points[-1][0]:g}".strip()
        parts.append(el("polyline", el("title", last), points=frame.line(points), class_=f"curve{kind}"))
        parts.append(el("circle", el("title", last), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"curve-end{kind}"))
        told.append(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}".strip())
    for name, points in chart.undone.items():
        for step, value in points:
            x, y = frame.place(step, value)
            last = f"{name} {value:.5g} at step {step:g}, rolled back".strip()
            parts.append(el("circle", el("title", last), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5, class_="undone"))
            told.append(last)
    label = f"{chart.title} over optimizer steps, {'; '.join(told)}"
    return svg(WIDTH, HEIGHT, label, *parts, class_="chart small")


def best_of_n_chart(title: str, curve: Sequence[Mapping[str, float]]) -> Html | None:
    """How often the favourite of n is right, with its 95% interval, between the average sample and the best of them.

    Args:
        title: the family.
        curve: see `reward.figures.best_of_n_curve`.
    """
    if len(curve) < 2:
        return None

    def points(name: str) -> Points:
        return [(math.log2(one["n"]), 100 * one[name]) for one in curve]

    frame = _Frame.around([points("sampled"), points("oracle"), points("low"), points("high")])
    band = [*points("low"), *reversed(points("high"))]
    last = curve[-1]
    sure = " (surely above samples)" if last["gain_low"] > 0 else " (below samples)" if last["gain_high"] < 0 else ""
    told = f"best of {last['n']:g}: {100 * last['best_of_n']:.1f}%, samples {100 * last['sampled']:.1f}%{sure}"
    x, y = frame.place(*points("best_of_n")[-1])
    verdict = "chosen" if last["gain_low"] > 0 else "rejected" if last["gain_high"] < 0 else ""
    return svg(
        WIDTH, HEIGHT, f"{title}: {told}",
        frame.drawn(title, first=f"n = {curve[0]['n']:g}", last=f"{last['n']:g}"),
        el("polygon", points=frame.line(band), class_="band"),
        *(el("polyline", el("title", name), points=frame.line(points(name)), class_="curve pale")
          for name in ("sampled", "oracle")),
        el("polyline", el("title", told), points=frame.line(points("best_of_n")), class_=f"curve {verdict}".strip()),
        el("circle", el("title", told), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"curve-end {verdict}".strip()),
        class_="chart small",
    )  # fmt: skip


def reliability_chart(title: str, calibration: Mapping[str, Any] | None) -> Html | None:
    """How often a pair that the reward model is so sure of is right: on the diagonal it means what it says."""
    bins = (calibration or {}).get("bins") or []
    if len(bins) < 2:
        return None
    frame = _Frame(50.0, 100.0, 0.0, 100.0)
    most = max(one["pairs"] for one in bins)
    dots = []
    for one in bins:
        x, y = frame.place(min(100.0, max(50.0, 100 * one["said"])), 100 * one["right"])
        told = f"said {100 * one['said']:.0f}%, right {100 * one['right']:.0f}% of {one['pairs']} pairs"
        radius = 2 + 4 * math.sqrt(one["pairs"] / most)
        dots.append(el("circle", el("title", told), cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", class_="dot"))
    return svg(
        WIDTH, HEIGHT, f"{title}: how often pairs are right against how sure the reward model is",
        frame.drawn(title, first="said 50%", last="100%"),
        el("polyline", points=frame.line([(50, 50), (100, 100)]), class_="curve pale"),
        *dots, class_="chart small",
    )  # fmt: skip


def picture(charts: Sequence[Html], columns: int = 3) -> str:
    """Charts in rows, as an SVG file that needs nothing else."""
    gap = 14.0
    rows = math.ceil(len(charts) / columns)
    wide, high = columns * (WIDTH + gap) + gap, rows * (HEIGHT + gap) + gap
    placed: list[Child] = []
    for number, chart in enumerate(charts):
        x, y = gap + number % columns * (WIDTH + gap), gap + number // columns * (HEIGHT + gap)
        placed.append(el("g", chart, transform=f"translate({x:g} {y:g})"))
    whole = svg(
        wide, high, "Curves of the training",
        Html(f"<style>{STYLE}</style>"),
        el("rect", x=0.5, y=0.5, width=wide - 1, height=high - 1, rx=10, class_="paper"),
        *placed,
    )  # fmt: skip
    return whole.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


class _Frame(NamedTuple):
    """The range of a small chart, and where a point lies in it."""

    left: float
    right: float
    low: float
    high: float

    @staticmethod
    def around(series: Iterable[Points]) -> _Frame:
        points = [point for one in series for point in one]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        if high - low < 1e-12:
            low, high = low - 0.5, high + 0.5
        return _Frame(min(xs), max(xs), low, high)

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, bottom, top = 44.0, 22.0, 26.0
        return (
            left + (WIDTH - left - 10) * (x - self.left) / ((self.right - self.left) or 1.0),
            top + (HEIGHT - top - bottom) * (self.high - y) / (self.high - self.low),
        )

    def line(self, points: Points) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))

    def drawn(self, title: str, first: str = "", last: str = "") -> Html:
        (x1, y1), (x2, y2) = self.place(self.left, self.low), self.place(self.right, self.high)
        return join(
            el("text", title, x=x1, y=15, class_="title"),
            el("line", x1=x1, x2=x2, y1=y2, y2=y2, class_="grid"),
            el("line", x1=x1, x2=x2, y1=y1, y2=y1, class_="grid"),
            el("text", _figure(self.high), x=x1 - 6, y=y2 + 4, class_="tick end"),
            el("text", _figure(self.low), x=x1 - 6, y=y1 + 4, class_="tick end"),
            el("text", first or f"{self.left:g}", x=x1, y=HEIGHT - 6, class_="tick"),
            el("text", last or f"{self.right:g}", x=x2, y=HEIGHT - 6, class_="tick end"),
        )


def _keys(names: Sequence[str]) -> list[Html]:
    """Which colour is which, between the ends of the steps' line; families are told by their curves' titles."""
    sides = [name for name in names if name in _COLOURS]
    return [
        el("text", name, x=WIDTH - 50 - 52 * place, y=HEIGHT - 6, class_=f"tick key end {_COLOURS[name]}")
        for place, name in enumerate(reversed(sides))
    ]


def _thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    size = len(points) / MOST_POINTS
    parts = [points[int(i * size) : int((i + 1) * size)] for i in range(MOST_POINTS)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _figure(value: float) -> str:
    """Short enough to stand beside a chart: 0.214, 1,240, 2e-4."""
    if value != 0 and abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
