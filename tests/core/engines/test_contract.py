"""What every engine promises. A new engine joins by one more entry in `ENGINES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.core.engines import Completion, Engine, Prompt, SamplingParams
from align.core.engines.cache import CachedEngine
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.openai_settings import OpenAISettings, Server
from align.core.engines.order import in_order
from align.core.engines.scripted import ScriptedEngine
from align.core.engines.transformers_engine import TransformersEngine
from tests.core.engines.failing_server import FailingServer
from tests.core.engines.models import byte_tokenizer, tiny_model
from tests.core.engines.vllm_real import vllm_once

CHAT: Prompt = [{"role": "user", "content": "Name a colour."}]
PROMPTS: list[Prompt] = ["one", CHAT, "a rather longer prompt than the others", [72, 73, 74], "two"]
PARAMS = SamplingParams(max_tokens=12, seed=3)


def _words(prompt: Prompt, index: int) -> str:
    return f"answer {index} to {prompt} " + "and so on " * (len(prompt) % 7)


class ServedEngine(OpenAIEngine):
    """Asks a server of this process, which ends with it."""

    def __init__(self, server: Server) -> None:
        self._own = FailingServer()
        self._own.open()
        super().__init__(OpenAISettings(model="m", base_url=self._own.url, server=server))

    def close(self) -> None:
        super().close()
        self._own.close()


def _on_a_gpu(folder: Path) -> Engine:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return TransformersEngine(tiny_model("qwen2").cuda(), byte_tokenizer(), slots=6)


GPU = ("transformers_gpu", "vllm")
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "scripted": lambda folder: ScriptedEngine(_words, ahead=3),
    "transformers_quick": lambda folder: TransformersEngine(tiny_model("qwen2"), byte_tokenizer(), slots=6),
    "transformers_generic": lambda folder: TransformersEngine(tiny_model("gemma"), byte_tokenizer(), slots=6),
    "transformers_gpu": _on_a_gpu,
    "vllm": vllm_once,
    "cached": lambda folder: CachedEngine(ScriptedEngine(_words, ahead=3), folder / "cache"),
    "openai": lambda folder: ServedEngine("any"),
    "openai_vllm": lambda folder: ServedEngine("vllm"),
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] * (name in GPU)) for name in ENGINES])
def engine(request: Any, tmp_path: Path) -> Iterator[Engine]:
    made = ENGINES[request.param](tmp_path)
    yield made
    made.close()


def _tells_ids(engine: Engine) -> bool:
    """Whether completions come with the ids of their tokens: not from a server that doesn't tell them."""
    return getattr(engine, "gives_token_ids", True)


def _all(
    engine: Engine, prompts: list[Prompt], n: int, params: SamplingParams, first: int = 0
) -> dict[Any, Completion]:
    results = list(engine.sample(iter(prompts), n, params, first))
    table = {(number, index): completion for number, index, completion in results}
    assert len(table) == len(results), "a sample came twice"
    return table


def test_each_sample_of_each_prompt_comes_exactly_once(engine: Engine) -> None:
    got = _all(engine, PROMPTS, 3, PARAMS, 5)
    assert set(got) == {(number, index) for number in range(5) for index in (5, 6, 7)}
    assert all(c.finish_reason in ("stop", "length") for c in got.values())
    assert all(1 <= len(c.token_ids) <= 12 if _tells_ids(engine) else c.token_ids == () for c in got.values())


def test_the_same_call_gives_the_same_completions(engine: Engine) -> None:
    assert _all(engine, PROMPTS, 2, PARAMS) == _all(engine, PROMPTS, 2, PARAMS)


def test_a_sample_does_not_depend_on_what_is_sampled_beside_it(engine: Engine) -> None:
    together = _all(engine, PROMPTS, 8, PARAMS)
    for number, prompt in enumerate(PROMPTS):
        assert _all(engine, [prompt], 2, PARAMS, 6) == {(0, i): together[number, i] for i in (6, 7)}


def test_more_samples_than_slots_all_come(engine: Engine) -> None:
    assert set(_all(engine, ["one"], 20, PARAMS)) == {(0, index) for index in range(20)}


def test_prompts_are_read_a_bounded_number_ahead(engine: Engine) -> None:
    read = 0

    def endless() -> Iterator[Prompt]:
        nonlocal read
        while True:
            read += 1
            yield f"prompt {read}"

    stream = engine.sample(endless(), 2, PARAMS)
    for _ in range(100):
        next(stream)
    assert read < 200


def test_an_empty_prompt_is_an_error_completion_and_the_others_still_come(engine: Engine) -> None:
    got = _all(engine, ["one", "", "two"], 2, PARAMS)
    assert len(got) == 6
    assert {key for key, c in got.items() if c.finish_reason == "error"} == {(1, 0), (1, 1)}
    assert "empty" in got[1, 0].error


def test_max_tokens_ends_a_completion_with_reason_length(engine: Engine) -> None:
    got = _all(engine, PROMPTS, 4, SamplingParams(max_tokens=1))
    assert all(len(c.token_ids) == _tells_ids(engine) for c in got.values())
    assert any(c.finish_reason == "length" for c in got.values())


def test_a_stop_text_ends_a_completion_and_is_no_part_of_it(engine: Engine) -> None:
    free = _all(engine, PROMPTS, 4, PARAMS)
    # The stop text is two neighbouring characters of a completion, so that it is sure to be met.
    text = max((c.text for c in free.values()), key=len)
    stop = next(text[i : i + 2] for i in range(2, len(text)) if text[i : i + 2].isascii() and text[i : i + 2].strip())
    stopped = _all(engine, PROMPTS, 4, SamplingParams(max_tokens=12, seed=3, stop=(stop,)))
    assert any(stop in c.text for c in free.values())
    for key, completion in stopped.items():
        if stop in free[key].text:
            assert completion.finish_reason == "stop"
            assert completion.text == free[key].text.split(stop)[0]
        else:
            assert completion == free[key]


def test_logprobs_come_one_a_token_when_asked_for_and_not_otherwise(engine: Engine) -> None:
    with_logprobs = _all(engine, PROMPTS, 2, SamplingParams(max_tokens=12, seed=3, logprobs=True))
    without = _all(engine, PROMPTS, 2, PARAMS)
    for key, completion in with_logprobs.items():
        assert completion.logprobs is not None and without[key].logprobs is None
        assert len(completion.logprobs) == len(completion.token_ids) or not _tells_ids(engine)
        assert all(value <= 0 for value in completion.logprobs)
        assert (completion.token_ids, completion.text) == (without[key].token_ids, without[key].text)


def test_no_prompts_give_nothing(engine: Engine) -> None:
    assert list(engine.sample([], 2, PARAMS)) == []


def test_generator_and_fingerprint_name_the_model(engine: Engine) -> None:
    assert engine.generator and engine.fingerprint == engine.fingerprint


def test_in_order_gives_prompts_back_in_their_order_with_samples_by_index(engine: Engine) -> None:
    table = _all(engine, PROMPTS, 3, PARAMS)
    ordered = list(in_order(engine, iter(PROMPTS), 3, PARAMS))
    assert [prompt for prompt, _ in ordered] == PROMPTS
    assert [samples for _, samples in ordered] == [[table[number, i] for i in range(3)] for number in range(5)]
