"""Sampling on several machines: workers of a running Ray cluster, each with the whole engine. Needs the extra `ray`.

A sample depends on seed, prompt, index and model alone, so which worker makes it changes nothing: the engine on Ray has
the fingerprint of the engine that its workers run, and a run may move between one machine and a cluster. Prompts are
handed out in blocks; samples come back as they are made. What a worker that died had not given back is made again by
another, and a new worker takes its place as soon as the cluster has room.

The workers are Ray actors that we feed, and not a Ray Data pipeline: that one wants all prompts before it gives the
first row, and starts its workers, and so loads the model, for each run of the pipeline anew; here prompts are read
lazily and one step calls `sample` many times.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.build import RaySettings
from align.core.errors import AlignError, EngineError
from align.core.manifest import versions

Sample = tuple[int, int, Completion]

_AT_ONCE = 2
"""Blocks that a worker has: one that it samples from and one that waits, so that it is never idle."""

_MOST_DEATHS = 3
"""So many workers may die one after the other without giving anything back before we stop."""

_LOOK_EVERY_S, _SILENT_S = 5.0, 20.0
"""How often we look whether the cluster's head answers, and for how long it may not. After a minute Ray ends this
process, by itself and with no exception."""

_opened = 0
"""Open engines that connected this process to the cluster; the last one disconnects it."""


@dataclass(eq=False)
class _Block:
    """Prompts that one worker is handed.

    Attributes:
        prompts: with their numbers in the call.
        missing: (prompt number, sample index) of what hasn't come back yet.
        deaths: workers that died on it since something came back.
    """

    prompts: list[tuple[int, Prompt]]
    missing: set[tuple[int, int]]
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """One place in the pool.

    Attributes:
        actor: the process that has the place now.
        starting: the answer to come when it has loaded its model; None when it has come.
        deaths: processes that died in this place since one gave something back.
    """

    actor: Any = None
    starting: Any = None
    deaths: int = 0


@dataclass(eq=False)
class _Task:
    """A block on its way through a worker's process; `stream` gives lists of samples, by place in the block."""

    worker: _Worker
    actor: Any
    block: _Block
    stream: Any
    numbers: list[int] = field(default_factory=list)


class RayEngine:
    """An engine on the workers of a Ray cluster; see `align.core.engines.base.Engine`.

    Args:
        make: makes the engine from its settings; called on the workers, where `align` must be installed too.
        settings: of the engine; `model` is a Hub id or a folder that every worker's machine sees under that path.
        cluster: which cluster, how many workers.
        generator: see `Engine`.
        fingerprint: see `Engine`; a worker's where none is given.

    Raises:
        EngineError: Ray isn't installed, or no cluster can be reached.
    """

    def __init__(
        self,
        make: Callable[[Any], Engine],
        settings: BaseModel,
        cluster: RaySettings,
        generator: str,
        fingerprint: str | None = None,
    ) -> None:
        model = Path(str(getattr(settings, "model", "")))
        if model.exists():  # a worker has another current folder
            settings = settings.model_copy(update={"model": str(model.resolve())})
        self.cluster = cluster
        self._generator, self._fingerprint = generator, fingerprint
        self._ray, self._ours = _connect(cluster.address)
        self._made_of = (make, settings, versions().get("align-toolkit", ""))
        self._calls = 0
        self._head = self._ray.get_runtime_context().gcs_address
        self._looked = time.monotonic()
        self._silent: float | None = None  # since when the head doesn't answer
        self._workers = [_Worker() for _ in range(cluster.workers)]
        for worker in self._workers:
            self._start(worker)

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self._generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`: that of the engine which the workers run, so that its samples in a cache stay good."""
        if self._fingerprint is None:
            self._wait([])
            ready = next(worker for worker in self._workers if worker.starting is None)
            try:
                self._fingerprint = str(self._ray.get(ready.actor.fingerprint.remote()))
            except self._ray.exceptions.RayError as problem:
                raise self._told(problem) from problem
        return self._fingerprint

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[Sample]:
        """See `Engine`. Reads two blocks a worker ahead.

        Raises:
            EngineError: no worker starts, a worker's engine can't go on, or workers die one after the other.
        """
        params.check(n)
        call, self._calls = self._calls, self._calls + 1
        blocks = self._blocks(prompts, range(first_index, first_index + n))
        again: deque[_Block] = deque()
        tasks: list[_Task] = []
        try:
            while True:
                if not tasks and not again:
                    block = next(blocks, None)
                    if block is None:
                        return
                    again.append(block)
                self._hand_out(call, blocks, again, tasks, n, params, first_index)
                for task in self._wait(tasks):
                    if task in tasks:  # and not lost together with another one of its worker's
                        yield from self._take(task, tasks, again)
        finally:
            for task in tasks:  # whoever took the samples has stopped
                if task.actor is task.worker.actor:
                    task.actor.stop.options(concurrency_group="control").remote(call)

    def close(self) -> None:
        """See `Engine`. Ends the workers; the cluster stays."""
        global _opened
        if not self._workers:
            return
        for worker in self._workers if self._silent is None else ():  # a lost cluster's end by themselves
            self._ray.kill(worker.actor)
        self._workers = []
        _opened -= self._ours
        if self._ours and not _opened:
            self._ray.shutdown()  # a lost cluster would otherwise end this process, whatever it does by then

    def _start(self, worker: _Worker) -> None:
        """Asks the cluster for a process in a worker's place."""
        actor = self._ray.remote(
            num_cpus=self.cluster.cpus,
            num_gpus=self.cluster.gpus,
            scheduling_strategy="SPREAD",
            concurrency_groups={"control": 1},
        )(_Sampler)
        worker.actor = actor.remote(*self._made_of)
        worker.starting = worker.actor.load.remote()

    def _blocks(self, prompts: Iterable[Prompt], indices: range) -> Iterator[_Block]:
        numbered = enumerate(prompts)
        while block := list(islice(numbered, self.cluster.block)):
            yield _Block(block, {(number, index) for number, _ in block for index in indices})

    def _hand_out(
        self, call: int, blocks: Iterator[_Block], again: deque[_Block], tasks: list[_Task], n: int,
        params: SamplingParams, first_index: int,
    ) -> None:  # fmt: skip
        """Gives every worker that is ready its blocks; those of workers that died come first."""
        for turn in range(_AT_ONCE):
            for worker in self._workers:
                own = sum(task.worker is worker for task in tasks)
                if worker.starting is not None or own > turn:
                    continue
                block = again.popleft() if again else next(blocks, None)
                if block is None:
                    return
                lacking = {number for number, _ in block.missing}
                pairs = [(number, prompt) for number, prompt in block.prompts if number in lacking]
                method = worker.actor.sample.options(num_returns="streaming")
                stream = method.remote(call, [prompt for _, prompt in pairs], n, params, first_index)
                tasks.append(_Task(worker, worker.actor, block, stream, [number for number, _ in pairs]))

    def _wait(self, tasks: list[_Task]) -> list[_Task]:
        """Waits until a task has something to give, or until a worker is ready where there are no tasks.

        Raises:
            EngineError: no worker gets ready in time, or one can't.
        """
        began = time.monotonic()
        while True:
            starting = [worker for worker in self._workers if worker.starting is not None]
            if not tasks and len(starting) < len(self._workers):
                return []
            # Only the first of a worker's tasks can have something; the others wait behind it.
            first = {task.worker: task for task in reversed(tasks)}
            refs = [*(worker.starting for worker in starting), *(task.stream for task in first.values())]
            done, _ = self._ray.wait(refs, num_returns=1, timeout=1.0, fetch_local=False)
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False) if done else ([], [])
            for worker in starting:
                if worker.starting in done:
                    self._started(worker)
            self._look()
            if found := [task for task in first.values() if task.stream in done]:
                return found
            if not tasks and time.monotonic() - began > self.cluster.start_timeout_s:
                raise self._no_room()

    def _look(self) -> None:
        """Asks now and then whether the cluster's head is there.

        Raises:
            EngineError: it hasn't answered for some time.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        if _answers(self._head):
            self._silent = None
        elif self._silent is None:
            self._silent = now
        elif now - self._silent > _SILENT_S:
            raise EngineError(
                f"{self._generator}: the head of the Ray cluster ({self._head}) hasn't answered for {_SILENT_S:g} s. "
                "What was sampled is kept: start the cluster again and run the same command"
            )

    def _started(self, worker: _Worker) -> None:
        """Takes in that a worker's process has its model, or why it hasn't."""
        try:
            where, version = self._ray.get(worker.starting)
        except self._ray.exceptions.RayTaskError as problem:
            raise self._told(problem) from problem
        except self._ray.exceptions.RayError as problem:
            if "creation task" in str(problem):  # it never was there, and would not be at the next try
                raise self._told(problem) from problem
            self._lost(worker, problem)
            return
        if version != self._made_of[2]:
            raise EngineError(
                f"the worker on {where} has align-toolkit {version or 'of no known version'}, here it is "
                f"{self._made_of[2] or 'of no known version'}; install the same on every machine of the cluster"
            )
        worker.starting = None

    def _take(self, task: _Task, tasks: list[_Task], again: deque[_Block]) -> Iterator[Sample]:
        """What a task has to give now; where its worker died, all of that worker's blocks are to be made again."""
        try:
            samples = self._ray.get(next(task.stream))
        except StopIteration:
            tasks.remove(task)
            if task.block.missing:
                raise EngineError(
                    f"{self._generator}: a worker gave {len(task.block.missing)} samples of a block too few; this is a "
                    "fault of the engine, not of the prompts"
                ) from None
            return
        except self._ray.exceptions.RayTaskError as problem:
            raise self._told(problem) from problem
        except self._ray.exceptions.RayError as problem:
            task.block.deaths += 1
            for other in [each for each in tasks if each.actor is task.actor]:
                tasks.remove(other)
                again.append(other.block)
            if task.actor is task.worker.actor:  # else another call has seen it die before
                self._lost(task.worker, problem)
            if task.block.deaths >= _MOST_DEATHS:
                raise self._dying(problem) from problem
            return
        task.worker.deaths = task.block.deaths = 0
        for place, index, completion in samples:
            number = task.numbers[place]
            if (number, index) in task.block.missing:  # else it came before its first worker died
                task.block.missing.remove((number, index))
                yield number, index, completion

    def _lost(self, worker: _Worker, problem: Exception) -> None:
        """Asks for another process in the place of one that is gone, or that can't be reached any more."""
        worker.deaths += 1
        if worker.deaths >= _MOST_DEATHS:
            raise self._dying(problem) from problem
        self._ray.kill(worker.actor)
        self._start(worker)

    def _dying(self, problem: Exception) -> EngineError:
        return EngineError(
            f"{self._generator}: {_MOST_DEATHS} workers died one after the other and gave nothing back; the last one: "
            f"{_first_line(problem)}. Often it is memory: give a worker more cpus or gpus, the engine fewer slots, or "
            "a smaller block. What was sampled is kept: run the same command again"
        )

    def _no_room(self) -> EngineError:
        want = f"{self.cluster.cpus:g} CPU and {self.cluster.gpus:g} GPU"
        have = self._ray.cluster_resources()
        return EngineError(
            f"{self._generator}: no worker was ready after {self.cluster.start_timeout_s:g} s; each of "
            f"{self.cluster.workers} wants {want}, the cluster has {have.get('CPU', 0):g} CPU and "
            f"{have.get('GPU', 0):g} GPU in all, of which others may use some. Ask for less under `ray`, or raise "
            "start_timeout_s where loading the model takes so long"
        )

    def _told(self, problem: Any) -> EngineError:
        """A worker's error as ours: the message of an `AlignError`, the last line of any other's traceback."""
        cause = getattr(problem, "cause", None)
        if isinstance(cause, AlignError):
            return EngineError(
                f"on a worker of the Ray cluster: {cause} (a model's folder must be there under the same path on every "
                "machine; else give a Hub id)"
            )
        last = str(problem).strip().splitlines()[-1].strip()
        return EngineError(
            f"on a worker of the Ray cluster: {last}; `align` and what its engine needs must be installed on every "
            f"machine of the cluster\n{problem}"
        )


class _Sampler:
    """Runs in a worker's process: makes the engine, and samples block after block."""

    def __init__(self, make: Callable[[Any], Engine], settings: BaseModel, version: str) -> None:
        self._make, self._settings = make, settings
        self._engine: Engine | None = None
        self._stopped: set[int] = set()

    def load(self) -> tuple[str, str]:
        """Makes the engine; gives the machine's name and the version of align there."""
        self._engine = self._make(self._settings)
        return socket.gethostname(), versions().get("align-toolkit", "")

    def fingerprint(self) -> str:
        """See `Engine`."""
        assert self._engine is not None
        return self._engine.fingerprint

    def stop(self, call: int) -> None:
        """Ends what is sampled for a call, and what waits; runs beside `sample`."""
        self._stopped.add(call)

    def sample(
        self, call: int, prompts: list[Prompt], n: int, params: SamplingParams, first_index: int
    ) -> Iterator[list[Sample]]:
        """A block's samples as they come, several at a time."""
        assert self._engine is not None
        if call in self._stopped:
            return
        samples: list[Sample] = []
        sent = time.monotonic()
        for sample in self._engine.sample(prompts, n, params, first_index):
            samples.append(sample)
            if time.monotonic() - sent > 0.1:
                yield samples
                samples, sent = [], time.monotonic()
            if call in self._stopped:
                return
        if samples:
            yield samples


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, connected to a running cluster, and whether we connected it; a cluster is never started.

    Raises:
        EngineError: Ray isn't installed, or no cluster answers there.
    """
    global _opened
    try:
        import ray
    except ImportError as problem:
        raise EngineError(
            f"sampling on a Ray cluster needs Ray, which can't be imported ({problem}); pip install "
            "'align-toolkit[ray]', here and on every machine of the cluster"
        ) from problem
    if not _opened:
        if ray.is_initialized():  # by the program that this is a part of; it disconnects, too
            return ray, False
        try:
            told = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address  # as Ray reads it
            if told.rpartition(":")[2].isdigit() and not _answers(told):  # Ray itself would try for minutes
                raise ConnectionError("nothing answers there")
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as problem:
            raise EngineError(
                f"ray: no cluster can be reached at '{address}': {_first_line(problem)}; start one (`ray start --head` "
                "on one machine, `ray start --address=HOST:PORT` on the others), and run align on one of its machines, "
                "with the cluster's token where it has one (RAY_AUTH_TOKEN)"
            ) from problem
    _opened += 1
    return ray, True


def _answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _first_line(problem: Any) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
