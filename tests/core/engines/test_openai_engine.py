"""The engine for OpenAI-compatible servers, against servers on real sockets: one that fails when told to, and two real.

The failing server's model writes what follows from prompt and seed alone, so that whatever went wrong on the way the
completions must be those of a run in which nothing did.
"""

from __future__ import annotations

import email.utils
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from pydantic import ValidationError

from align.backends import BACKENDS
from align.core.engines import Completion, Prompt, SamplingParams
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.openai_requests import (
    MalformedAnswerError,
    check_params,
    read_answer,
    request_body,
    sample_seed,
    unsendable,
)
from align.core.engines.openai_settings import OpenAISettings
from align.core.engines.openai_traffic import LONGEST_RETRY_AFTER_S, backoff, retry_after
from align.core.engines.order import in_order
from align.core.errors import EngineError
from tests.core.engines.failing_server import FailingServer, Fault, Seen

PARAMS = SamplingParams(max_tokens=12, seed=3)
CHATS: list[Prompt] = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]


def settings(**given: Any) -> OpenAISettings:
    return OpenAISettings.model_validate_json(json.dumps({"model": "m", **given}))


def engine_of(*servers: FailingServer, **given: Any) -> Any:
    """An engine that asks the servers, with short waits; closed by `with`."""
    base_url = [server.url for server in servers]
    return closing(OpenAIEngine(settings(base_url=base_url, **given), first_wait_s=0.01))


def table(
    engine: OpenAIEngine, prompts: list[Prompt], n: int = 2, params: SamplingParams = PARAMS
) -> dict[tuple[int, int], Completion]:
    found = list(engine.sample(iter(prompts), n, params))
    assert len(found) == len({(number, index) for number, index, _ in found}), "a sample came twice"
    return {(number, index): completion for number, index, completion in found}


def faultless(prompts: list[Prompt], n: int = 2, params: SamplingParams = PARAMS, **given: Any) -> dict[Any, Any]:
    with FailingServer() as server, engine_of(server, **given) as engine:
        return table(engine, prompts, n, params)


def first(fault: Fault) -> Callable[[Seen], Fault | None]:
    """The first request for each sample fails."""
    return lambda seen: fault if seen.attempt == 0 else None


# -- What a recipe may say


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": "step:sft"}, "a server knows its models by name"),
        (
            {"base_url": "localhost:8000"},
            "expected an address such as http://localhost:8000/v1, found 'localhost:8000'",
        ),
        ({"base_url": []}, "one or more different addresses"),
        ({"base_url": ["http://a/v1", "http://a/v1"]}, "one or more different addresses"),
        ({"extra_body": {"temperature": 0.1}}, "extra_body: temperature: sent by itself"),
        ({"extra_body": {"top_k": 5}, "server": "vllm"}, "extra_body: top_k: sent by itself"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"retries": 3}, "Extra inputs are not permitted"),
    ],
)
def test_what_a_recipe_may_not_say_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told.replace("(", r"\(")):
        settings(**given)


@pytest.mark.parametrize(
    "given", [{"api_key_env": "sk-proj-1234secret"}, {"base_url": "https://user:1234secret@host.example/v1"}]
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(**given)
    assert "1234secret" not in refused.value.errors()[0]["msg"]


def test_every_setting_is_described_and_prices_have_the_names_that_the_forecast_reads() -> None:
    assert all(field.description for field in OpenAISettings.model_fields.values())
    assert {"prompt_price", "completion_price"} <= OpenAISettings.model_fields.keys()


def test_only_what_decides_the_samples_is_in_the_fingerprint() -> None:
    fast = {
        "base_url": ["http://a/v1", "http://b/v1"],
        "concurrency": 7,
        "requests_per_minute": 9,
        "tokens_per_minute": 9,
        "timeout_s": 1,
        "max_retries": 0,
        "prompt_price": 1,
        "completion_price": 2,
    }
    other = [{"model": "x"}, {"api": "chat"}, {"server": "vllm"}, {"extra_body": {"a": 1}}, {"samples_per_request": 2}]
    prints = [OpenAIEngine(settings(**given)).fingerprint for given in ({}, fast, *other)]
    assert prints[0] == prints[1] and len(set(prints)) == 1 + len(other)
    backend = BACKENDS["openai"]
    assert backend.fixed(settings()) == backend.fixed(settings(**fast))
    assert not backend.local


def test_a_key_that_was_named_and_is_not_there_is_told_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(EngineError, match="the environment variable MY_KEY isn't set"):
        OpenAIEngine(settings(api_key_env="MY_KEY"))


# -- What is asked for


def test_a_known_server_is_told_of_every_parameter_so_that_its_own_defaults_do_not_count() -> None:
    """vLLM would take top_k and the like from the model's generation config, transformers would not even sample."""
    body = request_body("x", 1, PARAMS, settings(server="vllm"), 0)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["stop_token_ids"]) == (-1, 0.0, 1.0, ())
    assert (body["add_special_tokens"], body["return_token_ids"], "n" in body) == (False, True, False)
    params = SamplingParams(top_k=5, min_p=0.1, repetition_penalty=1.2)
    body = request_body(CHATS[0], 1, params, settings(server="llama.cpp"), 0)
    assert (body["top_k"], body["min_p"], body["repeat_penalty"]) == (5, 0.1, 1.2)
    body = request_body(CHATS[0], 1, PARAMS, settings(server="transformers"), 0)
    inner = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "do_sample": True}
    assert json.loads(body["generation_config"]) == inner
    assert body.keys() == {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "generation_config"}


def test_messages_and_raw_text_have_their_own_form_and_extra_body_goes_along() -> None:
    ours = settings(extra_body={"reasoning_effort": "low"}, server="openai")
    chat = request_body(CHATS[0], 3, SamplingParams(stop=("a",), logprobs=True), ours, 0)
    assert chat["messages"] == CHATS[0] and chat["n"] == 3 and chat["max_completion_tokens"] == 512
    assert (chat["stop"], chat["logprobs"], chat["top_logprobs"], chat["reasoning_effort"]) == (["a"], True, 1, "low")
    raw = request_body((5, 6), 1, SamplingParams(logprobs=True), ours, 0)
    assert (raw["prompt"], raw["max_tokens"], raw["logprobs"]) == ([5, 6], 512, 1)


def test_a_schema_and_choices_are_asked_for_as_each_server_has_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    params = SamplingParams(json_schema=json.dumps(schema))
    strict = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    assert request_body(CHATS[0], 1, params, settings(), 0)["response_format"] == strict
    llama = request_body(CHATS[0], 1, params, settings(server="llama.cpp"), 0)
    assert llama["response_format"] == {"type": "json_object", "schema": schema}
    params = SamplingParams(choices=("yes", 'no "x"', "a.b c"))
    bodies = {kind: request_body(CHATS[0], 1, params, settings(server=kind), 0) for kind in ("vllm", "sglang", "any")}
    assert bodies["vllm"]["structured_outputs"] == {"choice": ["yes", 'no "x"', "a.b c"]}
    assert bodies["sglang"]["regex"] == r'(yes)|(no "x")|(a\.b c)'
    enum = bodies["any"]["response_format"]["json_schema"]["schema"]["properties"]["choice"]["enum"]
    assert enum == ["yes", 'no "x"', "a.b c"]
    llama = request_body(CHATS[0], 1, params, settings(server="llama.cpp"), 0)
    assert llama["grammar"] == r'root ::= "yes" | "no \"x\"" | "a.b c"'


@pytest.mark.parametrize(
    ("params", "server", "named"),
    [
        (SamplingParams(top_k=5, min_p=0.1), "any", "top_k, min_p: can't be asked of a server of kind 'any'"),
        (SamplingParams(stop_token_ids=(3,)), "llama.cpp", "server: vllm or sglang can"),
        (SamplingParams(repetition_penalty=1.1), "openai", "repetition_penalty"),
        (SamplingParams(logprobs=True), "transformers", "logprobs"),
        (SamplingParams(json_schema="{}"), "transformers", "json_schema"),
        (SamplingParams(choices=("a",)), "transformers", "choices"),
    ],
)
def test_a_parameter_that_the_server_lacks_is_named_and_never_dropped(
    params: SamplingParams, server: str, named: str
) -> None:
    with pytest.raises(EngineError, match=named):
        check_params(params, settings(server=server))
    check_params(SamplingParams(), settings(server=server))


@pytest.mark.parametrize(
    ("prompt", "params", "given", "told"),
    [
        ("", PARAMS, {}, "the prompt is empty"),
        ([], PARAMS, {}, "the prompt is empty"),
        ("raw", PARAMS, {"api": "chat"}, "raw text"),
        (CHATS[0], PARAMS, {"api": "completions"}, "no chat endpoint"),
        ([1, 2], PARAMS, {"server": "transformers"}, "token ids"),
        ("raw", SamplingParams(choices=("a",)), {}, "choices in chats only"),
        ("raw", SamplingParams(json_schema="{}"), {"server": "sglang"}, "schema in chats only"),
        ("half \ud83d", PARAMS, {}, "surrogate"),
        ("raw", PARAMS, {}, ""),
        (CHATS[0], PARAMS, {"api": "chat"}, ""),
        ("raw", SamplingParams(choices=("a",)), {"server": "vllm"}, ""),
    ],
)
def test_a_prompt_that_the_server_can_not_be_sent_is_an_error_completion_that_says_why(
    prompt: Prompt, params: SamplingParams, given: dict[str, Any], told: str
) -> None:
    why = unsendable(prompt, params, settings(**given))
    assert told in why and bool(told) == bool(why)


def test_each_sample_has_a_seed_of_its_own_that_is_the_same_again() -> None:
    seeds = {sample_seed(seed, prompt, index) for seed in (0, 1) for prompt in ("a", CHATS[0], [5]) for index in (0, 1)}
    assert len(seeds) == 12 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(1, [5, 6], 2) == sample_seed(1, (5, 6), 2)


# -- What an answer means


def choice(**given: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"content": "so it is"}, "finish_reason": "stop", **given}


def read(*choices: dict[str, Any], params: SamplingParams = PARAMS, **given: Any) -> Completion:
    return read_answer({"choices": list(choices)}, 1, params, settings(**given))[0]


def test_the_stop_text_is_cut_off_where_a_server_leaves_it_in_with_the_tokens_after_it() -> None:
    """transformers serve ends at a stop text and keeps it; so "it is" goes, and with it what came after its tokens."""
    content = [{"token": text, "logprob": -1.0, "id": 7} for text in ("so", " it", " is", " long")]
    said = choice(message={"content": "so it is long"}, logprobs={"content": content}, finish_reason="length")
    params = SamplingParams(stop=("it is",), logprobs=True)
    assert read(said, params=params) == Completion("so ", (7, 7, 7), "stop", (-1.0, -1.0, -1.0))


def test_logprobs_are_read_in_either_form_and_ids_that_do_not_match_are_not_believed() -> None:
    params = SamplingParams(logprobs=True)
    old = {"tokens": ["so", " it"], "token_logprobs": [-0.5, 1e-9]}
    assert read(choice(logprobs=old), params=params) == Completion("so it is", (), "stop", (-0.5, 0.0))
    assert read(choice(logprobs=old, token_ids=[1, 2, 3]), params=params).token_ids == ()
    assert read(choice(token_ids=[1, 2, 3])) == Completion("so it is", (1, 2, 3), "stop")
    assert "no log-probabilities" in read(choice(), params=params).error


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"finish_reason": "content_filter"}, "withheld"),
        ({"message": {"content": None, "refusal": "I can't"}}, "withheld it: I can't"),
        ({"finish_reason": "tool_calls"}, "called a tool"),
    ],
)
def test_what_was_withheld_is_a_failed_sample_and_not_asked_again(said: dict[str, Any], told: str) -> None:
    assert told in read(choice(**said)).error


def test_a_model_that_spent_all_tokens_on_thinking_gives_an_empty_completion() -> None:
    assert read(choice(message={"content": None}, finish_reason="length")) == Completion("", (), "length")


def test_an_answer_that_does_not_keep_to_the_form_is_a_failed_sample() -> None:
    params = SamplingParams(choices=("yes", "no"))
    assert read(choice(message={"content": '{"choice": "no"}'}), params=params) == Completion("no", (), "stop")
    assert "did not keep to the form" in read(choice(message={"content": "no"}), params=params).error
    assert "did not keep to the choices" in read(choice(message={"content": "nay"}), params=params, server="vllm").error
    schema = SamplingParams(json_schema="{}")
    assert "did not keep to the form" in read(choice(message={"content": "{"}), params=schema).error
    # One that max_tokens cut off is given as it is.
    assert read(choice(message={"content": "{"}, finish_reason="length"), params=schema).text == "{"


def test_of_several_choices_the_whole_ones_count_once_each_and_at_most_as_many_as_were_asked_for() -> None:
    given = {"choices": [choice(), choice(), choice(index=1, finish_reason=None), choice(index=2), choice(index=3)]}
    assert len(read_answer(given, 2, PARAMS, settings())) == 2
    assert len(read_answer(given, 9, PARAMS, settings())) == 3


@pytest.mark.parametrize(
    "answer", [None, [], "x", {}, {"choices": []}, {"choices": [3]}, {"choices": [choice(message=3)]}]
)
def test_an_answer_of_no_known_form_is_malformed(answer: Any) -> None:
    with pytest.raises(MalformedAnswerError):
        read_answer(answer, 1, PARAMS, settings())


def test_retry_after_is_read_as_seconds_or_a_date_and_capped() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 18 < (retry_after({"retry-after": date}) or 0) <= 20
    assert retry_after({"retry-after": email.utils.formatdate(0, usegmt=True)}) == 0
    assert retry_after({"retry-after": "86400"}) == LONGEST_RETRY_AFTER_S
    assert retry_after({}) is None and retry_after({"retry-after": "soon"}) is None


def test_waits_double_up_to_a_minute_with_jitter() -> None:
    for times, most in ((0, 0.5), (3, 4.0), (40, 60.0)):
        waits = {backoff(times, 0.5) for _ in range(50)}
        assert len(waits) > 40 and most / 2 <= min(waits) and max(waits) <= most


# -- Servers that fail


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes the first choice of an answer."""

    def change(answer: dict[str, Any]) -> Any:
        answer["choices"][0] |= fields
        return answer

    return change


FAULTS = {
    "429": (Fault(429), "status 429"),
    "429 with retry-after": (Fault(429, (("Retry-After", "0.05"),)), "status 429"),
    "408": (Fault(408), "status 408"),
    "409": (Fault(409), "status 409"),
    "500": (Fault(500, body=b"<html>oops</html>"), "status 500"),
    "503 with retry-after": (Fault(503, (("Retry-After", "0.05"),)), "status 503"),
    "dropped": (Fault(drop=True), "connection"),
    "half an answer": (Fault(cut=True), "connection"),
    "slow": (Fault(after_s=5.0), "timeout"),
    "half of the JSON": (Fault(body=b'{"choices": [{"index": 0, "mess'), "malformed answer"),
    "no JSON": (Fault(body=b"<html>welcome</html>"), "malformed answer"),
    "an error with status 200": (Fault(body=b'{"error": {"message": "busy"}}'), "malformed answer"),
    "no choices": (Fault(n=0), "malformed answer"),
    "not finished": (Fault(change=changed(finish_reason=None)), "malformed answer"),
    "no text": (Fault(change=changed(message=7)), "malformed answer"),
}


@pytest.fixture(scope="module")
def expected() -> dict[Any, Completion]:
    return faultless(CHATS)


@pytest.mark.parametrize("name", FAULTS)
def test_what_failed_once_is_asked_again_and_the_samples_are_those_of_a_run_without_faults(
    name: str, expected: dict[Any, Completion]
) -> None:
    fault, reason = FAULTS[name]
    with FailingServer(first(fault)) as server, engine_of(server, timeout_s=1.5 if fault.after_s else 60) as engine:
        assert table(engine, CHATS) == expected
        assert [seen.attempt for seen in server.seen].count(1) == 12
        assert all(seen.attempt <= 1 for seen in server.seen)
        usage = engine.usage()
        assert (usage["requests"], usage["asked_again"], usage["lost"]) == (24, {reason: 12}, 0)
    assert {seen.key for seen in server.seen if seen.attempt} == {seen.key for seen in server.seen}


@pytest.mark.parametrize("given", [1, 3, 6])
def test_a_wrong_number_of_samples_loses_and_doubles_none(given: int) -> None:
    """Of 4 that are asked for, so many come: those that lack are asked for, those beyond are dropped."""
    with FailingServer(lambda seen: Fault(n=given)) as server, engine_of(server, samples_per_request=4) as engine:
        got = table(engine, CHATS, 4)
        assert set(got) == {(number, index) for number in range(6) for index in range(4)}
        assert all(completion.finish_reason != "error" for completion in got.values())
        for number in range(6):  # sixteen words' worth of chance: no two samples of a prompt are alike
            assert len({got[number, index].text for index in range(4)}) == 4
        # Asked for 4, then 3, 2, 1; or for 4, then 1; or once.
        assert len(server.seen) == {1: 24, 3: 12, 6: 6}[given]
        assert engine.usage()["asked_again"].get("too few samples", 0) == {1: 18, 3: 6, 6: 0}[given]


def test_greedy_samples_are_asked_for_one_by_one_since_servers_refuse_several() -> None:
    with FailingServer() as server, engine_of(server, samples_per_request=4) as engine:
        table(engine, CHATS[:1], 3, SamplingParams(max_tokens=5, temperature=0))
        assert [seen.body.get("n", 1) for seen in server.seen] == [1, 1, 1]


def test_amid_every_kind_of_fault_nothing_is_lost_or_doubled_and_the_order_is_kept() -> None:
    prompts: list[Prompt] = [[{"role": "user", "content": f"q {i}"}] if i % 3 else f"text {i}" for i in range(40)]
    faults = [fault for fault, _ in FAULTS.values() if not fault.after_s and not fault.change]
    draw = random.Random(1)

    def fault(seen: Seen) -> Fault | None:
        return draw.choice(faults) if draw.random() < 0.3 else None

    expected = faultless(prompts, 3)
    with ExitStack() as stack:
        servers = [stack.enter_context(FailingServer(fault)) for _ in range(3)]
        engine = stack.enter_context(engine_of(*servers, concurrency=6))
        ordered = list(in_order(engine, iter(prompts), 3, PARAMS, ahead=20))
        usage = engine.usage()
    assert [prompt for prompt, _ in ordered] == prompts
    assert {(number, i): c for number, (_, found) in enumerate(ordered) for i, c in enumerate(found)} == expected
    sent = sum((server.sent() for server in servers), servers[0].sent() - servers[0].sent())
    assert len(sent) == 120 and usage["lost"] == 0
    # 30% fail: for 120 samples 51 more requests, here within four standard deviations (8.6).
    assert 17 < sum(usage["asked_again"].values()) == usage["requests"] - 120 < 86
    assert all(server.most_at_once <= 6 for server in servers)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_is_asked_once_and_the_others_still_come(
    status: int, expected: dict[Any, Completion]
) -> None:
    too_long = json.dumps({"error": {"message": "maximum context length is 512 tokens"}}).encode()

    def fault(seen: Seen) -> Fault | None:
        return Fault(status, body=too_long) if "question 2" in seen.key[0] else None

    with FailingServer(fault) as server, engine_of(server) as engine:
        got = table(engine, CHATS)
        assert engine.usage()["lost"] == 2 and not engine.usage()["asked_again"]
    assert {key for key, c in got.items() if c.finish_reason == "error"} == {(2, 0), (2, 1)}
    assert got[2, 0].error == f"status {status}: maximum context length is 512 tokens"
    assert all(got[key] == expected[key] for key in got if key[0] != 2)
    assert all(seen.attempt == 0 for seen in server.seen)


@pytest.mark.parametrize(("fault", "place"), [(Fault(500), 0), (Fault(500), 5), (Fault(drop=True), 5), (Fault(429), 5)])
def test_a_prompt_that_a_server_stumbles_over_every_time_is_an_error_completion_and_ends_nothing(
    fault: Fault, place: int, expected: dict[Any, Completion]
) -> None:
    def poison(seen: Seen) -> Fault | None:
        return fault if f"question {place}" in seen.key[0] else None

    with FailingServer(poison) as server, engine_of(server, max_retries=4, concurrency=2) as engine:
        got = table(engine, CHATS)
    assert {key for key, c in got.items() if c.finish_reason == "error"} == {(place, 0), (place, 1)}
    assert "asked " in got[place, 0].error and server.url in got[place, 0].error
    assert all(got[key] == expected[key] for key in got if key[0] != place)


@pytest.mark.parametrize(
    ("fault", "given", "told"),
    [
        (None, {"model": "other"}, "The model `other` does not exist.; there is no such model, or no such endpoint"),
        (Fault(403), {}, "the key may not use this model"),
        (
            Fault(429, body=b'{"error": {"message": "Quota", "code": "insufficient_quota"}}'),
            {},
            "there is no credit left",
        ),
    ],
)
def test_what_no_further_request_can_mend_ends_all_at_once(
    fault: Fault | None, given: dict[str, Any], told: str
) -> None:
    with FailingServer(lambda seen: fault) as server, engine_of(server, concurrency=1, **given) as engine:
        with pytest.raises(EngineError, match=told) as ended:
            table(engine, CHATS)
        assert server.url in str(ended.value) and len(server.seen) <= 1
        with pytest.raises(EngineError, match=told):
            table(engine, CHATS)


def test_a_key_that_is_refused_ends_all_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-1234secret")
    with FailingServer(key="sk-right") as server, engine_of(server, api_key_env="MY_KEY") as engine:
        with pytest.raises(EngineError, match="look at the environment variable MY_KEY") as ended:
            table(engine, CHATS)
        assert "secret" not in str(ended.value) and "***" in str(ended.value)
    monkeypatch.setenv("MY_KEY", "sk-right")
    with FailingServer(key="sk-right") as server, engine_of(server, api_key_env="MY_KEY") as engine:
        assert len(table(engine, CHATS)) == 12
        assert "sk-right" not in repr(vars(engine)) + engine.fingerprint + json.dumps(engine.usage())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    needed = pytest.raises(EngineError, match="set the environment variable OPENAI_API_KEY")
    with FailingServer(key="sk-right") as server, engine_of(server) as engine, needed:
        table(engine, CHATS)


def test_where_nothing_is_ever_answered_the_server_is_asked_a_few_times_and_not_a_million() -> None:
    with FailingServer(lambda seen: Fault(400)) as server, engine_of(server, concurrency=4) as engine:
        with pytest.raises(EngineError, match="20 requests in a row came to nothing, and a plain prompt too; the last"):
            table(engine, CHATS * 50)
        assert len(server.seen) < 40


@pytest.mark.parametrize("fault", [Fault(400), Fault(500)], ids=["refused", "stumbled over"])
def test_a_resumed_run_that_has_only_bad_prompts_left_gives_them_all_as_errors(fault: Fault) -> None:
    """None was answered in this process, as if all else came from the cache: only a plain prompt tells."""
    server = FailingServer(lambda seen: fault if "question" in seen.key[0] else None)
    with server, engine_of(server, concurrency=4, max_retries=2) as engine:
        got = table(engine, CHATS * 4, 1)
        assert len(got) == 24 and all(completion.finish_reason == "error" for completion in got.values())
        assert engine.usage()["lost"] == 24


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_no_server_at_all_ends_the_run_after_the_retries() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with closing(OpenAIEngine(settings(base_url=url, max_retries=3), first_wait_s=0.01)) as engine:
        with pytest.raises(EngineError, match=r"no server answers .*what was sampled is kept"):
            table(engine, CHATS * 20)
        assert engine.usage()["requests"] < 64 + 10


def test_when_the_server_dies_what_was_answered_is_given_before_the_error() -> None:
    with ExitStack() as stack:
        server = FailingServer()
        server.open()
        engine = stack.enter_context(engine_of(server, max_retries=3, concurrency=2))
        stream = engine.sample(iter(CHATS * 20), 1, PARAMS)
        got = [next(stream) for _ in range(10)]
        server.close()
        server.fault = lambda seen: Fault(drop=True)  # connections that are still open
        with pytest.raises(EngineError, match="no server answers"):
            for found in stream:
                got.append(found)
        assert len(got) == sum(server.sent().values()) >= 10
        assert all(completion.finish_reason != "error" for _, _, completion in got)


def test_a_server_that_was_started_anew_meanwhile_loses_nothing() -> None:
    before, after = FailingServer(port=free_port()), FailingServer()
    before.open()
    after.port = before.port
    with engine_of(before, concurrency=2) as engine:
        stream = engine.sample(iter(CHATS * 10), 1, PARAMS)
        got = [next(stream) for _ in range(10)]
        before.fault = lambda seen: Fault(drop=True)  # connections that are still open
        before.close()
        timer = threading.Timer(0.3, after.open)
        timer.start()
        got += stream
        timer.join()
        after.close()
        assert engine.usage()["asked_again"]["connection"] > 0
    assert len(got) == 60 and all(completion.finish_reason != "error" for _, _, completion in got)
    assert len(before.seen) + len(after.seen) < 60 + 10


def test_work_goes_to_whichever_server_has_room() -> None:
    with FailingServer(delay_s=0.02) as quick, FailingServer(delay_s=0.2) as slow:
        with engine_of(quick, slow, concurrency=3) as engine:
            table(engine, CHATS * 5, 2)
        assert len(quick.seen) + len(slow.seen) == 60
        assert len(quick.seen) > 1.5 * len(slow.seen) > 0
        assert max(quick.most_at_once, slow.most_at_once) <= 3


def test_a_server_that_keeps_failing_is_set_aside_and_tried_again() -> None:
    began = time.monotonic()

    def ill(seen: Seen) -> Fault | None:
        return Fault(500) if seen.at_s < began + 0.5 else None

    with FailingServer(delay_s=0.02) as well, FailingServer(ill) as other:
        with engine_of(well, other, concurrency=2) as engine:
            prompts: list[Prompt] = [f"p {i}" for i in range(150)]
            got = list(engine.sample(iter(prompts), 1, PARAMS))
        assert len(got) == 150 and all(c.finish_reason != "error" for _, _, c in got)
    failed = [seen for seen in other.seen if seen.at_s < began + 0.5]
    assert len(failed) < 20, "it was set aside"
    assert len(other.seen) > len(failed), "it was tried again"


def test_a_busy_server_that_answers_others_uses_up_no_retries() -> None:
    """One request every 20 ms is answered, and 16 are made at once: most are told to wait more often than twice."""
    free_at = 0.0

    def limited(seen: Seen) -> Fault | None:
        nonlocal free_at
        if seen.at_s < free_at:
            return Fault(429)
        free_at = seen.at_s + 0.02
        return None

    with FailingServer(limited) as server, engine_of(server, max_retries=2, concurrency=16) as engine:
        got = table(engine, CHATS * 2)
        assert all(completion.finish_reason != "error" for completion in got.values())
        assert max(seen.attempt for seen in server.seen) > 3


def test_retry_after_keeps_all_requests_away() -> None:
    with FailingServer(first(Fault(429, (("Retry-After", "0.6"),)))) as server:
        with engine_of(server, concurrency=1) as engine:
            table(engine, CHATS[:2], 1)
        times = [seen.at_s for seen in server.seen]
        assert len(times) == 4 and times[1] - times[0] >= 0.6 and times[-1] - times[0] >= 1.2


def test_limits_of_requests_and_tokens_are_kept() -> None:
    """600 a minute are one every 0.1 s after a second's worth of 10: the 25th goes out after 1.4 s at the earliest.

    An answer counts 5 tokens of the prompt and at least 2 new ones. At 6,000 a minute (100 a second) the 25th request,
    after 24 * 7 = 168 tokens, goes out when all but a second's worth of those are paid for: after 0.68 s.
    """
    prompts: list[Prompt] = [[{"role": "user", "content": f"q {i}"}] for i in range(25)]
    for given, least_s in (({"requests_per_minute": 600}, 1.4), ({"tokens_per_minute": 6000}, 0.68)):
        with FailingServer() as server, engine_of(server, **given) as engine:
            began = time.monotonic()
            table(engine, prompts, 1)
            assert server.seen[-1].at_s - began >= least_s


def test_requests_in_flight_stay_within_the_limit_and_prompts_are_read_no_further_than_twice_that() -> None:
    read = 0

    def endless() -> Iterator[Prompt]:
        nonlocal read
        while True:
            read += 1
            yield f"prompt {read}"

    with FailingServer(delay_s=0.01) as server, engine_of(server, concurrency=4) as engine:
        stream = engine.sample(endless(), 1, PARAMS)
        for taken in range(1, 41):
            next(stream)
            assert read <= taken + 2 * 4
        stream.close()
        assert server.most_at_once == 4


def test_a_caller_that_stops_leaves_no_thread_and_no_request_behind() -> None:
    before = set(threading.enumerate())
    with FailingServer(delay_s=0.3) as server:
        engine = OpenAIEngine(settings(base_url=server.url, concurrency=4))
        stream = engine.sample((f"p {i}" for i in range(1000)), 1, PARAMS)
        next(stream)
        stream.close()
        assert len(table(engine, CHATS[:1], 1)) == 1, "the engine goes on with other work"
        engine.close()
        engine.close()
        sent = len(server.seen)
        time.sleep(0.1)
        assert len(server.seen) == sent <= 4 + 4 + 1
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert not [name for name in left if not name.startswith("Thread-")], left  # the server's own end by themselves
    with pytest.raises(EngineError, match="the engine was closed"):
        table(engine, CHATS)


def test_a_mistake_in_what_gives_the_prompts_comes_through_and_the_engine_stays_usable() -> None:
    def broken() -> Iterator[Prompt]:
        yield from CHATS[:3]
        raise KeyError("prompts")

    with FailingServer() as server, engine_of(server) as engine:
        with pytest.raises(KeyError, match="prompts"):
            list(engine.sample(broken(), 1, PARAMS))
        assert len(table(engine, CHATS)) == 12


def test_tokens_and_cost_are_counted_as_the_server_tells_them() -> None:
    with FailingServer() as server, engine_of(server, prompt_price=2.0, completion_price=10.0) as engine:
        got = table(engine, CHATS, 2)
        written = sum(len(completion.text.split()) for completion in got.values())
        # The server counts a prompt's words in JSON: [{"role": "user", "content": "question 0"}] are 5.
        usage = {
            "requests": 12,
            "asked_again": {},
            "lost": 0,
            "prompt_tokens": 60,
            "completion_tokens": written,
            "answers_without_token_counts": 0,
            "cost_usd": round((60 * 2.0 + written * 10.0) / 1e6, 6),
        }
        assert engine.usage() == usage
    with FailingServer(counts_tokens=False) as server, engine_of(server) as engine:
        table(engine, CHATS, 2)
        usage = engine.usage()
        assert (usage["answers_without_token_counts"], usage["prompt_tokens"], "cost_usd" in usage) == (12, 0, False)


def test_choices_and_schemas_come_back_as_the_text_that_was_asked_for() -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    for server_kind in ("any", "vllm"):
        with FailingServer() as server, engine_of(server, server=server_kind) as engine:
            chosen = table(engine, CHATS, 2, SamplingParams(choices=("left", "right")))
            assert {completion.text for completion in chosen.values()} == {"left", "right"}
            fitting = table(engine, CHATS, 2, SamplingParams(json_schema=schema))
            assert all(isinstance(json.loads(c.text)["a"], int) for c in fitting.values())
