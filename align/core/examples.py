"""The first rows of a training as the trainer sees them: token ids back to text, coloured by what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align.core.chat import IGNORED

if TYPE_CHECKING:
    from rich.text import Text

SHOWN = {"context": 160, "learned": 320, "rejected": 320}
"""Characters of a stretch of text; a longer one loses its middle."""

MOST_SPANS = 9
"""Stretches of one example; of a longer conversation the middle is left out."""

_STYLES = {"context": "dim", "learned": "green", "rejected": "red"}


class Span(NamedTuple):
    """A stretch of an example's text.

    Attributes:
        kind: context; learned, which stands in green; or rejected, which the training makes less likely, in red.
        weight: of its tokens in the loss.
    """

    text: str
    kind: Literal["context", "learned", "rejected"] = "context"
    weight: float = 1.0


class Line(NamedTuple):
    """One line of an example, such as its chosen completion."""

    name: str
    spans: Sequence[Span]


Example = Sequence[Line]


def supervised(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int], weights: Sequence[float] | None = None
) -> Example:
    """A row whose supervised tokens are those with a label.

    Args:
        ids: of the row, (T,).
        labels: the token itself where the loss counts it, else `IGNORED`; not shifted, (T,).
        weights: of each token in the loss; 1 each where not given, (T,).
    """
    spans: list[Span] = []
    start = 0
    marks = [
        (label != IGNORED, 1.0 if weights is None or label == IGNORED else float(weights[place]))
        for place, label in enumerate(labels)
    ]
    for place in range(1, len(ids) + 1):
        if place == len(ids) or marks[place] != marks[start]:
            learned, weight = marks[start]
            text = tokenizer.decode(list(ids[start:place]))
            spans.append(Span(text, "learned" if learned else "context", weight))
            start = place
    return [Line("", spans)]


def pair(tokenizer: Any, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Example:
    """A pair's prompt, chosen and rejected completion, all as token ids."""
    return [
        Line("prompt", [Span(tokenizer.decode(list(prompt)))]),
        Line("chosen", [Span(tokenizer.decode(list(chosen)), "learned")]),
        Line("rejected", [Span(tokenizer.decode(list(rejected)), "rejected")]),
    ]


def group(
    tokenizer: Any, prompt: Sequence[int], completions: Sequence[Sequence[int]], values: Sequence[float], most: int = 4
) -> Example:
    """A prompt's completions from the best to the worst, those of the least value in red; all as token ids.

    Args:
        values: what each completion is worth, (n,).
        most: completions that are shown: the best and the worst.
    """
    order = sorted(range(len(values)), key=lambda place: -values[place])
    shown = order if len(order) <= most else [*order[: most - most // 2], *order[-(most // 2) :]]
    lines = [Line("prompt", [Span(tokenizer.decode(list(prompt)))])]
    for place in shown:
        kind: Literal["learned", "rejected"] = "rejected" if values[place] == min(values) else "learned"
        lines.append(Line(f"worth {values[place]:g}", [Span(tokenizer.decode(list(completions[place])), kind)]))
    return lines


def coloured(spans: Sequence[Span]) -> Text:
    """Spans one after the other; newlines and control characters as signs, so that none of them acts."""
    from rich.text import Text

    if len(spans) > MOST_SPANS:
        half = MOST_SPANS // 2
        spans = [*spans[:half], Span(f" … {len(spans) - 2 * half} more stretches … "), *spans[-half:]]
    text = Text()
    for span in spans:
        shown = _clipped(span.text, SHOWN[span.kind])
        if span.kind != "context":
            weight = "" if span.weight == 1 else f"×{span.weight:g} "
            shown = f"⟦{weight}{shown}⟧"
        text.append(shown, style=_STYLES[span.kind])
    return text


def _clipped(text: str, most: int) -> str:
    if len(text) > most + 40:  # else the note would be longer than what it stands for
        kept = most // 2
        text = f"{text[:kept]} …{len(text) - 2 * kept:,} characters… {text[-kept:]}"
    return "".join("↵" if c == "\n" else "⇥" if c == "\t" else c if c.isprintable() else "�" for c in text)
