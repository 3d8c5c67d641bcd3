"""`align chat`: what is answered, remembered and refused; a scripted engine stands in where words count."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.chat import Chat, ChatConfig
from align.cli import app
from align.core.engines.base import Completion, SamplingParams
from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import DataError, ModelError
from tests.e2e.command import refused
from tests.train.tiny import make_model, make_tokenizer, save_model


class Parrot:
    """Says the last message's words one by one; keeps what it was asked with."""

    max_context: int | None = 100
    stops_after: int | None = None

    def __init__(self, family: str = "qwen2") -> None:
        self.tokenizer = make_tokenizer(family)
        self.asked: list[tuple[Any, SamplingParams]] = []

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[str | Completion]:
        self.asked.append((prompt, params))
        words = prompt[-1]["content"].split()
        for number, word in enumerate(words):
            if number == self.stops_after:
                raise KeyboardInterrupt
            yield word + " "
        yield Completion("", (), "length" if len(words) > 5 else "stop")


def test_a_conversation_is_kept_with_its_system_prompt_and_each_answer_has_its_own_draw() -> None:
    engine = Parrot()
    talk = Chat(engine, ChatConfig(system="Be brief.", seed=7, temperature=0.5, max_tokens=9))
    assert "".join(talk.ask("one two")) == "one two "
    assert "".join(talk.ask("three")) == "three "
    prompt, params = engine.asked[1]
    assert [(turn["role"], turn["content"]) for turn in prompt] == [
        ("system", "Be brief."), ("user", "one two"), ("assistant", "one two "), ("user", "three"),
    ]  # fmt: skip
    assert (params.seed, params.temperature, params.max_tokens) == (8, 0.5, 9)
    assert talk.take_back() == "three"
    assert [turn["role"] for turn in talk.messages] == ["system", "user", "assistant"]
    talk.reset("")
    assert talk.messages == [] and talk.take_back() is None


def test_an_answer_that_is_cut_says_so_and_one_that_is_broken_off_is_remembered_as_far_as_it_came() -> None:
    engine = Parrot()
    talk = Chat(engine, ChatConfig(max_tokens=6))
    assert "".join(talk.ask("a b c d e f")).endswith(" … (cut at 6 tokens)")
    engine.stops_after = 1
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("so far"))
    assert talk.messages[-1] == {"role": "assistant", "content": "so "}


def test_an_answer_gets_the_room_that_is_left_and_a_full_conversation_is_refused() -> None:
    """The template takes 10 tokens with `hello` in it; of a context of 12 tokens 2 are left."""
    engine = Parrot()
    length = len(make_tokenizer()(make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True))["input_ids"])  # fmt: skip
    engine.max_context = length + 2
    talk = Chat(engine, ChatConfig())
    list(talk.ask("hello"))
    assert engine.asked[0][1].max_tokens == 2
    with pytest.raises(DataError, match=rf"tokens and the model reads {length + 2}; /reset it"):
        list(talk.ask("more"))


def test_a_template_that_takes_no_system_prompt_is_told_at_once() -> None:
    with pytest.raises(ModelError, match=r"takes no system prompt .*Only user and assistant roles"):
        Chat(Parrot("mistral"), ChatConfig(system="Be kind."))


def test_a_template_that_refuses_every_conversation_is_not_said_to_refuse_a_system_prompt() -> None:
    engine = Parrot()
    engine.tokenizer = copy.deepcopy(engine.tokenizer)  # other tests use it as it is
    engine.tokenizer.chat_template = "{{ raise_exception('a tool is missing') }}"
    with pytest.raises(DataError, match="a tool is missing") as told:
        Chat(engine, ChatConfig())
    assert "system prompt" not in str(told.value)


def test_what_is_streamed_is_what_would_be_sampled(tmp_path: Path) -> None:
    """The pieces make the completion's text, half characters held back; a random model says half characters often."""
    engine = TransformersEngine(make_model(), make_tokenizer(), slots=1, fingerprint="0")
    for seed in range(3):
        params = SamplingParams(max_tokens=30, seed=seed, temperature=1.5)
        prompt = [{"role": "user", "content": "What is 3 plus 4?"}]
        ((_, _, sampled),) = engine.sample([prompt], 1, params)
        *pieces, streamed = engine.stream(prompt, params)
        assert streamed == sampled
        assert "".join(str(piece) for piece in pieces) == sampled.text
        assert len(pieces) > 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("chat") / "base"))


def said(model: Path, text: str, *arguments: str) -> tuple[list[str], str]:
    """What `align chat` answers to the lines of a pipe, one answer a line, and what it tells beside them."""
    done = CliRunner().invoke(app, ["chat", str(model), "max_tokens=4", *arguments], input=text)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines(), done.stderr


def test_a_pipe_gets_answers_and_what_goes_wrong_in_a_line_ends_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: Any, prompt: Any, params: SamplingParams) -> Iterator[str | Completion]:
        if prompt[-1]["content"] == "stop":
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        yield f"{len(prompt)} {params.temperature:g} {params.seed}"
        yield Completion("", (), "stop")

    monkeypatch.setattr(TransformersEngine, "stream", stream)
    answers, told = said(
        model,
        "one\n\n/nothing\n/retry\n/set temperature=0\n/set temperature=-1\n/set system=x\ntwo\nstop\n"
        "/system Be kind.\nthree\n/reset\n/retry\n/help\nfour\n/quit\nnever\n",
    )
    # Of one message; once more, with another draw; of three; stopped; of two, the system prompt among them; the same.
    assert answers == ["1 0.7 0", "1 0.7 1", "3 0 2", "", "2 0 4", "2 0 5"]
    assert "base: 0.0M weights, cpu, float32, 256 tokens of context" in told
    for text in ("/nothing: there is no such command", "/set: temperature: expected", "/set: system can't be changed",
                 " … (stopped)", "/retry: nothing was asked yet", "another draw"):  # fmt: skip
        assert text in told


def test_a_real_model_answers_a_pipe(model: Path) -> None:
    answers, _ = said(model, "What is 3 plus 4?\n", "system=Be kind.", "device=cpu")
    assert answers[0]


def test_what_cannot_be_talked_to_is_refused_with_what_to_do(model: Path, tmp_path: Path) -> None:
    assert "temperatur: unknown key; did you mean 'temperature'?" in refused("chat", model, "temperatur=1")
    assert "max_tokens: expected" in refused("chat", model, "max_tokens=0")
    assert "settings are given as key=value" in refused("chat", model, "hello")
    assert "no such model folder" in refused("chat", tmp_path / "nowhere")
    assert "device: found 'tpu'" in refused("chat", model, "device=tpu")
    judge = shutil.copytree(model, tmp_path / "judge")
    (judge / "reward_model.json").write_text("{}")
    assert "is a reward model, which gives scores and no answers" in refused("chat", judge)
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    assert "has no chat template" in refused("chat", bare)
    shutil.copytree(model, tmp_path / "run" / "sft" / "model")
    assert f"is a run and no model; give the folder of one of its steps: {tmp_path}/run/sft" in refused(
        "chat", tmp_path / "run"
    )
