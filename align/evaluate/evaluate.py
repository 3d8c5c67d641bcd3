"""Stage `evaluate`: the verified score of one model on held-out prompts, by family, with intervals.

Each prompt is answered greedily and `samples` times at `temperature`; a program says whether a completion is right.
The two say different things: greedy shows what a model knows, sampling what it would also have said, and later
stages (rejection sampling, online DPO) live on the second. What a model read is stored with every row, since results
often can't be repeated only because the prompts were rendered differently (Qwen2 report, arXiv:2407.10671, section 5).

A completion that was cut at `max_tokens`, timed out or could not be verified counts as failed; each is counted apart.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.core.chat import prompt_ids
from align.core.engines.base import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import in_order
from align.core.errors import DataError, EngineError
from align.core.records import Kind, Message, Row, Verdict
from align.core.stage import Asks, Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from align.evaluate.scores import Tally
from reward.verifiers import SANDBOXED, Verifiers


class Config(StageConfig):
    """Settings of `evaluate`."""

    split: Literal["train", "dev", "test", "all"] = Field(
        "test", description="which prompts: choose settings on dev, report test"
    )
    greedy: bool = Field(True, description="answer every prompt once at temperature 0")
    samples: int = Field(1, ge=0, description="samples of every prompt at `temperature`; 0 for greedy only")
    temperature: float = Field(1.0, gt=0, description="of the sampled completions")
    max_tokens: int = Field(512, ge=1, description="most new tokens; a completion cut there counts as failed")
    stop: list[str] = Field([], description="texts that end a completion besides the model's end-of-turn token")
    layout: str = Field(
        "chat", description="`chat` for the model's chat template; for a base model a raw text with {instruction} in it"
    )
    max_error_share: float = Field(
        0.1, ge=0, le=1, description="fail if more completions than this could not be sampled or verified"
    )

    @field_validator("layout")
    @classmethod
    def _layout_has_a_place_for_the_instruction(cls, layout: str) -> str:
        if layout != "chat" and "{instruction}" not in layout:
            raise ValueError("expected `chat`, or a text with {instruction} in it, such as 'Q: {instruction}\\nA:'")
        return layout

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> Self:
        if not self.greedy and self.samples == 0:
            raise ValueError("greedy is false and samples is 0, so nothing would be sampled; set one of them")
        return self


def run(config: Config, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Answers, grades and counts; the scores are in the summary when the last row is out."""
    prompts = inputs["prompts"]
    assert isinstance(prompts, Table)
    modes: dict[str, tuple[int, SamplingParams]] = {}
    if config.greedy:
        modes["greedy"] = (1, _params(config, 0.0, tools.seed))
    if config.samples:
        modes["sampled"] = (config.samples, _params(config, config.temperature, tools.seed))
    summary: dict[str, Any] = {}
    return Result(_rows(config, prompts, modes, tools, summary), summary)


def _rows(
    config: Config,
    prompts: Table,
    modes: Mapping[str, tuple[int, SamplingParams]],
    tools: Tools,
    summary: dict[str, Any],
) -> Iterator[Row]:
    items, unverifiable = _count(prompts, config.split)
    if items == 0:
        raise DataError(
            f"{prompts.name}: no prompt of split {config.split!r} that has a task to verify it by "
            f"({unverifiable} have none); choose another split, or give prompts with `task` and `reference`"
        )
    tools.progress.start(items * sum(n for n, _ in modes.values()), "completions")
    scores: dict[str, Any] = {}
    passed = 0
    with Verifiers(say=tools.progress.say) as verifiers:
        for mode, (n, params) in modes.items():
            tally = Tally(n)
            for row in _graded(config, prompts, mode, n, params, tools.engines["policy"], verifiers):
                tally.add(row)
                row["sandbox_level"] = verifiers.sandbox_level if row["task"] in SANDBOXED else None
                passed += row["verdict"] == "passed"
                tools.progress.advance(passed=passed)
                yield row
            scores[mode] = tally.scores()
            share = tally.apart["errors"] / (items * n)
            if share > config.max_error_share:
                raise EngineError(
                    f"evaluate: {tally.apart['errors']} of {items * n} {mode} completions could not be sampled or "
                    f"verified, more than max_error_share = {config.max_error_share:g}; the last: {tally.last_error}"
                )
        if verifiers.sandbox_report:
            summary["sandbox"] = verifiers.sandbox_report
    summary.update(scores=scores, prompts=items, not_verifiable=unverifiable, split=config.split)


@dataclass(frozen=True, slots=True)
class _Answer:
    row: Row
    prompt: Prompt
    index: int
    completion: Completion


def _graded(
    config: Config, prompts: Table, mode: str, n: int, params: SamplingParams, engine: Engine, verifiers: Verifiers
) -> Iterator[Row]:
    """The rows of one mode, in the prompts' order; holds no more than what the verifiers work on."""
    waiting: deque[_Answer] = deque()

    def finished() -> Iterator[tuple[str, str, Any, str]]:
        for answer in _sampled(config, prompts, n, params, engine):
            waiting.append(answer)
            if answer.completion.finish_reason == "stop":
                row = answer.row
                yield row["task"], answer.completion.text, row["reference"], row["prompt"][-1]["content"]

    for verdict in verifiers.verify_many(finished()):
        while waiting[0].completion.finish_reason != "stop":
            yield _row(waiting.popleft(), mode, engine, None)
        yield _row(waiting.popleft(), mode, engine, verdict)
    while waiting:
        yield _row(waiting.popleft(), mode, engine, None)


def _sampled(config: Config, prompts: Table, n: int, params: SamplingParams, engine: Engine) -> Iterator[_Answer]:
    for_engine, for_rows = tee(_verifiable(prompts, config.split))
    asked = (_render(row["prompt"], config.layout) for row in for_engine)
    for row, (prompt, completions) in zip(for_rows, in_order(engine, asked, n, params), strict=True):
        for index, completion in enumerate(completions):
            yield _Answer(row, prompt, index, completion)


def _verifiable(prompts: Table, split: str) -> Iterator[Row]:
    for row in prompts.rows():
        if row["task"] is not None and split in ("all", row["split"]):
            yield row


def _render(prompt: list[Message], layout: str) -> Prompt:
    """Messages for the engine to render by the model's template, or the raw text that a base model continues."""
    if layout == "chat":
        return prompt
    return layout.replace("{instruction}", "\n\n".join(message["content"] for message in prompt))


def _row(answer: _Answer, mode: str, engine: Engine, verdict: Verdict | None) -> Row:
    completion = answer.completion
    if completion.finish_reason == "error":
        verdict = Verdict.error(f"not sampled: {completion.error}")
    elif completion.finish_reason == "length":
        known = f"{len(completion.token_ids)} tokens" if completion.token_ids else "max_tokens"  # not all servers tell
        verdict = Verdict.of(False, f"truncated: not finished after {known}")
    assert verdict is not None
    return {
        **answer.row,
        "family": answer.row["family"] or answer.row["task"],
        "mode": mode,
        "sample_index": answer.index,
        "completion": [{"role": "assistant", "content": completion.text}],
        "finish_reason": completion.finish_reason,
        "verdict": verdict.verdict,
        "reward": verdict.reward,
        "detail": verdict.detail,
        "generator": engine.generator,
        "rendered_prompt": _rendered(engine, answer.prompt),
    }


def _rendered(engine: Engine, prompt: Prompt) -> str:
    """The very text that the model reads; where an engine can't tell (a remote one), the messages as JSON."""
    if isinstance(prompt, str):
        return prompt
    tokenizer = getattr(getattr(engine, "engine", engine), "tokenizer", None)  # behind a cache there is another
    if tokenizer is None:
        return json.dumps(prompt, ensure_ascii=False)
    return str(tokenizer.decode(prompt_ids(tokenizer, prompt)))


def _params(config: Config, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(config.max_tokens, temperature, stop=tuple(config.stop), seed=seed)


def _count(prompts: Table, split: str) -> tuple[int, int]:
    """How many prompts of the split can be verified, and how many can't."""
    tasks = [row["task"] is not None for row in prompts.rows(["task", "split"]) if split in ("all", row["split"])]
    return sum(tasks), len(tasks) - sum(tasks)


def asks(config: Config) -> dict[str, Asks]:
    """The greedy answer and the samples."""
    return {"policy": Asks(config.samples + config.greedy, config.max_tokens)}


STAGE = Stage(
    name="evaluate",
    summary="the verified score of a model on held-out prompts, by family, with 95% intervals",
    config=Config,
    needs={"prompts": Need(Kind.PROMPTS, "prompts with a task and a reference to verify completions by")},
    gives=Kind.COMPLETIONS,
    run=run,
    version=2,
    engines={"policy": "the model to evaluate"},
    asks=asks,
    adds=("mode", "finish_reason", "rendered_prompt", "sandbox_level"),
)
