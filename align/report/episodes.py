"""What became of each episode of online DPO, as a table: what was sampled, what the guards saw, what was undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.core.html import Child, Html, el, join, table

SAMPLED = {"prompts": "prompts", "pairs": "pairs", "steps": "steps", "reward": "reward", "length": "tokens"}
"""Of the samples that an episode trained on; the means over all of them."""

SEEN = {
    "score": "held-out score", "benign": "benign help", "harmful": "harmful refusal", "second_reward": "second reward",
    "kl": "KL",
}  # fmt: skip
"""Of the guards' look after it."""


def episode_table(summary: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> Html | None:
    """The start, then a row an episode; below, why any was rolled back. None for what has no episodes.

    Args:
        summary: of the step.
        curves: its lines of metrics.jsonl, in which the look at the start is.
    """
    records = summary.get("episodes")
    if not isinstance(records, Sequence) or not all(isinstance(one, Mapping) for one in records) or not records:
        return None
    sampled = {name: title for name, title in SAMPLED.items() if any(one.get(name) is not None for one in records)}
    seen = {name: title for name, title in SEEN.items() if any(name in one.get("probe", {}) for one in records)}
    start = next((line for line in curves if line.get("episode") == 0), {})
    rows: list[list[Child]] = [
        ["start", *("" for _ in sampled), *(_figure(start.get(f"heldout/{name}")) for name in seen), ""]
    ]
    rows += [
        [
            str(one["episode"]),
            *(_figure(one.get(name)) for name in sampled),
            *(_figure(one.get("probe", {}).get(name)) for name in seen),
            el("span", "rolled back", class_="down") if one.get("rolled_back") else "kept",
        ]
        for one in records
    ]
    undone = [
        el("li", el("b", f"episode {one['episode']}"), f": {reason}")
        for one in records
        for reason in one.get("rolled_back") or []
    ]
    ended = [el("li", el("b", "ended"), f": {one['stopped']}") for one in records if one.get("stopped")]
    head: list[Child] = ["episode", *sampled.values(), *seen.values(), ""]
    why = el("ul", *undone, *ended, class_="warnings") if undone or ended else None
    note = "Reward and tokens are of the samples; what follows, of held-out prompts after the episode."
    return join(el("h4", "Episodes"), el("p", note, class_="note"), table(head, rows), why)


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
