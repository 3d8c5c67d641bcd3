"""Several models at several temperatures sampled into one pool, and rounds that stop where more samples bring nothing.

RFT's strongest row (arXiv:2308.01825, table 2) pools the paths of several models: what drives the gain is the number of
distinct paths a question, and models of different sizes find different ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from pydantic import Field

from align.core.engines.base import Completion, Engine
from align.core.errors import EngineError
from align.core.records import Row, Verdict
from align.core.stage import StageConfig
from data_synthesis.sampling import ErrorBudget, PooledConfig, completion_row, sampled, verified
from reward.verifiers import Verifiers

BLOCK = 512
"""Prompts that are sampled together by one engine after the other, or round by round."""

Ended = Literal["solved", "given up", "max_samples"]
"""How a prompt's rounds ended: it has enough paths, more are not to be expected, or all samples were taken."""


@dataclass(frozen=True)
class Pool:
    """Samples prompts from every engine at every temperature, and verifies what comes.

    Attributes:
        engines: those of the role `sampler`.
        config: how many samples, at which temperatures.
        seed: of the step.
        verifiers: give the verdicts; without them all rows have the verdict `error`, and whoever asks gives one.
        budget: counts errors.
    """

    engines: Sequence[Engine]
    config: PooledConfig
    seed: int
    verifiers: Verifiers | None
    budget: ErrorBudget

    def __post_init__(self) -> None:
        if len({engine.fingerprint for engine in self.engines}) < len(self.engines):
            names = ", ".join(engine.generator for engine in self.engines)
            raise EngineError(
                f"sampler: two of the engines ({names}) are the same and would give the same samples; name each once, "
                "and take more samples or several temperatures instead"
            )

    def rows(self, prompts: Iterable[Row], samples: int, first_index: int = 0) -> Iterator[list[Row]]:
        """Yields each prompt's COMPLETIONS rows with the column `temperature`: `samples` of each source, in its order.

        Args:
            prompts: read lazily; where there are several sources a block at a time.
            samples: completions of each source.
            first_index: index of the first of them at its source.
        """
        sources = [(engine, t) for engine in self.engines for t in self.config.temperatures]
        if len(sources) == 1:
            yield from self._of(*sources[0], prompts, samples, first_index)
            return
        remaining = iter(prompts)
        while block := list(islice(remaining, BLOCK)):
            pool: list[list[Row]] = [[] for _ in block]
            for engine, temperature in sources:
                for mine, more in zip(pool, self._of(engine, temperature, block, samples, first_index), strict=True):
                    mine += more
            yield from pool

    def _of(
        self, engine: Engine, temperature: float, prompts: Iterable[Row], samples: int, first_index: int
    ) -> Iterator[list[Row]]:
        params = self.config.params(self.seed, temperature)
        answers = sampled(prompts, engine, samples, params, first_index)
        groups = (
            self._unverified(answers, engine.generator)
            if self.verifiers is None
            else verified(answers, self.verifiers, engine.generator, self.budget, first_index)
        )
        for rows in groups:
            for row in rows:
                row["temperature"] = temperature
            yield rows

    def _unverified(self, answers: Iterable[tuple[Row, list[Completion]]], generator: str) -> Iterator[list[Row]]:
        for row, completions in answers:
            for completion in completions:
                self.budget.count(completion.finish_reason == "error", completion.error)
            yield [
                completion_row(row, index, completion, Verdict.error(f"not sampled: {completion.error}"), generator)
                for index, completion in enumerate(completions)
            ]
        self.budget.check()


class RoundsConfig(StageConfig):
    """Settings of adaptive sampling."""

    right: int | None = Field(
        None, ge=1, description="distinct right paths wanted of each prompt: while it has fewer, `samples` more are "
        "taken; none: `samples` of every prompt, as in RFT",
    )  # fmt: skip
    max_samples: int = Field(
        100, ge=1, description="most completions of a prompt from one sampler at one temperature, where `right` is set"
    )
    least_rate: float = Field(
        0.1, ge=0, lt=1, description="where `right` is set: a prompt is given up when it is unlikely that so large a "
        "share of further samples, or more, would bring a new right path; 0 never gives up before max_samples",
    )  # fmt: skip
    doubt: float = Field(
        0.05, gt=0, lt=1, description="what unlikely means: a probability below this, from a uniform prior [our choice]"
    )


@dataclass
class Rounds:
    """Adaptive sampling: rounds of samples, for each prompt until it is solved or hopeless.

    A prompt is solved when it has `right` distinct right paths. Let q be the chance that one more sample brings a new
    path; it only falls as paths are found, so samples from before the last new one don't count against it. With a
    uniform prior and m samples since then, q has the posterior Beta(1, m + 1), and P(q >= r) = (1 - r)^(m + 1). Where
    that is below `doubt` for r = `least_rate`, the prompt is given up. The same rule ends hopeless prompts, which never
    had a right path, and exhausted ones, all of whose right paths are known.

    Attributes:
        config: the settings.
        path: a row's path, as text; None for one that isn't right. Called once for each row.
        ended: how prompts ended, for the summary.
    """

    config: RoundsConfig
    path: Callable[[Row], str | None]
    ended: Counter[Ended] = field(default_factory=Counter)

    def rows(
        self, prompts: Iterable[Row], samples: int, one_round: Callable[[Iterable[Row], int, int], Iterator[list[Row]]]
    ) -> Iterator[list[Row]]:
        """Yields each prompt's rows, of all its rounds.

        Args:
            prompts: read a block at a time, since a prompt's rounds come one after the other.
            samples: of each source in a round.
            one_round: gives the rows of some prompts, for a number of samples from an index on.
        """
        most = self.config.max_samples
        remaining = iter(prompts)
        while block := list(islice(remaining, BLOCK)):
            found = [_Found() for _ in block]
            going_on = list(range(len(block)))
            taken = 0
            while going_on and taken < most:
                more = min(samples, most - taken)
                for place, rows in zip(going_on, one_round([block[i] for i in going_on], more, taken), strict=True):
                    for row in rows:
                        found[place].take(row, self.path(row))
                taken += more
                ends = {place: self._end(found[place], taken, block[place]["task"]) for place in going_on}
                self.ended.update(end for end in ends.values() if end)
                going_on = [place for place in going_on if ends[place] is None]
            yield from (one.rows for one in found)

    def _end(self, found: _Found, taken: int, task: str) -> Ended | None:
        if len(found.paths) >= (1 if task == "exact" else self.config.right or 0):  # an exact answer has one path
            return "solved"
        if (1 - self.config.least_rate) ** (found.since_new + 1) < self.config.doubt:
            return "given up"
        return "max_samples" if taken >= self.config.max_samples else None


@dataclass
class _Found:
    """A prompt's rows so far, its distinct right paths, and how many samples came since the last new one."""

    rows: list[Row] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    since_new: int = 0

    def take(self, row: Row, path: str | None) -> None:
        self.rows.append(row)
        if path is not None and path not in self.paths:
            self.paths.add(path)
            self.since_new = 0
        else:
            self.since_new += row["verdict"] != "error"  # an error says nothing about the prompt
