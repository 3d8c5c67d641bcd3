"""`align chat MODEL`: a conversation with a model in the terminal, or with one question a line from a pipe.

What is sampled is what a recipe would sample: the model's own template, the embedded engine, its end-of-turn token.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from align.core.engines.base import Completion, SamplingParams
from align.core.errors import AlignError, DataError, ModelError, RecipeError
from align.core.hub import check_model
from align.core.records import Kind, Messages
from align.core.stage import StageConfig
from align.core.store import ModelRef
from align.settings import from_arguments
from align.stages import nearest

COMMANDS = {
    "/help": "what there is to say beside questions",
    "/reset": "forget the conversation; the system prompt stays",
    "/system": "TEXT: set the system prompt, and forget the conversation; without a text, have none",
    "/retry": "answer the last question once more, with another draw",
    "/set": "key=value: change a setting, such as temperature=0 or max_tokens=200",
    "/quit": "end; so does Ctrl-D. Ctrl-C ends an answer",
}


class ChatConfig(StageConfig):
    """Settings of `align chat`."""

    system: str = Field("", description="system prompt; none where not given")
    temperature: float = Field(0.7, ge=0, description="of the samples; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="of the samples; 1 is off")
    max_tokens: int = Field(512, ge=1, description="most tokens of an answer")
    seed: int = Field(0, ge=0, description="decides the samples")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision, as for an engine")


class Chat:
    """A conversation with one model.

    Attributes:
        messages: of the conversation, the system prompt first where there is one.
        asked: answers that were begun; each has its own draw.
    """

    def __init__(self, engine: Any, config: ChatConfig) -> None:
        self.engine, self.config = engine, config
        self.messages: Messages = []
        self.asked = 0
        self.reset(config.system)

    def reset(self, system: str) -> None:
        """Begins anew.

        Raises:
            ModelError: the model's template takes no system prompt.
            DataError: it refuses a conversation without one.
        """
        from align.core.chat import prompt_ids

        messages: Messages = [{"role": "system", "content": system}] if system else []
        greeting: Messages = [*messages, {"role": "user", "content": "hello"}]
        try:
            prompt_ids(self.engine.tokenizer, greeting)
        except DataError as problem:
            if not system:
                raise
            raise ModelError(f"this model's template takes no system prompt ({problem}); leave it out") from problem
        self.config = self.config.model_copy(update={"system": system})
        self.messages = messages

    def ask(self, question: str) -> Iterator[str]:
        """The answer piece by piece; question and answer join the conversation, an answer that was broken off too.

        Raises:
            DataError: the conversation has no room left for an answer, or the model's template refuses it.
            ModelError: the model could not be sampled from.
        """
        from align.core.chat import prompt_ids

        prompt: Messages = [*self.messages, {"role": "user", "content": question}]
        config, length = self.config, len(prompt_ids(self.engine.tokenizer, prompt))
        room = (self.engine.max_context or length + config.max_tokens) - length
        if room < 1:
            raise DataError(
                f"the conversation has {length} tokens and the model reads {self.engine.max_context}; /reset it"
            )
        params = SamplingParams(
            max_tokens=min(config.max_tokens, room),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + self.asked,
        )
        self.asked += 1
        text = ""
        try:
            for piece in self.engine.stream(prompt, params):
                if not isinstance(piece, Completion):
                    text += piece
                    yield piece
                elif piece.finish_reason == "error":
                    raise ModelError(piece.error)
                elif piece.finish_reason == "length":
                    yield f" … (cut at {params.max_tokens} tokens)"
        finally:
            if text:
                self.messages = [*prompt, {"role": "assistant", "content": text}]

    def take_back(self) -> str | None:
        """Removes the last question with its answer, and gives it; None where nothing was asked."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return str(question)


def chat(model: str, arguments: Sequence[str]) -> None:
    """Loads the model and talks until the input ends.

    Raises:
        AlignError: the model can't be found, loaded or talked to, or a setting is wrong.
    """
    config = from_arguments(ChatConfig, "align chat", arguments)
    found = ModelRef.find(model)
    if found.kind is not Kind.MODEL:
        raise ModelError(
            f"{model}: is a reward model, which gives scores and no answers; align score asks it, and align chat takes "
            "a policy"
        )
    check_model(found.path)  # before torch is loaded
    from align.core.engines.transformers_engine import TransformersEngine

    path = "@".join(filter(None, (found.path, found.revision)))
    engine = TransformersEngine(
        path, device=config.device, dtype=config.dtype, slots=1, generator=found.name, fingerprint="chat"
    )
    if engine.tokenizer.chat_template is None:
        raise ModelError(
            f"{model}: its tokenizer has no chat template, so it can't be talked to; it is a base model, or the "
            "template (chat_template.jinja) was not saved with it"
        )
    talk = Chat(engine, config)
    weights = sum(parameter.numel() for parameter in engine.model.parameters())
    _tell(
        f"{found.name}: {weights / 1e6:,.1f}M weights, {engine.device}, {engine.model.dtype}".replace("torch.", "")
        + f", {engine.max_context or 'unknown'} tokens of context; /help tells what else there is to say"
    )
    with _interruptible():
        for line in _lines():
            if line.startswith("/"):
                if not _command(talk, line):
                    return
            elif line.strip():
                _answer(talk, line)


def _answer(talk: Chat, question: str) -> None:
    try:
        for piece in talk.ask(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        _tell(" … (stopped)")
    except AlignError as problem:
        _tell(str(problem))
        return
    print(flush=True)


def _command(talk: Chat, line: str) -> bool:
    """Does what a line that begins with a slash says; whether the conversation goes on."""
    name, _, rest = line.strip().partition(" ")
    if name in ("/quit", "/exit"):
        return False
    actions: dict[str, Callable[[str], None]] = {
        "/help": lambda _: _tell("\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items())),
        "/reset": lambda _: talk.reset(talk.config.system),
        "/system": lambda text: talk.reset(text.strip()),
        "/retry": lambda _: _retry(talk),
        "/set": lambda text: _set(talk, text),
    }
    try:
        if name not in actions:
            raise RecipeError(f"{name}: there is no such command; {nearest(name, list(COMMANDS))}")
        actions[name](rest)
    except AlignError as problem:
        _tell(str(problem))
    return True


def _retry(talk: Chat) -> None:
    question = talk.take_back()
    if question is None:
        raise RecipeError("/retry: nothing was asked yet")
    _answer(talk, question)


def _set(talk: Chat, text: str) -> None:
    fixed = {"system", "device", "dtype"} & {part.partition("=")[0] for part in text.split()}
    if fixed:
        raise RecipeError(f"/set: {', '.join(sorted(fixed))} can't be changed here; " + (
            "use /system" if fixed == {"system"} else "start align chat with it"))  # fmt: skip
    changed = from_arguments(ChatConfig, "/set", text.split())
    given = {name: getattr(changed, name) for name in changed.model_fields_set}
    talk.config = talk.config.model_copy(update=given)
    _tell(", ".join(f"{name}={getattr(talk.config, name)}" for name in ("temperature", "top_p", "max_tokens", "seed")))


def _lines() -> Iterator[str]:
    """What the user writes, line by line; of a terminal with a prompt, and with what was written before at hand."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("› ")
        except KeyboardInterrupt:
            _tell("\nCtrl-D or /quit ends")
        except EOFError:
            print()
            return


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here and nothing else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(text: str) -> None:
    """What is no part of an answer: apart from it, so that a pipe gets answers alone."""
    print(text, file=sys.stderr, flush=True)
