"""What the page says of each step: what it read and gave, some of its rows, settings and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.core.html import Child, Html, el, join, table
from align.core.records import Row
from align.progress import duration
from align.report.source import Step

SHOWN = 5
LONGEST = 1500
"""Rows shown of a step, and characters of a text in them."""

SHOWN_ELSEWHERE = frozenset(
    {"scores", "by_family", "overall", "tags_before", "tags_after", "evaluations", "yield", "lost", "episodes"}
)


def step_card(step: Step) -> Html:
    """One step, closed but for its head."""
    done = step.manifest
    if done is None:
        head = el("summary", _title(step), el("span", "to do", class_="pill to-do"))
        return el("details", head, class_="step", id=f"step-{step.name}")
    gives = "model" if done.rows is None else f"{done.rows:,} rows"
    head = el(
        "summary", _title(step), el("span", gives, class_="pill"),
        el("span", f"{duration(done.seconds)}, {duration(done.cpu_seconds)} CPU", class_="faint time"),
    )  # fmt: skip
    rows = [_row(row) for row in step.some_rows(SHOWN)]
    figures = {name: value for name, value in done.summary.items() if name not in SHOWN_ELSEWHERE}
    return el(
        "details",
        head,
        el("p", *_origins(step), class_="from"),
        _warnings(done.summary),
        _yield(done.summary),
        join(el("h4", "Some rows"), *rows) if rows else None,
        join(el("h4", "Figures"), _facts(figures)) if figures else None,
        el("h4", "Settings"),
        _facts(done.settings),
        _fine_print(step),
        class_="step",
        id=f"step-{step.name}",
    )


def _title(step: Step) -> Html:
    return join(el("b", step.name), " ", el("span", step.stage, class_="stage") if step.stage != step.name else None)


def _origins(step: Step) -> list[Child]:
    """Each input and engine, those of this run as links."""
    done = step.manifest
    assert done is not None
    parts: list[Child] = []
    for role, origin in [*done.inputs.items(), *done.engines.items()]:
        name: Child = el("a", origin.name, href=f"#step-{origin.step}") if origin.step else el("code", origin.name)
        parts += [" · " if parts else "", f"{role} ", name]
    return parts or ["from nothing but its settings"]


def _warnings(summary: Mapping[str, Any]) -> Html | None:
    found = summary.get("warnings")
    if not isinstance(found, list) or not found:
        return None
    return el("ul", *(el("li", str(line)) for line in found), class_="warnings")


def _yield(summary: Mapping[str, Any]) -> Html | None:
    """How many were left after each step, and why the others were lost."""
    found = []
    for title, key in (("Yield", "yield"), ("Lost", "lost")):
        if isinstance(counts := summary.get(key), Mapping) and counts:
            rows: list[list[Child]] = [[name, f"{count:,}"] for name, count in counts.items()]
            found += [el("h4", title), table(["", ""], rows)]
    return join(*found) if found else None


def _row(row: Row) -> Html:
    """A row as a person reads it: the conversation, then its verdict and where it comes from."""
    parts: list[Child] = []
    if row.get("prompt"):
        parts.append(_said("prompt", row["prompt"]))
    for name in ("completion", "chosen", "rejected"):
        if row.get(name):
            parts.append(_said(name, row[name]))
    if not parts:
        return el("div", _facts({k: v for k, v in row.items() if v is not None}), class_="row")
    marks: list[Child] = []
    verdict = row.get("verdict")
    if verdict:
        marks.append(el("span", verdict, class_=f"pill {'' if verdict in _VERDICTS else 'other '}{verdict}"))
    for name in ("family", "mode", "generator", "split", "margin", "kept"):
        if row.get(name) is not None:
            value = f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name])
            marks.append(el("span", f"{name} ", el("b", value), class_="fact"))
    if row.get("tags"):
        marks += [el("span", str(tag), class_="tag") for tag in row["tags"]]
    if row.get("detail"):
        marks.append(el("span", _cut(str(row["detail"]), 200), class_="detail"))
    return el("div", *parts, el("p", *marks, class_="marks"), class_="row")


_VERDICTS = ("passed", "failed", "error")


def _said(name: str, messages: Any) -> Html:
    """Messages (or text) under their name; a turn's role is named where there are several."""
    if isinstance(messages, str):
        text = messages
    elif len(messages) == 1:
        text = str(messages[0].get("content") or "")
    else:
        text = "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)
    return el("div", el("span", name, class_="who"), el("pre", _cut(text, LONGEST)), class_=f"said {name}")


def _facts(values: Mapping[str, Any]) -> Html:
    if not values:
        return el("p", "none", class_="faint")
    rows: list[list[Child]] = [
        [el("code", name), el("pre", _cut(_text(value), LONGEST))] for name, value in values.items()
    ]
    return table(["", ""], rows, "facts", text_columns=2)


def _fine_print(step: Step) -> Html:
    done = step.manifest
    assert done is not None
    versions = ", ".join(f"{name} {version}" for name, version in done.versions.items())
    return el(
        "p", f"seed {done.seed} · stage version {done.version} · fingerprint ", el("code", done.fingerprint),
        f" · {versions}" if versions else None, class_="fine",
    )  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping | Sequence) and len(json.dumps(value, default=str)) > 80:
        return json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"
