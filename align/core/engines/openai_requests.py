"""What a sample's request looks like for each kind of server, and what its answer means. Nothing is sent here.

Servers add parameters to OpenAI's interface under names of their own, and fill in what a request leaves out from the
model's own generation config (transformers: top_k 50 and no sampling at all; llama.cpp: min_p 0.05). So where `server`
says what is there, every parameter goes along, the switched-off ones too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.openai_settings import OpenAISettings
from align.core.errors import EngineError

_SAME = {name: name for name in ("top_k", "min_p", "repetition_penalty", "stop_token_ids")}
_STOPS = ("stop", "eos", "stop_sequence")
_LENGTHS = ("length", "max_tokens")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a kind of server takes beyond the common parameters.

    Attributes:
        names: its names of our parameters; one that isn't here is refused where it is asked for.
        top_k_off: its value for no top-k.
        always: sent with every request.
        raw: sent with every raw text, so that it is tokenised as it is.
        nested: whether the parameters go into a `generation_config` of their own, as JSON text.
        limit: its name of the most new tokens of a chat completion.
        schema: how a JSON schema is asked for: OpenAI's response_format, or llama.cpp's; None is not at all.
        choices: how a choice is asked for; `object` is a JSON object with one key, through the schema.
        raw_schema: whether a schema is known at /completions too.
        raw_choices: the same of choices.
        token_ids: whether a prompt may be token ids.
        gives_token_ids: whether a completion comes with its token ids.
        logprobs: whether it gives log-probabilities.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    top_k_off: int = -1
    always: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    nested: bool = False
    limit: str = "max_tokens"
    schema: Literal["json_schema", "json_object"] | None = "json_schema"
    choices: Literal["object", "structured_outputs", "regex", "grammar"] | None = "object"
    raw_schema: bool = False
    raw_choices: bool = False
    token_ids: bool = True
    gives_token_ids: bool = False
    logprobs: bool = True


DIALECTS: dict[str, Dialect] = {
    "any": Dialect(),
    "openai": Dialect(limit="max_completion_tokens"),
    "vllm": Dialect(
        _SAME,
        always={"return_token_ids": True},
        raw={"add_special_tokens": False},
        choices="structured_outputs",
        raw_schema=True,
        raw_choices=True,
        gives_token_ids=True,
    ),
    "sglang": Dialect(
        _SAME, always={"return_token_ids": True}, choices="regex", raw_choices=True, gives_token_ids=True
    ),
    "llama.cpp": Dialect(
        {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"},
        top_k_off=0,
        always={"repeat_last_n": -1},  # the penalty looks at the whole context, as elsewhere
        schema="json_object",
        choices="grammar",
        raw_choices=True,
        token_ids=False,  # llama-server takes them, llama-cpp-python's server stumbles over them
    ),
    "transformers": Dialect(
        {name: name for name in ("top_k", "min_p", "repetition_penalty")},
        top_k_off=0,
        nested=True,
        schema=None,
        choices=None,
        token_ids=False,
        logprobs=False,
    ),
}


class MalformedAnswerError(Exception):
    """An answer that is none: worth asking again."""


class RefusedError(Exception):
    """A request that won't be answered, however often it is sent; the message says why."""


def check_params(params: SamplingParams, settings: OpenAISettings) -> None:
    """Refuses what the server can't be asked for.

    Raises:
        EngineError: all such parameters are named.
    """
    dialect = DIALECTS[settings.server]
    off = SamplingParams()
    wrong = [name for name in _SAME if name not in dialect.names and getattr(params, name) != getattr(off, name)]
    wrong += ["logprobs"] * (params.logprobs and not dialect.logprobs)
    wrong += ["json_schema"] * (params.json_schema is not None and dialect.schema is None)
    wrong += ["choices"] * (bool(params.choices) and dialect.choices is None)
    if wrong:
        able = [name for name, other in DIALECTS.items() if not _lacks(wrong, other)]
        raise EngineError(
            f"{settings.model}: {', '.join(wrong)}: can't be asked of a server of kind '{settings.server}'; leave it "
            f"out, or name in the engine's settings what the server is (server: {' or '.join(able)} can)"
        )


def _lacks(names: Sequence[str], dialect: Dialect) -> bool:
    able = {*dialect.names, *["logprobs"] * dialect.logprobs}
    able |= {"json_schema"} if dialect.schema else set()
    able |= {"choices"} if dialect.choices else set()
    return not able.issuperset(names)


def unsendable(prompt: Prompt, params: SamplingParams, settings: OpenAISettings) -> str:
    """Why a prompt can't be sent to this server; nothing where it can."""
    dialect = DIALECTS[settings.server]
    if len(prompt) == 0:
        return "the prompt is empty: it has no tokens"
    try:
        json.dumps(_plain(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "the prompt holds half of a surrogate pair, which no request can carry; mend the text"
    if is_chat(prompt):
        no_chat = settings.api == "completions"
        return "it is messages, and api: completions says that there is no chat endpoint" if no_chat else ""
    what = "raw text" if isinstance(prompt, str) else "token ids"
    if settings.api == "chat":
        return f"it is {what}, and api: chat says that there is no endpoint for it"
    if what == "token ids" and not dialect.token_ids:
        return f"it is token ids, which a server of kind '{settings.server}' doesn't take"
    if params.json_schema is not None and not dialect.raw_schema:
        return f"a server of kind '{settings.server}' keeps to a JSON schema in chats only, and this is {what}"
    if params.choices and not dialect.raw_choices:
        return f"a server of kind '{settings.server}' keeps to choices in chats only, and this is {what}"
    return ""


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is messages."""
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def _plain(prompt: Prompt) -> Any:
    """The prompt as JSON has it."""
    return (
        prompt
        if isinstance(prompt, str) or is_chat(prompt)
        else [int(token) for token in cast("Sequence[int]", prompt)]
    )


def sample_seed(seed: int, prompt: Prompt, index: int) -> int:
    """The seed of one sample, so that a retry and a resumed run ask for the same; below 2^31, as servers want it."""
    hasher = hashlib.blake2b(json.dumps(_plain(prompt), sort_keys=True).encode(), digest_size=8, key=b"align request")
    hasher.update(f"{seed}/{index}".encode())
    return int.from_bytes(hasher.digest(), "little") >> 33


def request_body(
    prompt: Prompt, n: int, params: SamplingParams, settings: OpenAISettings, first_index: int
) -> dict[str, Any]:
    """The body of a request for n samples, beginning with the sample of `first_index`."""
    dialect = DIALECTS[settings.server]
    chat = is_chat(prompt)
    body: dict[str, Any] = {
        "model": settings.model,
        "messages" if chat else "prompt": _plain(prompt),
        dialect.limit if chat else "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": sample_seed(params.seed, prompt, first_index),
        **dialect.always,
        **({} if chat else dialect.raw),
    }
    if n > 1:
        body["n"] = n
    if params.stop:
        body["stop"] = list(params.stop)
    if params.logprobs:
        body |= {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
    extra: dict[str, Any] = {theirs: getattr(params, ours) for ours, theirs in dialect.names.items()}
    if "top_k" in extra and params.top_k == 0:
        extra["top_k"] = dialect.top_k_off
    if dialect.nested:
        extra |= {"do_sample": params.temperature > 0}
        body["generation_config"] = json.dumps(extra)
    else:
        body |= extra
    if params.json_schema is not None:
        body["response_format"] = _schema(json.loads(params.json_schema), dialect)
    if params.choices:
        body |= _choices(params.choices, dialect)
    return body | settings.extra_body


def _schema(schema: Any, dialect: Dialect) -> dict[str, Any]:
    if dialect.schema == "json_object":
        return {"type": "json_object", "schema": schema}
    if schema == {}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def _choices(choices: Sequence[str], dialect: Dialect) -> dict[str, Any]:
    if dialect.choices == "structured_outputs":
        return {"structured_outputs": {"choice": list(choices)}}
    if dialect.choices == "regex":
        return {"regex": "|".join(f"({_escaped(choice)})" for choice in choices)}
    if dialect.choices == "grammar":  # a string of a GBNF grammar is written like one of JSON
        return {"grammar": "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)}
    schema = {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": list(choices)}},
        "required": ["choice"],
        "additionalProperties": False,
    }
    return {"response_format": _schema(schema, dialect)}


def _escaped(text: str) -> str:
    """The text as a regular expression; Python's `re.escape` also escapes spaces, which grammar compilers refuse."""
    return "".join(f"\\{sign}" if sign in r"\.^$*+?{}[]|()/" else sign for sign in text)


def read_answer(answer: Any, n: int, params: SamplingParams, settings: OpenAISettings) -> list[Completion]:
    """The samples in a server's answer, at most n; those that are no whole samples are left out.

    Raises:
        MalformedAnswerError: there is none in it.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        problem = answer.get("error") if isinstance(answer, dict) else None
        raise MalformedAnswerError(f"an answer without choices{f': {str(problem)[:200]}' if problem else ''}")
    found, problem, seen = [], "", set()
    for place, choice in enumerate(choices):
        index = str(choice.get("index", place)) if isinstance(choice, dict) else str(place)
        if index in seen:  # the same sample twice
            continue
        seen.add(index)
        try:
            found.append(_read_choice(choice, params, DIALECTS[settings.server]))
        except MalformedAnswerError as malformed:
            problem = str(malformed)
        except (AttributeError, KeyError, TypeError, ValueError) as malformed:
            problem = f"a choice of no known form ({malformed})"
    if not found:
        raise MalformedAnswerError(problem or "choices of no known form")
    return found[:n]


def _read_choice(choice: dict[str, Any], params: SamplingParams, dialect: Dialect) -> Completion:
    message = choice.get("message") or {}
    text = choice["text"] if "text" in choice else message.get("content")
    reason = choice.get("finish_reason")
    if reason == "content_filter" or message.get("refusal"):
        return _failed(f"the server withheld it: {message.get('refusal') or 'content_filter'}")
    if reason in ("tool_calls", "function_call"):
        return _failed("the model called a tool instead of answering")
    if reason not in (*_STOPS, *_LENGTHS):
        raise MalformedAnswerError(f"a choice that was not finished (finish_reason {reason!r})")
    if not isinstance(text, str | None):
        raise MalformedAnswerError(f"a choice whose text is a {type(text).__name__}")
    logprobs, tokens, ids = _read_tokens(choice)
    if params.logprobs and logprobs is None:
        return _failed("the server gave no log-probabilities; ask for none, or see how they are switched on there")
    completion = Completion(
        text=text or "",  # a reasoning model that ran out of tokens has no content at all
        token_ids=ids,
        finish_reason="stop" if reason in _STOPS else "length",
        logprobs=logprobs if params.logprobs else None,
    )
    return _constrained(_stopped(completion, tokens, params.stop), params, dialect)


def _failed(why: str) -> Completion:
    return Completion("", (), "error", error=why)


def _read_tokens(choice: dict[str, Any]) -> tuple[tuple[float, ...] | None, list[str], tuple[int, ...]]:
    """Log-probabilities, texts and ids of the sampled tokens, as far as they are told, in either endpoint's form."""
    ids = tuple(choice.get("token_ids") or ())
    told = choice.get("logprobs") or {}
    if told.get("content") is not None:
        entries = told["content"]
        values, tokens = [entry["logprob"] for entry in entries], [str(entry.get("token", "")) for entry in entries]
        if not ids and all("id" in entry for entry in entries):  # llama.cpp
            ids = tuple(int(entry["id"]) for entry in entries)
    elif told.get("token_logprobs") is not None:
        values, tokens = told["token_logprobs"], [str(token) for token in told.get("tokens") or ()]
    else:
        return None, [], ids
    logprobs = tuple(min(float(value), 0.0) for value in values)
    # Ids that don't match would be believed; no ids at all are understood.
    return logprobs, tokens, ids if len(ids) == len(logprobs) else ()


def _stopped(completion: Completion, tokens: list[str], stops: Sequence[str]) -> Completion:
    """Ends a completion before its first stop text, where the server left it in or went on (transformers does)."""
    found = [(at, stop) for stop in stops if (at := completion.text.find(stop)) >= 0]
    if not found:
        return completion
    at, stop = min(found)
    kept = length = 0
    while kept < len(tokens) and length < at + len(stop):
        length += len(tokens[kept])
        kept += 1
    logprobs = completion.logprobs
    if logprobs is not None and len(tokens) == len(logprobs):
        logprobs = logprobs[:kept]
    ids = completion.token_ids[:kept] if len(tokens) == len(completion.token_ids) else ()
    return replace(completion, text=completion.text[:at], token_ids=ids, logprobs=logprobs, finish_reason="stop")


def _constrained(completion: Completion, params: SamplingParams, dialect: Dialect) -> Completion:
    """A finished completion, held to the schema's form or to the choices."""
    if completion.finish_reason != "stop" or (params.json_schema is None and not params.choices):
        return completion
    try:
        if params.json_schema is not None:
            json.loads(completion.text)
        elif dialect.choices == "object":
            text = str(cast("dict[str, Any]", json.loads(completion.text))["choice"])
            completion = replace(completion, text=text, token_ids=())  # the ids are those of the JSON around it
    except (ValueError, KeyError, TypeError):
        return _failed(f"the server did not keep to the form that was asked for: {completion.text[:80]!r}")
    if params.choices and completion.text not in params.choices:
        return _failed(f"the server did not keep to the choices: {completion.text[:80]!r}")
    return completion
