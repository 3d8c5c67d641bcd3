"""The tables at the end of a run: what each step took and gave, and the scores of each evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from align.core.manifest import Manifest
from align.progress import duration

MODES = {
    "greedy": "Verified score in %, greedy",
    "sampled": "Verified score in %, sampled",
    "pairs": "Chosen scored above rejected in %",
    "best-of-n": "Favourite of a prompt's completions right in %",
}
"""What a score is a share of, by the mode that its stage names."""


def print_steps(manifests: Sequence[Manifest], console: Console) -> None:
    """A row for each step: stage, rows, wall and CPU seconds."""
    table = Table("step", "stage", box=box.SIMPLE_HEAD, title="Steps", title_justify="left")
    for heading in ("gives", "time", "CPU"):
        table.add_column(heading, justify="right")
    for done in manifests:
        gives = "model" if done.rows is None else f"{done.rows} rows"
        table.add_row(done.step, done.stage, gives, duration(done.seconds), duration(done.cpu_seconds))
    total = [duration(sum(getattr(done, key) for done in manifests)) for key in ("seconds", "cpu_seconds")]
    table.add_row("all", "", "", *total, style="bold")
    console.print(table)


def print_ladder(manifests: Sequence[Manifest], console: Console) -> None:
    """The score of every evaluation with its 95% interval, by what was asked, whole and by family."""
    for mode, what in MODES.items():
        scored = [(done, done.summary["scores"][mode]) for done in manifests if mode in done.summary.get("scores", {})]
        if not scored:
            continue
        families = list(dict.fromkeys(family for _, scores in scored for family in scores.get("by_family", {})))
        title = f"{what}, with its 95% interval"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("step, its model", no_wrap=True)
        for heading in ("score", *families, "items", "time"):
            table.add_column(heading, justify="right", no_wrap=True)
        for done, scores in scored:
            judges = [origin.name for name, origin in done.inputs.items() if name == "reward_model"]
            models = ", ".join([origin.name for origin in done.engines.values()] or judges)
            cells = [_score(scores.get("by_family", {}).get(family)) for family in families]
            overall = scores["overall"]
            name = f"{done.step}\n[dim]{models}[/dim]"
            table.add_row(name, f"[bold]{_score(overall)}[/bold]", *cells, str(overall["n"]), duration(done.seconds))
        console.print(table)


def _score(score: Mapping[str, Any] | None) -> str:
    """A score, and its interval below it: `81.5` over `78.6–84.1`."""
    if score is None:
        return "–"
    return f"{score['score']:.1f}\n{score['low']:.1f}–{score['high']:.1f}"
