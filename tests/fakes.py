"""Small stages and an engine for tests of the pipeline: everything real but the work that they do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from safetensors.numpy import save_file

from align.backends import Backend
from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import in_order
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import DataError
from align.core.records import Kind, Row
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table


class MakeConfig(StageConfig):
    count: int = Field(6, ge=1, description="prompts")
    source: str | None = Field(None, description="a file whose content counts")
    shards: tuple[str, ...] = Field((), description="names")
    rate: float = Field(1e-5, gt=0, description="a number that people write as 1e-5")


def make(config: MakeConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    tools.progress.start(config.count, "prompts")
    return Result(_prompts(config, tools))


def _prompts(config: MakeConfig, tools: Tools) -> Iterator[Row]:
    for number in range(config.count):
        tools.progress.advance()
        yield {
            "prompt_id": f"p{number}",
            "prompt": [{"role": "user", "content": f"say {number} {tools.seed % 7}"}],
            "split": "train",
            "source": config.source or "made",
            "task": None,
            "family": "say",
            "reference": None,
        }


MAKE = Stage("make", "makes prompts", MakeConfig, {}, Kind.PROMPTS, make, reads=("source",))


class TagConfig(StageConfig):
    word: str = Field("t", description="the tag")


def tag(config: TagConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    prompts = inputs["prompts"]
    assert isinstance(prompts, Table)
    return Result({**row, "tags": [config.word]} for row in prompts.rows())


TAG = Stage("tag", "tags", TagConfig, {"prompts": Need(Kind.PROMPTS, "prompts")}, Kind.PROMPTS, tag, adds=("tags",))


class SampleConfig(StageConfig):
    samples: int = Field(2, ge=1, description="samples of each prompt")
    max_tokens: int = Field(16, ge=1, description="most tokens")
    fail: bool = Field(False, description="fails with an error that a user can mend")


def sample(config: SampleConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    prompts = inputs["prompts"]
    assert isinstance(prompts, Table)
    if config.fail:
        raise DataError("it was told to fail; set fail to false")
    summary: dict[str, Any] = {"marker": "sampled"}
    return Result(_completions(config, prompts, tools), summary)


def _completions(config: SampleConfig, prompts: Table, tools: Tools) -> Iterator[Row]:
    params = SamplingParams(max_tokens=config.max_tokens, seed=tools.seed)
    rows = list(prompts.rows())
    tools.progress.start(len(rows), "prompts")
    for engine in tools.all_of("sampler"):
        answers = in_order(engine, (row["prompt"] for row in rows), config.samples, params)
        for row, (_, completions) in zip(rows, answers, strict=True):
            tools.progress.advance()
            for index, completion in enumerate(completions):
                yield {
                    **row,
                    "sample_index": index,
                    "completion": [{"role": "assistant", "content": completion.text}],
                    "reward": float(len(completion.text)),
                    "verdict": "passed",
                    "detail": "",
                    "generator": engine.generator,
                }


def sample_asks(config: SampleConfig) -> dict[str, Asks]:
    return {
        "sampler": Asks(config.samples, config.max_tokens),
        "judge": Asks(config.samples, 4, reads="sampler"),
    }


SAMPLE = Stage(
    "sample",
    "samples",
    SampleConfig,
    {"prompts": Need(Kind.PROMPTS, "prompts")},
    Kind.COMPLETIONS,
    sample,
    engines={"sampler": "what samples", "judge": "what judges"},
    optional_engines=("judge",),
    several=("sampler",),
    asks=sample_asks,
)
TAGGED = Stage(
    "tagged",
    "needs tags",
    TagConfig,
    {"prompts": Need(Kind.PROMPTS, "prompts with tags", columns=("tags",))},
    Kind.PROMPTS,
    tag,
)


class TrainConfig(StageConfig):
    learning_rate: float = Field(1e-3, gt=0, description="rate")
    steps: int = Field(3, ge=1, description="steps")
    step_s: float = Field(0.0, ge=0, description="seconds that a step takes")
    log: str = Field("", description="a file that gets a line for every step")


def train(config: TrainConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Counts to `steps`, keeping its place in the work folder; in several processes only the first writes the model."""
    rank = int(os.environ.get("RANK", 0))
    place = tools.work / f"place-{rank}"
    begun = int(place.read_text()) if place.exists() else 0
    tools.progress.start(config.steps, "steps")
    for step in range(begun, config.steps):
        time.sleep(config.step_s)
        tools.progress.advance(loss=1 / (step + 1))
        if config.log:
            with Path(config.log).open("a") as log:
                log.write(f"{rank} {step}\n")
        place.with_suffix(".part").write_text(str(step + 1))
        place.with_suffix(".part").rename(place)
    if rank == 0:
        model = tools.out / "model"
        model.mkdir(parents=True, exist_ok=True)
        model.joinpath("config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "s": tools.seed}))
        save_file({}, model / "model.safetensors", {"trained": f"{config.learning_rate} {config.steps}"})
    return Result(summary={"steps": config.steps, "world": os.environ.get("WORLD_SIZE", "1")})


TRAIN = Stage(
    "train",
    "trains",
    TrainConfig,
    {
        "model": Need(Kind.MODEL, "where to start", optional=True),
        "completions": Need(Kind.COMPLETIONS, "what to learn", optional=True),
    },
    Kind.MODEL,
    train,
    trains=True,
)


def train_reward(config: TrainConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    result = train(config, inputs, tools)
    (tools.out / "model" / "reward_model.json").write_text("{}")
    return result


REWARD = Stage("fake-reward", "judges", TrainConfig, {}, Kind.REWARD_MODEL, train_reward)


def fill_disk(config: TrainConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    with Path("/dev/full").open("w") as full:
        full.write("x")
    return Result()


FILL = Stage("fill", "meets a full disk", TrainConfig, {}, Kind.MODEL, fill_disk)


class ScriptedSettings(StageConfig):
    speed_only: ClassVar[frozenset[str]] = frozenset({"delay_s", "log", "down", "prompt_price", "completion_price"})

    kind: str = Field(description="tests.fakes:SCRIPTED")
    model: str = Field(description="any text")
    suffix: str = Field("", description="what every answer ends with")
    delay_s: float = Field(0.0, ge=0, description="seconds that a completion takes")
    log: str = Field("", description="a file that gets a line for every completion that is sampled")
    down: str = Field("", description="as long as this file is there, every third sample fails")
    prompt_price: float | None = Field(None, description="USD for a million tokens of prompts")
    completion_price: float | None = Field(None, description="USD for a million tokens of completions")


def build(settings: ScriptedSettings, *, generator: str | None = None, fingerprint: str | None = None) -> Engine:
    def answer(prompt: Prompt, index: int) -> str | Completion:
        time.sleep(settings.delay_s)
        text = prompt[-1]["content"]  # type: ignore[index]
        if settings.log:
            with Path(settings.log).open("a") as log:
                log.write(f"{text} {index}\n")
        if index % 3 == 2 and settings.down and Path(settings.down).exists():
            return Completion("", (), "error", error="the server is down")
        return f"{text} #{index}{settings.suffix}"

    return ScriptedEngine(answer, generator=generator or "scripted", fingerprint=f"{settings.model}/{settings.suffix}")


SCRIPTED = Backend(ScriptedSettings, build, local=False)


class Threaded(ScriptedEngine):
    """Asks in threads, as an engine of a server does; the first 8 samples are there at once, the others take a minute.

    Args:
        waits: whether it waits for its threads however it is left, as a badly written one would.
    """

    def __init__(self, waits: bool) -> None:
        super().__init__(lambda prompt, index: str(index), fingerprint="threaded")
        self._waits = waits

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        pool = ThreadPoolExecutor(4)
        try:
            waiting = [
                (place, index, pool.submit(self._slowly, prompt, index, place * n + index, params))
                for place, prompt in enumerate(prompts)
                for index in range(first_index, first_index + n)
            ]
            for place, index, future in waiting:
                yield place, index, future.result()
        finally:
            pool.shutdown(wait=self._waits, cancel_futures=True)

    def _slowly(self, prompt: Prompt, index: int, number: int, params: SamplingParams) -> Completion:
        time.sleep(60 if number >= 8 else 0)
        return self._complete(prompt, index, params)


def build_threaded(
    settings: ScriptedSettings, *, generator: str | None = None, fingerprint: str | None = None
) -> Engine:
    return Threaded(waits=settings.model == "waits")


THREADED = Backend(ScriptedSettings, build_threaded, local=False)


def refuse(config: TrainConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    raise DataError("it won't")


REFUSE = Stage("refuse", "refuses", TrainConfig, {}, Kind.MODEL, refuse, trains=True)
