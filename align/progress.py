"""Telling a person where a run is: a live line on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from align.core.cost import duration as duration

PLAIN_EVERY_S = 5.0
"""Seconds between plain lines at first; later a twentieth of the time that is behind, up to `PLAIN_SELDOM_S`."""

PLAIN_SELDOM_S = 60.0
LIVE_EVERY_S = 0.1
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Asked(NamedTuple):
    """What a step's engines were asked for so far, all roles together.

    Attributes:
        sampled: completions that an engine gave now.
        reused: completions that an earlier attempt had left in the cache.
        failed: completions that an engine failed to give.
        tokens: of those sampled now.
    """

    sampled: int = 0
    reused: int = 0
    failed: int = 0
    tokens: int = 0

    def since(self, before: Asked) -> Asked:
        """What came after an earlier count."""
        return Asked(*(now - then for now, then in zip(self, before, strict=True)))


class Silent:
    """Says nothing: for the processes beside the first one."""

    def start(self, total: int | None, unit: str) -> None:
        """See `align.core.stage.Progress`."""

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """See `align.core.stage.Progress`."""

    def say(self, line: str) -> None:
        """See `align.core.stage.Progress`."""

    def watch(self, asked: Callable[[], Asked]) -> None:
        """See `Lines`."""

    def close(self) -> None:
        """Ends the line."""


class Lines:
    """One step's progress as text: `reject: 120 of 300 prompts (40%), 12.3/s, 840 tokens/s, passed 80, 15 s left`.

    A training passes its `tokens` to `advance`, which become tokens a second as those of an engine do.

    Rate and time left rest on what was really done now. What a killed attempt had done, and completions that come from
    the cache, cost next to nothing and tell nothing of how long the others take. Some stages count in bursts, as they
    verify in blocks: the rate is that up to the last count before this one, which ends a burst.

    On a terminal the line is written over; elsewhere a new one comes every `every_s` seconds, and more seldom in a long
    run. It is only written from within calls, so there is no thread that a forked process could trip over. Colours are
    left out where the stream is no terminal, or NO_COLOR is set.
    """

    def __init__(self, step: str, stream: TextIO | None = None, every_s: float | None = None) -> None:
        self._step = step
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._coloured = self._live and not os.environ.get("NO_COLOR")
        self._every_s = every_s if every_s is not None else (LIVE_EVERY_S if self._live else PLAIN_EVERY_S)
        self._total: int | None = None
        self._unit = ""
        self._count = self._before = self._last = self._tokens = 0
        self._figures: dict[str, Any] = {}
        self._began = self._written = self._last_at = time.monotonic()
        self._asked: Callable[[], Asked] = Asked
        self._asked_before = self._asked_began = Asked()  # when the count began; when the first new sample came
        self._all_reused = True
        self._open = False

    def watch(self, asked: Callable[[], Asked]) -> None:
        """Has the line tell what engines were asked for: tokens a second, what came from the cache, what failed."""
        self._asked = asked
        self._asked_before = self._asked_began = asked()

    def start(self, total: int | None, unit: str) -> None:
        """See `align.core.stage.Progress`."""
        self._clear()
        self._total, self._unit, self._count, self._before, self._figures = total, unit, 0, 0, {}
        self._began = self._written = self._last_at = time.monotonic()
        self._last = self._tokens = 0
        self._asked_before = self._asked_began = self._asked()
        self._all_reused = True
        self._write(self._text())

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        """See `align.core.stage.Progress`."""
        if self._count == 0 and by > 1 and time.monotonic() - self._began < 1:
            self._before = by  # a killed training that goes on: these steps were not done now
        self._count += by
        self._tokens += int(figures.pop("tokens", 0))
        self._figures |= figures
        now = time.monotonic()
        if self._all_reused:
            self._pass_over_reused(now)
        seldom = 0.0 if self._live else min(PLAIN_SELDOM_S, (now - self._began) / 20)
        if now - self._written >= max(self._every_s, seldom):
            self._written = now
            self._write(self._text())
        self._last, self._last_at = self._count, now

    def _pass_over_reused(self, now: float) -> None:
        """As long as all came from the cache, the clock has not begun."""
        asked = self._asked()
        since = asked.since(self._asked_before)
        self._all_reused = since.sampled == since.failed == 0
        if self._all_reused and since.reused:
            self._before, self._began, self._asked_began = self._count, now, asked

    def say(self, line: str) -> None:
        """See `align.core.stage.Progress`."""
        self._clear()
        shown = line if self._coloured else _COLOURS.sub("", line)
        print(f"  {self._step}: {shown}", file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line."""
        self._clear()

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        of = f" of {self._total}" if self._total is not None else ""
        parts = [f"{self._count}{of} {self._unit}".rstrip()]
        if self._total:
            parts[0] += f" ({min(100, 100 * self._count // self._total)}%)"
        asked = self._asked()
        new = asked.since(self._asked_began)
        done, in_s = (self._last - self._before) * _share_done(new), self._last_at - self._began
        if in_s > 1 and done > 0:
            parts.append(f"{done / in_s:.1f}/s" if done >= in_s else f"{in_s / done:.1f} s each")
        if seconds > 1 and (tokens := new.tokens + self._tokens):
            parts.append(f"{tokens / seconds:.0f} tokens/s")
        parts += [f"{name.replace('_', ' ')} {_figure(value)}" for name, value in self._figures.items()]
        since = asked.since(self._asked_before)
        parts += [f"{since.reused} from the cache"] if since.reused else []
        parts += [f"{since.failed} failed"] if since.failed else []
        if self._total and in_s > 1 and done >= min(10, self._total / 50) and self._count < self._total:
            parts.append(f"{duration(in_s / done * (self._total - self._count))} left")
        return f"  {self._step}: " + ", ".join(parts)

    def _write(self, text: str) -> None:
        if not self._live:
            print(text, file=self._stream, flush=True)
            return
        import shutil

        width = shutil.get_terminal_size().columns
        self._stream.write("\r\x1b[2K" + text[: width - 1])
        self._stream.flush()
        self._open = True

    def _clear(self) -> None:
        if self._open:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._open = False


def _share_done(asked: Asked) -> float:
    """The share of completions that were asked for now, and not found in the cache."""
    now = asked.sampled + asked.failed
    return now / (now + asked.reused) if asked.reused else 1.0


def _figure(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
