"""What the page says of the whole run: the ladder of scores, what selection did, may the reward model be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from align.core.errors import DataError
from align.core.html import Child, Html, el, join, table
from align.core.plots import best_of_n_chart, reliability_chart
from align.evaluate.scores import compare
from align.report.charts import bars, ladder_chart
from align.report.source import Run, Step

MODES = {"greedy": "Greedy", "sampled": "Sampled"}
BENCHES = {"pairs": "Chosen above rejected", "best-of-n": "Favourite right"}
"""What a score is a share of, by mode: of policies, and of reward models."""


def ladder(run: Run) -> Html | None:
    """Scores of every evaluation in order, each compared with the one before it; controls apart."""
    rungs = [step for step in run.evaluations if not step.is_control]
    controls = [step for step in run.evaluations if step.is_control]
    if not rungs and not controls:
        return None
    parts: list[Child] = [
        el("h2", "The ladder"),
        el(
            "p",
            "The share of held-out instructions answered rightly, as a program judges, in percent with its 95% "
            "interval (Wilson). ",
            el("span", "●", class_="key greedy"), " greedy, ",
            el("span", "●", class_="key sampled"), " sampled at temperature 1.",
            class_="lead",
        ),
    ]  # fmt: skip
    if rungs:
        before = {step.name: rung for rung, step in pairwise(rungs)}
        parts += [_chart(rungs), *_tables(rungs, before)]
    if controls:
        parts += [
            el("h3", "Controls"),
            el("p", "What a claim must be held against: the same effort without the stage's idea.", class_="lead"),
            _chart(controls),
            *_tables(controls, {step.name: _beside(step, rungs, run) for step in controls}),
        ]
    return el("section", *parts, id="ladder")


def _chart(steps: Sequence[Step]) -> Html:
    return el("div", ladder_chart([(_label(step), step.scores) for step in steps]), class_="wide")


def _label(step: Step) -> str:
    """The model that was evaluated; the step's own name where it is not known."""
    if step.manifest is None:
        return step.name
    models = [origin.name for origin in step.manifest.engines.values()]
    judges = [origin.name for name, origin in step.manifest.inputs.items() if name == "reward_model"]
    return next(iter([*models, *judges]), step.name)


def _tables(steps: Sequence[Step], against: Mapping[str, Step | None], modes: Mapping[str, str] = MODES) -> list[Html]:
    """A table for each mode: whole, by family, and against the step that `against` has under each one's name."""
    found = []
    for mode, title in modes.items():
        shown = [step for step in steps if mode in step.scores]
        if not shown:
            continue
        families = list(dict.fromkeys(name for step in shown for name in step.scores[mode].get("by_family", {})))
        rows: list[list[Child]] = []
        for step in shown:
            scores = step.scores[mode]
            cells = [_cell(scores.get("by_family", {}).get(family)) for family in families]
            rows.append(
                [
                    el("a", _label(step), href=f"#step-{step.name}"), _cell(scores["overall"], strong=True), *cells,
                    _versus(against.get(step.name), step, mode), _apart(scores), str(scores["overall"]["n"]),
                ]
            )  # fmt: skip
        head: list[Child] = [title, "score", *families, "compared", "not judged", "items"]
        found.append(table(head, rows, "scores"))
    return found


def _beside(control: Step, rungs: Sequence[Step], run: Run) -> Step | None:
    """The rung that a control is a control of: the one whose model was made by the most nearly same steps."""
    steps = {step.name: step for step in run.steps}

    def made_by(evaluation: Step) -> set[str]:
        found: set[str] = set()
        waiting = [need for model in evaluation.samples_from if model in steps for need in steps[model].needs]
        while waiting:
            name = waiting.pop()
            if name not in found and name in steps:
                found.add(name)
                waiting += steps[name].needs
        return found

    own = made_by(control)

    def likeness(rung: Step) -> float:
        other = made_by(rung)
        return len(own & other) / (len(own | other) or 1)

    return max(rungs, key=likeness, default=None)


def _cell(score: Mapping[str, Any] | None, strong: bool = False) -> Html:
    if score is None:
        return el("span", "–", class_="faint")
    number = el("b" if strong else "span", f"{score['score']:.1f}")
    return join(number, el("small", f"{score['low']:.0f}–{score['high']:.0f}"))


def _versus(before: Step | None, step: Step, mode: str) -> Html:
    """McNemar's test on the shared items."""
    tables = (before.table() if before else None, step.table())
    if before is None or tables[0] is None or tables[1] is None:
        return el("span", "–", class_="faint")
    try:
        found = compare(tables[0], tables[1]).get(mode)
    except DataError:
        found = None
    if found is None:
        return el("span", "other items", class_="faint")
    change = found["b"] - found["a"]
    sure = "" if found["p"] < 0.05 else " unsure"
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    return join(
        el("span", f"{change:+.1f}", class_=("up" if change >= 0 else "down") + sure),
        el("small", f"{_label(before)} · z {found['z']:+.1f} · {p}"),
    )


def _apart(scores: Mapping[str, Any]) -> Html:
    """Completions that counted as failed without a verdict on their content."""
    parts = [f"{scores[name]} {what}" for name, what in _APART.items() if scores.get(name)]
    return el("small", ", ".join(parts)) if parts else el("span", "–", class_="faint")


_APART = {"truncated": "cut off", "timeouts": "timed out", "errors": "errors"}


def selection(run: Run) -> Html | None:
    """Tags of the pool and of what was chosen from it."""
    parts: list[Child] = []
    for step in run.steps:
        found = step.manifest.summary if step.manifest else {}
        if step.stage != "select" or not found.get("tags_before"):
            continue
        pool, chosen = max(1, found.get("pool", 1)), max(1, found.get("selected", 1))
        figures: list[list[Child]] = [
            [what, _number(found.get(f"{key}_before")), _number(found.get(f"{key}_after"))]
            for key, what in _TAG_FIGURES.items()
            if f"{key}_before" in found
        ]
        parts += [
            el("h3", el("a", step.name, href=f"#step-{step.name}"), f": {chosen:,} of {pool:,}"),
            table(["", "pool", "chosen"], figures),
            el(
                "div",
                bars(
                    {tag: count / pool for tag, count in found["tags_before"].items()},
                    {tag: count / chosen for tag, count in found.get("tags_after", {}).items()},
                ),
                class_="wide",
            ),
        ]
    if not parts:
        return None
    lead = el(
        "p", "Percent of instructions that have a tag, in the pool ", el("span", "■", class_="key before"),
        " and among the chosen ", el("span", "■", class_="key after"), ".", class_="lead",
    )  # fmt: skip
    return el("section", el("h2", "Tags before and after selection"), lead, *parts, id="selection")


_TAG_FIGURES = {
    "complexity": "tags an instruction",
    "richness": "semantic richness",
    "coverage": "share of all tags",
}


def reward_models(run: Run) -> Html | None:
    """Best-of-n against sampled and oracle, and the gate of each family."""
    parts: list[Child] = []
    for step in run.steps:
        found = step.manifest.summary if step.manifest else {}
        if "by_family" not in found or "best_of_n" not in found.get("overall", {}):
            continue
        rows = [_judged(name, figures) for name, figures in {**found["by_family"], "all": found["overall"]}.items()]
        head: list[Child] = [
            "family", "prompts", "sampled", "best of n", "oracle", "pairs right", "length corr.",
    "best above", "worst below", "accepted", "best-worst right",
        ]  # fmt: skip
        closed = [
            el("li", el("b", name), f": {figures['gate']['closed']}")
            for name, figures in found["by_family"].items()
            if figures.get("gate") and figures["gate"].get("closed")
        ]
        parts += [el("h3", el("a", step.name, href=f"#step-{step.name}")), table(head, rows), *_reward_charts(found)]
        if closed:
            parts += [el("p", "Not believed, whatever it says:", class_="note"), el("ul", *closed, class_="note")]
    benches = [step for step in run.steps if BENCHES.keys() & step.scores.keys()]
    if benches:
        before = {step.name: bench for bench, step in pairwise(benches)}
        parts += [el("h3", "On labelled data"), *_tables(benches, before, BENCHES)]
    if not parts:
        return None
    lead = el(
        "p",
        "On held-out prompts: how often the completion that the reward model likes best is right, against the average "
        "sample and the best there is, in percent. A pair is accepted only above and below the family's thresholds.",
        class_="lead",
    )
    return el("section", el("h2", "May the reward model be believed?"), lead, *parts, id="reward")


def _reward_charts(found: Mapping[str, Any]) -> list[Child]:
    """Best-of-n by family over n, and whether the margins mean what they say."""
    judged = {"all": found["overall"], **found["by_family"]}
    curves = [best_of_n_chart(name, one.get("best_of_n_curve") or []) for name, one in judged.items()]
    parts: list[Child] = []
    if any(curves):
        lead = (
            "How often the favourite of n samples is right, in percent with its 95% interval, over n; pale the average "
            "sample and the best there is. Green is surely above the samples, red below them."
        )
        parts += [el("h4", "Best of n"), el("p", lead, class_="note"), el("div", *curves, class_="curves")]
    calibration = found["overall"].get("calibration")
    if chart := reliability_chart("all pairs", calibration):
        temperature = calibration["temperature"]
        told = (
            "Share of pairs that are right, against how sure the reward model is of them; off by "
            f"{_percent(calibration['ece'])} points on average"
            + (
                f", {_percent(calibration['ece_fitted'])} with scores divided by {temperature:.2f}."
                if temperature
                else "."
            )
        )
        parts += [el("h4", "Calibration"), el("p", told, class_="note"), el("div", chart, class_="curves")]
    return parts


def _judged(name: str, figures: Mapping[str, Any]) -> list[Child]:
    gate = figures.get("gate") or {}
    better = figures["best_of_n"] >= figures["sampled"]
    return [
        el("b", name) if name == "all" else name,
        figures["groups"],
        _percent(figures["sampled"]),
        el("b", _percent(figures["best_of_n"]), class_="up" if better else "down"),
        _percent(figures["oracle"]),
        _percent(figures["pair_accuracy"]),
        _number(figures["length_correlation"]),
        el("span", "closed", class_="down") if gate.get("closed") else _number(gate.get("best_above")),
        "" if gate.get("closed") else _number(gate.get("worst_below")),
        _percent(figures["accepted"]),
        join(_percent(figures["right_pairs"]), " → ", _percent(figures["right_pairs_gated"])),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
