"""Asynchronous sampling: while an episode is trained, a second process samples and scores the next (arXiv:2410.18252).

    border e --+-- train episode e -------------- look --+-- border e+1 -- train episode e+1
               +-- sample and score episode e+1 ---------+

Samples of episode e+1 are of the weights at border e: one update stale where episode e stays, the policy's own where it
is rolled back (and those of the second episode are always of the start, as the first one's are). Border e+1 is written
only when they are whole on disk; so after a kill every sample that is still to come is of weights that are there, and
the run ends in the same weights.

The second process has a model, reward model and verifiers of its own, and on a CPU half of the threads. Of several GPUs
it takes one that no training process has. It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from align.core import errors
from align.core.errors import AlignError, RunError
from align.core.stage import Progress
from align.core.store import ModelRef, Table
from align.train.border import Borders, load_weights
from align.train.episode_file import read_rows, write_rows
from align.train.episodes import Prompts
from align.train.online_settings import Config
from align.train.settings import Speed
from align.train.share import Share

START = "spawn"
"""How the second process begins: from nothing, since a process that has threads or a GPU can't be forked safely."""

TOLD_EVERY_S = 1.0


@dataclass(frozen=True)
class Work:
    """What the second process must know.

    Attributes:
        inputs: of the stage.
        seed: the step's.
        work: the step's work folder.
        rank: of the training process that it works for, of `world`.
        threads: of a CPU, that it may use.
    """

    config: Config
    inputs: Mapping[str, Table | ModelRef]
    seed: int
    work: Path
    speed: Speed
    rank: int = 0
    world: int = 1
    threads: int = 1

    def file(self, episode: int) -> Path:
        """Where the rows of an episode's share go; a run that goes on with more or fewer processes shares it anew."""
        return self.work / "ahead" / f"episode-{episode:03d}-{self.rank}-of-{self.world}.parquet"


class Ahead:
    """The second process, as the training one sees it; a context manager, since it must end.

    Raises:
        AlignError: what the second process raised, by whichever call hears of it.
        RunError: it is gone.
    """

    def __init__(self, work: Work, progress: Progress) -> None:
        self.threads = torch.get_num_threads()
        self.work, self.progress = replace(work, threads=max(1, self.threads // 2)), progress
        self._process: Any = None
        self._line: Connection | None = None
        self._asked: set[int] = set()
        self._count = 0
        self._unit: tuple[int | None, str] = (None, "samples")

    def __enter__(self) -> Ahead:
        torch.set_num_threads(max(1, self.threads - self.work.threads))
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
        if self._process is not None:
            self._process.kill()  # whatever it has sampled is on disk
            self._process.join()

    def ask(self, episode: int, weights_at: int) -> None:
        """Has an episode sampled by the weights of a step, unless that has been done or asked."""
        if episode in self._asked or self.work.file(episode).exists():
            return
        if self._process is None:
            self.begin()
        assert self._line is not None
        self._asked.add(episode)
        try:
            self._line.send((episode, weights_at))
        except OSError:
            self._gone()

    def rows(self, episode: int, weights_at: int) -> list[dict[str, Any]]:
        """The rows of an episode, for which it is asked now where it wasn't before."""
        self.ask(episode, weights_at)
        self.wait(episode)
        return read_rows(self.work.file(episode))

    def wait(self, episode: int) -> None:
        """Waits until an episode that was asked for is whole on disk."""
        shown = -1
        while not self.work.file(episode).exists():
            if shown < 0:
                self.progress.start(*self._unit)
                shown = 0
            self._hear()
            if self._count > shown:
                self.progress.advance(self._count - shown)
                shown = self._count

    def listen(self) -> None:
        """Hears what the second process has to say, without waiting for it."""
        while self._line is not None and self._line.poll():
            self._hear()

    def begin(self) -> None:
        """Starts the second process."""
        context: Any = multiprocessing.get_context(START)
        self._line, other = context.Pipe()
        self._process = context.Process(target=sample_ahead, args=(self.work, other), name="samples ahead")
        self._process.start()
        other.close()

    def _hear(self) -> None:
        assert self._line is not None
        try:
            kind, *told = self._line.recv()
        except (EOFError, OSError):
            self._gone()
        if kind == "start":
            self._unit, self._count = (told[0], told[1]), 0
        elif kind == "count":
            self._count = told[0]
        elif kind == "say":
            self.progress.say(told[0])
        elif kind == "error":
            raise getattr(errors, told[0], RunError)(told[1])

    def _gone(self) -> None:
        self._process.join()
        status = self._process.exitcode
        killed = " (killed from outside, often for want of memory)" if status == -signal.SIGKILL else ""
        raise RunError(
            f"the process that samples ahead is gone: it ended with status {status}{killed}; what it had sampled is "
            "kept, so run the same command again, or set asynchronous to false"
        )


class _Told:
    """Progress of the second process, for the first one to show; seldom enough that nobody need listen at once."""

    def __init__(self, line: Connection) -> None:
        self.line, self.count, self.told_at = line, 0, 0.0

    def start(self, total: int | None, unit: str) -> None:
        self.count = 0
        self.line.send(("start", total, unit))

    def advance(self, by: int = 1, **figures: float | int | str) -> None:
        self.count += by
        if (now := time.monotonic()) - self.told_at > TOLD_EVERY_S:
            self.told_at = now
            self.line.send(("count", self.count))

    def say(self, line: str) -> None:
        self.line.send(("say", line))


def sample_ahead(work: Work, line: Connection) -> None:
    """The second process: samples the episodes that it is asked for, until the line or the first process ends."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first one's to handle
    try:
        _serve(work, line)
    except EOFError:
        pass
    except AlignError as problem:
        line.send(("error", type(problem).__name__, str(problem)))
    except Exception:
        line.send(("error", "RunError", f"the process that samples ahead failed:\n{traceback.format_exc()}"))


def _serve(work: Work, line: Connection) -> None:
    from align.train import adapters, models
    from align.train.online_dpo import scorer_of
    from align.train.samplers import Live
    from reward.verifiers import Verifiers

    torch.set_num_threads(work.threads)
    policy, table = work.inputs["policy"], work.inputs["prompts"]
    assert isinstance(policy, ModelRef) and isinstance(table, Table)
    device = _device(work)
    speed = replace(work.speed, device=device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = models.load_policy(policy, speed, work.config)
    tokenizer = models.load_tokenizer(policy)
    models.stop_at_end_of_turn(model, tokenizer)
    if (lora := adapters.lora_of(work.config, policy)) is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    model = model.to(device).eval()
    engine, borders, progress = Live(model, tokenizer, speed.precision), Borders(work.work / "border"), _Told(line)
    prompts = Prompts(table, work.config, work.seed)
    with Verifiers(say=progress.say) as verifiers:
        scorer = scorer_of(work.config, work.inputs, replace(speed, device=str(device)), verifiers, tokenizer, None)
        share = Share(work.config, prompts, scorer, work.seed, tokenizer, progress, work.work, work.rank, work.world)
        while True:
            episode, weights_at = line.recv()
            load_weights(model, borders.weights(weights_at))
            engine.take(model, weights_at)
            write_rows(work.file(episode), share.rows(engine, episode, weights_at))
            engine.rest()
            line.send(("done", episode))


def _device(work: Work) -> torch.device:
    if work.speed.device == "cpu":
        return torch.device("cpu")
    free = work.world + work.rank
    return torch.device("cuda", free if free < torch.cuda.device_count() else work.rank)


def _end_with_parent() -> None:
    """Has this process end when the one that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
