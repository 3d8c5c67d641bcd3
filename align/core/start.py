"""What a training tells before its first step: what it learns from, how much of it, in which steps, at what cost.

A stage makes a `Start` of plain numbers and says its text (`tell`). `align doctor` shows the same by a rehearsal that
ends there. Colours are ANSI codes, which the progress leaves out where they are not wanted; ⟦ and ⟧ stand in any case.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, NamedTuple

from align.core.cost import Seconds, amount
from align.core.examples import Example, coloured
from align.core.stage import Tools

WIDEST = 120
"""Columns of the text, on a terminal that has more."""

MANY_TOO_LONG = 0.1
"""Share of rows left out as too long from which on it is a warning."""


class Batch(NamedTuple):
    """How one optimizer step is computed.

    Attributes:
        rows: of the global batch, all processes together.
        at_once: of one micro batch at most.
        accumulated: micro batches that a process adds up.
        processes: that share the batch.
        tokens_at_once: of one micro batch at most, where that is what limits it.
    """

    rows: int
    at_once: int
    accumulated: int
    processes: int = 1
    tokens_at_once: int | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known of a training before it begins.

    Attributes:
        title: `SFT of tiny on demonstrate`.
        examples: the first ones, as the trainer sees them; see `supervised`, `pair` and `group`.
        unit: what a row is: rows, pairs, prompts.
        kept: rows to train on.
        left_out: how many rows by reason (`too_long`, `split_dev`).
        tokens: of the kept rows, one epoch; of a prompt that several completions share, once. 0 where they are only
            sampled yet.
        learned_tokens: those of them that the loss counts.
        longest: row, in tokens.
        max_length: what a row may have.
        batch: see `Batch`.
        steps: optimizer steps.
        at_most: whether they may be fewer.
        episodes: of sampling and training, in words, where there are any.
        epochs: passes over the rows.
        layout: how rows lie in a batch and why: `flat, without padding: attention row by row on a CPU`.
        optimizer: `AdamW, weight decay 0.1, clip 1.0`.
        learning_rates: at evenly spaced steps from the first to the last.
        scheduler: its name.
        parameters: weights of the model.
        trained: those of them that are trained.
        place: device and precision: `cpu, fp32`.
        memory: bytes by part, as estimated; empty where nobody knows.
        memory_there: bytes that are free for it; None where unknown.
        seconds: how long it will take; None where unknown.
        loss: in words: `sigmoid (beta 0.1) + 0.2 nll`.
        warnings: what a person should know before going on.
    """

    title: str
    examples: Sequence[Example]
    kept: int
    batch: Batch
    steps: int
    epochs: float
    layout: str
    optimizer: str
    learning_rates: Sequence[float]
    scheduler: str
    parameters: int
    trained: int
    place: str
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    unit: str = "rows"
    at_most: bool = False
    episodes: str = ""
    max_length: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    memory_there: int | None = None
    seconds: Seconds | None = None
    loss: str = ""
    warnings: Sequence[str] = ()

    def all_warnings(self) -> list[str]:
        """Those of the stage, and what the numbers say by themselves."""
        found = list(self.warnings)
        needed = sum(self.memory.values())
        if self.memory_there is not None and needed > self.memory_there:
            found.append(
                f"it needs about {amount(needed)} of memory and {amount(self.memory_there)} are free; lower "
                "micro_batch_size, or set gradient_checkpointing or lora_rank"
            )
        too_long = self.left_out.get("too_long", 0)
        if too_long > MANY_TOO_LONG * (self.kept + too_long):
            found.append(
                f"{too_long:,} of {self.kept + too_long:,} {self.unit} are longer than max_length and left out; raise "
                "it, or shorten them"
            )
        return found

    def facts(self) -> dict[str, str]:
        """Each fact under its name, for a table."""
        batch = self.batch
        at_once = f"{batch.at_once} at once × {batch.accumulated} accumulated × {_plural(batch.processes, 'process')}"
        at_once += f", at most {batch.tokens_at_once:,} tokens at once" if batch.tokens_at_once else ""
        most = "at most " if self.at_most else ""
        share = self.learned_tokens / max(1, self.tokens)
        limit = f" of at most {self.max_length:,}" if self.max_length else ""
        found = {
            self.unit: f"{self.kept:,} to train on" + _reasons(self.left_out),
            "tokens": f"{self.tokens:,}, of which {self.learned_tokens:,} are learned ({share:.0%}); "
            f"the longest of the {self.unit} has {self.longest:,}{limit}"
            if self.tokens
            else "",
            "episodes": self.episodes,
            "steps": f"{most}{self.steps:,} of {batch.rows} {self.unit} ({at_once}); {_plural(self.epochs, 'epoch')}",
            "layout": self.layout,
            "loss": self.loss,
            "optimizer": f"{self.optimizer}; learning rate {_path(self.learning_rates, self.scheduler)}",
            "weights": f"{_count(self.parameters)}, {_trained(self.trained, self.parameters)}; {self.place}",
            "memory": _memory(self.memory, self.memory_there),
            "time": "unknown until the first steps" if self.seconds is None else str(self.seconds),
        }
        return {name: fact for name, fact in found.items() if fact}

    def text(self, width: int | None = None) -> str:
        """All of it with ANSI colours, for a screen of so many columns (this terminal's by default)."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        columns = min(WIDEST, width or shutil.get_terminal_size((100, 24)).columns)
        screen = Console(
            file=StringIO(), width=columns, force_terminal=True, color_system="standard", highlight=False, emoji=False
        )
        screen.print(Text(self.title, style="bold"))
        for number, example in enumerate(self.examples):
            if number:
                screen.print()
            for line in example:
                name = (f"{line.name}: ", "bold") if line.name else ""
                screen.print(Padding(Text.assemble(name, coloured(line.spans)), (0, 0, 0, 4)))
        if self.examples:
            screen.print()
        table = Table.grid(padding=(0, 2))
        for name, fact in self.facts().items():
            table.add_row(Text(name, style="cyan"), Text(fact))
        screen.print(Padding(table, (0, 0, 0, 4)))
        for warning in self.all_warnings():
            screen.print(Padding(Text(f"warning: {warning}", style="yellow"), (0, 0, 0, 4)))
        assert isinstance(screen.file, StringIO)
        return "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines())

    def figures(self) -> dict[str, Any]:
        """For the step's summary, from where they come into the report and the model's card."""
        found: dict[str, Any] = {
            "kept": self.kept, "left_out": dict(self.left_out), "unit": self.unit, "tokens": self.tokens,
            "learned_tokens": self.learned_tokens, "longest": self.longest, "batch": self.batch._asdict(),
            "steps": self.steps, "layout": self.layout, "parameters": self.parameters, "trained": self.trained,
            "place": self.place, "memory": dict(self.memory),
        }  # fmt: skip
        if warnings := self.all_warnings():
            found["warnings"] = warnings
        return found


def tell(start: Start, tools: Tools) -> None:
    """Says it; the first process alone has a progress that prints."""
    tools.progress.say(start.text())


def _reasons(left_out: Mapping[str, int]) -> str:
    reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in left_out.items() if count]
    return f"; left out: {', '.join(reasons)}" if reasons else ""


def _path(rates: Sequence[float], scheduler: str) -> str:
    """`0 → 7e-06 → 7e-07, cosine ▁▄█▇▅▃▂▁`."""
    if not rates:
        return scheduler
    top = max(rates)
    ends = [rates[0], top, rates[-1]]
    told = [f"{rate:.3g}" for rate in ends]
    names = [name for place, name in enumerate(told) if place == 0 or name != told[place - 1]]
    at = [rates[round(i * (len(rates) - 1) / 15)] for i in range(16)] if len(rates) > 1 else []
    bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * rate / top))] for rate in at) if top > 0 else ""
    return f"{' → '.join(names)}, {scheduler} {bars}".rstrip()


def _trained(trained: int, parameters: int) -> str:
    if trained >= parameters:
        return "all trained"
    share = trained / parameters
    return f"{_count(trained)} of them trained ({share:.1%})" if share >= 0.001 else f"{_count(trained)} trained"


def _memory(parts: Mapping[str, int], there: int | None) -> str:
    if not parts:
        return ""
    told = ", ".join(f"{name.replace('_', ' ')} {amount(size)}" for name, size in parts.items() if size)
    free = f"; {amount(there)} are free" if there is not None else ""
    return f"about {amount(sum(parts.values()))} ({told}){free}"


def _count(number: int) -> str:
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {sign}"
    return str(number)


def _plural(number: float, what: str) -> str:
    ending = "es" if what.endswith("s") else "s"
    return f"{number:g} {what}{'' if number == 1 else ending}"
