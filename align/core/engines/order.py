"""From an engine's stream of completions, in any order, back to the order of the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.errors import EngineError

AHEAD = 2048
"""Most prompts that are read beyond the one whose turn it is; finished completions of these wait in memory."""


def in_order(
    engine: Engine, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0, ahead: int = AHEAD
) -> Iterator[tuple[Prompt, list[Completion]]]:
    """Yields each prompt with its n completions by sample index, in the order of the prompts.

    Prompts are read lazily. Where one prompt's completions take so long that `ahead` others wait for it, no more are
    read until it is done, so memory stays bounded whatever the number of prompts.

    Raises:
        EngineError: the engine can't go on, or gave too few completions.
    """
    source = iter(prompts)
    waiting: dict[int, tuple[Prompt, dict[int, Completion]]] = {}
    read = turn = 0
    exhausted = False

    def feed() -> Iterator[Prompt]:
        nonlocal read, exhausted
        while read - turn < ahead:
            try:
                prompt = next(source)
            except StopIteration:
                exhausted = True
                return
            waiting[read] = (prompt, {})
            read += 1
            yield prompt

    while not exhausted:
        first = read  # the engine numbers the prompts of each call from 0
        for number, index, completion in engine.sample(feed(), n, params, first_index):
            waiting[first + number][1][index] = completion
            while turn in waiting and len(waiting[turn][1]) == n:
                prompt, done = waiting.pop(turn)
                turn += 1
                yield prompt, [done[i] for i in range(first_index, first_index + n)]
        if turn != read:
            raise EngineError(
                f"{engine.generator}: the engine gave {len(waiting[turn][1])} of {n} completions for prompt {turn}; "
                "this is a fault of the engine, not of the prompt"
            )
