"""What a run did, as one page that needs nothing but itself: no script, no font and no picture from elsewhere.

It can be mailed, kept beside the run and opened from a file. Everything that a model or a dataset says is escaped by
construction (`align.core.html`), and the page's own policy forbids scripts and requests on top of that.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from align.core.html import Child, Html, el, join
from align.core.plots import curve_charts
from align.core.writer import replace_file
from align.progress import duration
from align.report.details import step_card
from align.report.episodes import episode_table
from align.report.graph import pipeline_picture
from align.report.sections import ladder, reward_models, selection
from align.report.source import Run, read_run

FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, finished or not, and gives its path.

    Args:
        run_folder: the folder of a run, or of a single step.
        out: where the page goes; `report.html` in the run's folder by default.

    Raises:
        RunError: the folder is no run, or the page can't be written.
    """
    run = read_run(Path(run_folder))
    target = out or Path(run_folder) / FILE
    replace_file(target, render(run))
    return target


def render(run: Run) -> str:
    """The page."""
    style = Html(f"<style>{files('align.report').joinpath('style.css').read_text(encoding='utf-8')}</style>")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{run.name} · align"),
        style,
    )
    main = el(
        "main",
        _title(run),
        el("section", el("h2", "The pipeline"), pipeline_picture(run), id="pipeline"),
        ladder(run),
        selection(run),
        reward_models(run),
        _trainings(run),
        el("section", el("h2", "Step by step"), *(step_card(step) for step in run.steps), id="steps"),
    )
    footer = el("footer", "Made by ", el("code", "align report"), ". Scores are of held-out instructions.")
    return "<!doctype html>\n" + el("html", head, el("body", main, footer), lang="en") + "\n"


def _title(run: Run) -> Html:
    done = [step.manifest for step in run.steps if step.manifest]
    best = max(
        (step.scores["greedy"]["overall"]["score"] for step in run.evaluations if "greedy" in step.scores), default=None
    )
    facts: list[Child] = [
        _fact(f"{len(done)} of {len(run.steps)}", "steps done"),
        _fact(duration(sum(one.seconds for one in done)), "of work"),
        _fact(duration(sum(one.cpu_seconds for one in done)), "of CPU time"),
        _fact(f"{sum(one.rows or 0 for one in done):,}", "rows written"),
        _fact(f"{best:.1f}", "best greedy score") if best is not None else None,
        el("li", "seed ", el("b", run.seed)) if run.seed is not None else None,
    ]
    return el("header", el("p", "align", class_="brand"), el("h1", run.name), el("ul", *facts, class_="facts-row"))


def _fact(value: str, what: str) -> Html:
    return el("li", el("b", value), " ", what)


def _trainings(run: Run) -> Html | None:
    """The curves of every training, side by side under their headings."""
    parts: list[Child] = []
    for step in run.steps:
        lines = step.curves()
        drawn = curve_charts(lines)
        episodes = episode_table(step.manifest.summary, lines) if step.manifest else None
        if drawn or episodes:
            stage = el("span", f" {step.stage}", class_="stage") if step.stage != step.name else None
            parts += [el("h3", el("a", step.name, href=f"#step-{step.name}"), stage), episodes]
        for heading, charts in drawn.items():
            parts.append(join(el("h4", heading), el("div", *charts, class_="curves")))
    return el("section", el("h2", "Training"), *parts, id="training") if parts else None
