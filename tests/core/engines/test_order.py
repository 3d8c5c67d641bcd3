from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from align.core.engines import Completion, Prompt, SamplingParams
from align.core.engines.order import in_order
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError

PARAMS = SamplingParams()


def _answer(prompt: Prompt, index: int) -> str:
    return f"{prompt}/{index}"


def test_prompts_come_in_order_with_their_samples_by_index() -> None:
    engine = ScriptedEngine(_answer, ahead=7)
    got = [(p, [c.text for c in cs]) for p, cs in in_order(engine, map(str, range(50)), 2, PARAMS, first_index=3)]
    assert got == [(str(i), [f"{i}/3", f"{i}/4"]) for i in range(50)]


def test_the_same_prompt_twice_comes_twice() -> None:
    assert [p for p, _ in in_order(ScriptedEngine(_answer), ["a", "a", "b"], 1, PARAMS)] == ["a", "a", "b"]


def test_no_prompts_give_nothing() -> None:
    assert list(in_order(ScriptedEngine(_answer), [], 1, PARAMS)) == []


class _Stuck(ScriptedEngine):
    """Finishes the first prompt of a call only when it gets no more prompts."""

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        late: list[tuple[int, int, Completion]] = []
        for number, index, completion in super().sample(prompts, n, params, first_index):
            if number == 0:
                late.append((number, index, completion))
            else:
                yield number, index, completion
        yield from late


def test_one_slow_prompt_holds_up_only_a_window_of_others() -> None:
    read: list[int] = []

    def counted() -> Iterator[Prompt]:
        for i in range(100):
            read.append(i)
            yield str(i)

    stream = in_order(_Stuck(_answer), counted(), 2, PARAMS, ahead=10)
    assert next(stream)[0] == "0"
    assert len(read) == 10
    assert [p for p, _ in stream] == [str(i) for i in range(1, 100)]


class _Lossy(ScriptedEngine):
    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        for number, index, completion in super().sample(prompts, n, params, first_index):
            if (number, index) != (1, 0):
                yield number, index, completion


def test_an_engine_that_loses_a_sample_is_named_and_nothing_is_made_up() -> None:
    with pytest.raises(EngineError, match="1 of 2 completions for prompt 1"):
        list(in_order(_Lossy(_answer), ["a", "b", "c"], 2, PARAMS))
