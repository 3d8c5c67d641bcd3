"""The pipeline as a picture: steps in layers from top to bottom, an edge from each step to those that use it.

Layers by longest path, order within a layer by the mean of its neighbours, long edges led through the layers between
(the method of Sugiyama, Tagawa and Toda, 1981). Evaluations are no boxes: their scores stand in that of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from align.core.html import Child, Html, el, join, svg
from align.progress import duration
from align.report.source import Run, Step

WIDTH, HEIGHT, GAP, RISE = 196.0, 64.0, 24.0, 40.0
THREAD = 14.0
"""Width that an edge takes where it passes a layer."""


@dataclass
class _Node:
    """A box, or the place where a long edge passes a layer (`step` is None)."""

    step: Step | None
    layer: int
    above: list[_Node] = field(default_factory=list)
    below: list[_Node] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> float:
        return WIDTH if self.step else THREAD

    @property
    def top(self) -> float:
        return self.layer * (HEIGHT + RISE) + 4


def pipeline_picture(run: Run) -> Html:
    """The steps that make something, with rows, seconds, state and the scores of the models."""
    shown = [step for step in run.steps if step.stage != "evaluate"] or run.steps
    names = {step.name for step in shown}
    needs = {step.name: [n for n in step.needs if n in names and n != step.name] for step in shown}
    used = {name for uses in needs.values() for name in uses}
    alone = [s for s in shown if not needs[s.name] and s.name not in used and len(shown) > 1]
    shown = [step for step in shown if step not in alone]
    layers, paths = _layered(shown, needs)
    for _ in range(8):
        for order in (layers, layers[::-1]):
            for layer in order:
                layer.sort(key=lambda node: (_mean(node), node.x))
                _place(layer)
    _pull_straight(layers)
    nodes = [node for layer in layers for node in layer]
    left = min((node.x - node.width / 2 for node in nodes), default=0.0) - 4
    for node in nodes:
        node.x -= left
    width = max((node.x + node.width / 2 for node in nodes), default=WIDTH) + 4
    scores = _scores_by_model(run)
    edges = [_edge(path, sampled) for path, sampled in paths]
    boxes = [_box(node, scores.get(node.step.name, [])) for node in nodes if node.step]
    height = len(layers) * (HEIGHT + RISE) - RISE + 8
    picture = svg(width, height, "The steps of the run and what they take from each other", *edges, *boxes)
    aside = [el("li", el("b", step.name), f" ({step.stage}, {_amount(step)})") for step in alone]
    return join(
        el(
            "p", "Whole lines: rows and weights taken from a step. ", el("span", "Dashed", class_="key sampled"),
            ": completions sampled from the model that it made.", class_="lead",
        ),
        el("div", picture, class_="wide"),
        el("p", "Only read by evaluations:", class_="note") if aside else None,
        el("ul", *aside, class_="note") if aside else None,
    )  # fmt: skip


def _layered(
    steps: Sequence[Step], needs: Mapping[str, Sequence[str]]
) -> tuple[list[list[_Node]], list[tuple[list[_Node], bool]]]:
    """Nodes by layer, and each edge as the nodes that it passes, with whether the lower samples from the upper."""
    layer: dict[str, int] = {}
    for step in steps:
        layer[step.name] = max((layer[n] + 1 for n in needs[step.name] if n in layer), default=0)
    for step in reversed(steps):  # what nothing comes before stands close to its first use
        users = [layer[s.name] for s in steps if step.name in needs[s.name]]
        if not needs[step.name] and users:
            layer[step.name] = min(users) - 1
    nodes = {step.name: _Node(step, layer[step.name]) for step in steps}
    layers: list[list[_Node]] = [[] for _ in range(max(layer.values(), default=0) + 1)]
    for node in nodes.values():
        layers[node.layer].append(node)
    paths = []
    for step in steps:
        for need in needs[step.name]:
            path = [nodes[need]]
            for between in range(layer[need] + 1, layer[step.name]):
                path.append(_Node(None, between))
                layers[between].append(path[-1])
            path.append(nodes[step.name])
            for upper, lower in pairwise(path):
                upper.below.append(lower)
                lower.above.append(upper)
            paths.append((path, need in step.samples_from))
    for one in layers:
        _place(one)
    return layers, paths


def _place(layer: list[_Node]) -> None:
    """Side by side in their order, about a common middle."""
    total = sum(node.width + GAP for node in layer) - GAP
    at = -total / 2
    for node in layer:
        node.x = at + node.width / 2
        at += node.width + GAP


def _mean(node: _Node) -> float:
    near = node.above + node.below
    return sum(other.x for other in near) / len(near) if near else node.x


def _pull_straight(layers: list[list[_Node]]) -> None:
    """Moves nodes towards their neighbours, never past those beside them."""
    for _ in range(60):
        for layer in layers:
            for place, node in enumerate(layer):
                wanted = _mean(node)
                if place:
                    before = layer[place - 1]
                    wanted = max(wanted, before.x + (before.width + node.width) / 2 + GAP)
                if place + 1 < len(layer):
                    after = layer[place + 1]
                    wanted = min(wanted, after.x - (after.width + node.width) / 2 - GAP)
                node.x += 0.5 * (wanted - node.x)


def _edge(path: list[_Node], sampled: bool) -> Html:
    start, *between, end = path
    at = (start.x, start.top + HEIGHT)
    line = f"M{at[0]:.1f} {at[1]:.1f}"
    for node in [*between, end]:
        to = (node.x, node.top)
        middle = (at[1] + to[1]) / 2
        line += f"C{at[0]:.1f} {middle:.1f} {to[0]:.1f} {middle:.1f} {to[0]:.1f} {to[1]:.1f}"
        if node is not end:
            line += f"L{node.x:.1f} {node.top + HEIGHT:.1f}"
            at = (node.x, node.top + HEIGHT)
    return el("path", d=line, class_="edge sampled" if sampled else "edge")


def _box(node: _Node, scores: Sequence[Html]) -> Html:
    step = node.step
    assert step is not None
    x, y = node.x - WIDTH / 2, node.top
    below: Sequence[Child] = scores or [_amount(step)]
    state = "box " + step.state.replace(" ", "-") + (" control" if step.is_control else "")
    lines: list[Child] = [
        el("text", _short(step.name, 23), x=f"{x + 14:.1f}", y=y + 20, class_="name"),
        el("text", _short(_what(step), 31), x=f"{x + 14:.1f}", y=y + 37, class_="what"),
        el("text", *below, x=f"{x + 14:.1f}", y=y + 54, class_="score" if scores else "what"),
    ]
    return el(
        "a",
        el("title", f"{step.name}: {step.stage}, {step.state}"),
        el("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=WIDTH, height=HEIGHT, rx=9, class_=state),
        el("rect", x=f"{x:.1f}", y=f"{y + 10:.1f}", width=4, height=HEIGHT - 20, rx=2, class_=f"mark {state}"),
        *lines,
        href=f"#step-{step.name}",
    )


def _what(step: Step) -> str:
    return f"{step.stage} · {duration(step.manifest.seconds)}" if step.manifest else step.stage


def _amount(step: Step) -> str:
    if step.manifest is None:
        return step.state
    rows = step.manifest.rows
    return "model" if rows is None else f"{rows:,} row{'' if rows == 1 else 's'}"


def _scores_by_model(run: Run) -> dict[str, list[Html]]:
    """What stands in a model's box: its greedy and its sampled score."""
    found: dict[str, list[Html]] = {}
    for step in run.evaluations:
        parts = [
            el(
                "tspan",
                f"{step.scores[mode]['overall']['score']:.1f}",
                f" {mode}",
                class_=mode,
                dx=10 if place else None,
            )
            for place, mode in enumerate(mode for mode in ("greedy", "sampled") if mode in step.scores)
        ]
        for model in step.samples_from:
            found.setdefault(model, parts)
    return found


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
