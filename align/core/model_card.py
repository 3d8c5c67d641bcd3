"""The card (README.md) beside a trained model, with its curves as a picture: for people, and for the Hub.

It says what the model is, what it was made from down to the sources, with which settings and versions, what was
measured, how to use it, and what it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.core.ancestry import Ancestor, ancestors_of, base_models, hub_id, shown, sources_in
from align.core.card import Card, cell, plain, read_licenses
from align.core.html import Html
from align.core.manifest import Origin
from align.core.plots import best_of_n_chart, charts_of, curve_chart, reliability_chart
from align.core.plots import picture as drawn
from align.core.records import Kind
from align.core.writer import replace_file

PICTURE = "curves.svg"
MOST_CHARTS = 9
_TRL_TAGS = {
    "sft": ["trl", "sft"],
    "dpo": ["trl", "dpo"],
    "online-dpo": ["trl", "dpo", "online-dpo"],
    "replay": ["trl", "dpo"],
}
_SPOKEN = {
    "sft": "fine-tuned on demonstrations",
    "dpo": "trained to prefer the chosen completion to the rejected one (DPO, arXiv:2305.18290)",
    "online-dpo": "trained on pairs of its own completions, episode by episode (online DPO, arXiv:2407.10671)",
    "replay": "trained on the pairs that an online DPO run has sampled (a replay)",
}


def write_model_card(
    folder: Path, card: Card, kind: Kind, origins: Mapping[str, Origin], more: Mapping[str, str]
) -> None:
    """Writes the card, and the picture of the curves where there are any.

    Args:
        folder: the step's; the model lies in `folder / "model"`, the curves in `folder / "metrics.jsonl"`.
        card: what trained it.
        kind: MODEL or REWARD_MODEL.
        origins: where each input came from.
        more: the versions of the libraries.
    """
    charts = _charts(folder / "metrics.jsonl", card.summary)
    if charts:
        replace_file(folder / "model" / PICTURE, drawn(charts))
    ancestors = ancestors_of(origins.values(), folder.parent)
    text = model_card(card, kind, origins, ancestors, more, pictured=bool(charts), adapters=_is_adapter(folder))
    replace_file(folder / "model" / "README.md", text)


def model_card(
    card: Card, kind: Kind, origins: Mapping[str, Origin], ancestors: Sequence[Ancestor], versions: Mapping[str, str],
    pictured: bool = False, adapters: bool = False,
) -> str:  # fmt: skip
    """Its text: the Hub's header, then the page."""
    rewards = kind is Kind.REWARD_MODEL
    stage = card.stage.split()[0] if card.stage else ""
    outside = [each.path for each in ancestors if each.manifest is None]
    models = base_models(origins, ancestors)
    header: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-classification" if rewards else "text-generation",
        "tags": list(dict.fromkeys(["align", kind.value, stage, *_TRL_TAGS.get(stage, [])])),
    }
    if bases := [found for name in models if (found := hub_id(name))]:
        header["base_model"] = bases[0]
        header["base_model_relation"] = "adapter" if adapters else "finetune"
    if data := [found for name in outside if name not in models and (found := hub_id(name))]:
        header["datasets"] = list(dict.fromkeys(data))
    if licences := {licence for name in models for licence in read_licenses(Path(name)).values()}:
        header["license"] = licences.pop() if len(licences) == 1 else "other"

    page = [f"# {card.title}", "", _what(card, stage, kind, adapters), ""]
    if warnings := card.summary.get("warnings"):
        page += ["**Warnings of the training:**", "", *(f"- {line}" for line in warnings), ""]
    page += [*_data(card), *_lineage(ancestors)]
    page += _reward_figures(card.summary) if rewards else []
    page += _figures(card.summary)
    page += ["", f"![Curves of the training]({PICTURE})"] if pictured else []
    page += ["", "## How to use it", "", *_use(kind, adapters)]
    page += ["", "## What it is not", "", *(f"- {line}" for line in _limits(card, kind))]
    page += _settings(card)
    page += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in versions.items()), ""]
    top = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n" + "\n".join(page)


def _charts(curves: Path, summary: Mapping[str, Any]) -> list[Html]:
    lines = []
    for line in curves.read_text(encoding="utf-8").splitlines() if curves.exists() else []:
        found = json.loads(line)
        lines.append({name: value for name, value in found.items() if isinstance(value, int | float)})
    curves_of = charts_of(lines)
    overall = summary.get("overall") or {}
    judged = [
        best_of_n_chart("best of n", overall.get("best_of_n_curve") or []),
        reliability_chart("calibration of pairs", overall.get("calibration")),
    ]
    first = [curve_chart(chart) for chart in curves_of if chart.heading != "Machinery"]
    last = [curve_chart(chart) for chart in curves_of if chart.title in ("learning_rate", "grad_norm")]
    return [*(chart for chart in judged if chart), *first, *last][:MOST_CHARTS]


def _is_adapter(folder: Path) -> bool:
    return (folder / "model" / "adapter_config.json").exists()


def _what(card: Card, stage: str, kind: Kind, adapters: bool) -> str:
    start = card.summary.get("start") or {}
    size = f" of {_count(start['parameters'])} weights" if start.get("parameters") else ""
    trained = card.summary.get("trained")
    if kind is Kind.REWARD_MODEL:
        said = f"A reward model{size}: it gives a completion a score, higher is better, and can't be sampled from."
    else:
        said = f"A language model{size}, {_SPOKEN.get(stage, f'made by the stage `{stage}`')}."
    parts = [said, f"Made by `{card.stage}` ({card.made_by})."]
    parts += [f"Trained: {trained}."] if trained else []
    parts += ["This folder holds the adapters alone; their base is loaded with them."] if adapters else []
    return " ".join(parts)


def _data(card: Card) -> list[str]:
    start = card.summary.get("start") or {}
    page = ["## Data", ""]
    page += [f"- {name}: {what}" for name, what in card.inputs.items()]
    if start:
        unit = start["unit"]
        tokens = (
            f", {start['tokens']:,} tokens an epoch, {start['learned_tokens']:,} of them learned; the longest of the "
            f"{unit} has {start['longest']:,}"
        )
        page.append(f"- {start['kept']:,} {unit} trained on{tokens if start['tokens'] else ''}")
        left_out = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in start["left_out"].items() if n)
        page += [f"- left out: {left_out}"] if left_out else []
        page += [f"- {start['steps']:,} steps of {start['batch']['rows']} {unit}; {start['layout']}; {start['place']}"]
    licences = [f"{source}: {licence}" for source, licence in sorted(card.licenses.items())]
    return [*page, f"- licences of the sources: {', '.join(licences) or 'not stated'}"]


def _lineage(ancestors: Sequence[Ancestor]) -> list[str]:
    """From the sources to what was trained on, a row a step."""
    if not ancestors:
        return []
    page = ["", "## Lineage", "", "| step | stage | made from | gives | lost |", "|---|---|---|---|---|"]
    for each in ancestors:
        done = each.manifest
        if done is None:
            known = f"content {each.fingerprint[:12]}" if each.fingerprint else ""
            page.append(f"| `{cell(each.name)}` | from outside | | {known} | |")
            continue
        named = [shown(origin.path, origin.name) for origin in [*done.inputs.values(), *done.engines.values()]]
        made_from = ", ".join([*named, *map(shown, sources_in(done.settings.get("source")))])
        gives = "model" if done.rows is None else f"{done.rows:,} rows"
        lost = ", ".join(f"{why} {number:,}" for why, number in (done.summary.get("lost") or {}).items() if number)
        cells = [each.name, f"{done.stage} {done.version}", made_from, gives, lost]
        page.append(f"| {' | '.join(cell(text) if text else '' for text in cells)} |")
    return page


def _reward_figures(summary: Mapping[str, Any]) -> list[str]:
    """May it be believed? By family."""
    judged = {**(summary.get("by_family") or {}), "all": summary.get("overall") or {}}
    if not judged["all"]:
        return []
    head = ["family", "prompts", "sampled", "best of n", "oracle", "pairs right", "best above", "worst below"]
    page = [
        "", "## May it be believed?", "",
        "On held-out prompts, in percent: how often the completion it likes best is right, against the average sample "
        "and the best there is. As a gate, only scores above `best above` and below `worst below` are believed.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
    ]  # fmt: skip
    for name, one in judged.items():
        gate = one.get("gate") or {}
        shares = [_percent(one.get(key)) for key in ("sampled", "best_of_n", "oracle", "pair_accuracy")]
        closed = gate.get("closed")
        ends = ["closed", cell(closed)] if closed else [_number(gate.get(key)) for key in ("best_above", "worst_below")]
        page.append(f"| {' | '.join([cell(name), str(one.get('groups', '')), *shares, *ends])} |")
    calibration, length = judged["all"].get("calibration"), judged["all"].get("length")
    if calibration:
        page += ["", f"Its margins are off by {_percent(calibration['ece'])} points (expected calibration error)."]
    if length and length.get("correlation") is not None:
        page += ["", f"Scores and lengths of one prompt's completions correlate by {_number(length['correlation'])}."]
    return page


def _figures(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {cell(name.replace('_', ' '))} | {value:.5g} |" if isinstance(value, float)
        else f"| {cell(name.replace('_', ' '))} | {cell(str(value))} |"
        for name, value in summary.items()
        if name not in ("base", "trained", "saved") and _is_short(value)
    ]  # fmt: skip
    if len(looks := summary.get("heldout") or []) > 1:
        for name in dict.fromkeys(name for look in (looks[0], looks[-1]) for name in look if name != "step"):
            ends = " → ".join(f"{look[name]:.4g}" if name in look else "–" for look in (looks[0], looks[-1]))
            rows.append(f"| {cell(name)}, from start to end | {ends} |")
    return ["", "## Figures", "", "| figure | value |", "|---|---|", *rows] if rows else []


def _use(kind: Kind, adapters: bool) -> list[str]:
    if kind is Kind.REWARD_MODEL:
        return [
            "```python",
            "from reward.model import load_reward_model  # pip install align-toolkit",
            "",
            'judge = load_reward_model("path/to/this/folder")',
            'prompt = [{"role": "user", "content": "What is 3 plus 4?"}]',
            'answers = [[{"role": "assistant", "content": text}] for text in ("7", "8")]',
            "print(judge.score_many([(prompt, answer) for answer in answers]))",
            "```",
            "",
            "`reward_model.json` says how it is read: which head, which chat template, and the gate of each family.",
        ]
    loader = "AutoPeftModelForCausalLM" if adapters else "AutoModelForCausalLM"
    return [
        "```",
        "align chat path/to/this/folder",
        "```",
        "",
        "```python",
        f"from {'peft' if adapters else 'transformers'} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"tokenizer, model = AutoTokenizer.from_pretrained(folder), {loader}.from_pretrained(folder)",
        'messages = [{"role": "user", "content": "What is 3 plus 4?"}]',
        "ids = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=200)[0, ids['input_ids'].shape[1]:]))",
        "```",
    ]


def _limits(card: Card, kind: Kind) -> list[str]:
    """What nobody should take it for."""
    if kind is Kind.REWARD_MODEL:
        yes = card.summary.get("overall") or {}
        closed = [
            name for name, one in (card.summary.get("by_family") or {}).items() if (one.get("gate") or {}).get("closed")
        ]
        found = [
            "Its scores compare completions of one prompt; across prompts they say little.",
            "It was trained on completions of one policy, and is less to be trusted on those of another, or of that "
            "policy once it has been optimised against this very model.",
        ]
        if closed:
            found.append(f"Not to be believed on: {', '.join(closed)} (its gate is closed there).")
        if not yes.get("groups"):
            found.append("Nothing was held out to measure it on.")
        return found
    return [
        "The figures above are of the training. How well it answers is for an evaluation to say (`align evaluate`).",
        "It has what its data and its base model have, their mistakes and leanings too. It was not tested for safety.",
    ]


def _settings(card: Card) -> list[str]:
    if not card.settings:
        return []
    settings = yaml.safe_dump(plain(card.settings), sort_keys=False, allow_unicode=True)
    return ["", "## Settings", "", "```yaml", settings.rstrip(), "```"]


def _is_short(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 200)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _count(number: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"
