"""Samples from any OpenAI-compatible server: a hosted service, vLLM, SGLang, llama.cpp, `transformers serve`.

Prompts are read in the caller's thread; one background thread runs the requests of all calls (`openai_traffic.py`), so
that a server has work while the caller is busy with what came before. What a request holds and what its answer means
stands in `openai_requests.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.engines.openai_requests import (
    DIALECTS,
    RefusedError,
    check_params,
    is_chat,
    read_answer,
    request_body,
    unsendable,
)
from align.core.engines.openai_settings import OpenAISettings
from align.core.errors import EngineError

Answers = list[tuple[int, Completion]]


class OpenAIEngine:
    """One model behind one or several servers. See `Engine`.

    A server's weights can't be seen: the fingerprint is that of the model's name and of what every request holds, so a
    server that has other weights under the same name is not noticed. Give it another name there when they change.

    Each sample is asked for with a seed made from `params.seed`, the prompt and the sample's index, so that a retry and
    a resumed run ask for the same; how well that holds is the server's affair.

    Args:
        settings: where the servers are and how to ask them.
        generator: the name written with every row; the model's name by default.
        first_wait_s: the wait before a request is sent again for the first time; later ones double.

    Attributes:
        settings: as given.

    Raises:
        EngineError: the client isn't installed, or the key that was named isn't there.
    """

    def __init__(self, settings: OpenAISettings, *, generator: str | None = None, first_wait_s: float = 0.5) -> None:
        try:
            from align.core.engines.openai_traffic import Traffic
        except ImportError as problem:
            raise EngineError(
                f"{settings.model}: {problem}; an engine of kind openai needs the package: "
                "pip install 'align-toolkit[openai]'"
            ) from problem
        self.settings = settings
        self._generator = generator or settings.model
        self._traffic = Traffic(settings, _key(settings), first_wait_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def generator(self) -> str:
        """See `Engine`."""
        return self._generator

    @property
    def fingerprint(self) -> str:
        """See `Engine`; of the model's name and of what requests hold, for a server's weights can't be seen."""
        seen = self.settings.model_dump(mode="json", exclude=set(OpenAISettings.speed_only))
        return hashlib.blake2b(json.dumps(seen, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def key(self) -> str:
        """What is sent as the key, read anew so that it is kept nowhere; empty where there is none."""
        return _key(self.settings)

    @property
    def gives_token_ids(self) -> bool:
        """Whether the server tells the ids of the tokens it sampled; `token_ids` is empty where it doesn't."""
        return DIALECTS[self.settings.server].gives_token_ids

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        """See `Engine`. Where nothing can be asked any more, what is in flight is still given before the error."""
        params.check(n)
        check_params(params, self.settings)
        loop = self._running_loop()
        ahead = 2 * self.settings.concurrency * len(self.settings.addresses)
        work = (
            (number, prompt, indices)
            for number, prompt in enumerate(prompts)
            for indices in self._requests_of(first_index, n, params)
        )
        results: SimpleQueue[tuple[int, Answers] | Future[None]] = SimpleQueue()
        going: set[Future[None]] = set()
        error: BaseException | None = None
        try:
            while True:
                if error is None:
                    for number, prompt, indices in islice(work, ahead - len(going)):
                        task = self._complete(number, prompt, indices, params, results)
                        future = asyncio.run_coroutine_threadsafe(task, loop)
                        going.add(future)
                        future.add_done_callback(results.put)
                if not going:
                    break
                result = results.get()
                if isinstance(result, Future):
                    going.discard(result)
                    error = error or result.exception()
                    continue
                number, answers = result
                for index, completion in answers:
                    yield number, index, completion
            if error is not None:
                raise error
        finally:  # the caller stopped, or was interrupted
            for future in going:
                future.cancel()

    def usage(self) -> dict[str, Any]:
        """What was sent in this process and what it came to, for the manifest: requests, tokens, cost in USD."""
        usage, settings = self._traffic.usage, self.settings
        told: dict[str, Any] = {
            "requests": usage.requests,
            "asked_again": dict(sorted(dict(usage.again).items(), key=lambda entry: -entry[1])),
            "lost": usage.lost,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "answers_without_token_counts": usage.untold,
        }
        if settings.prompt_price is not None or settings.completion_price is not None:
            cost = usage.prompt_tokens * (settings.prompt_price or 0)
            cost += usage.completion_tokens * (settings.completion_price or 0)
            told["cost_usd"] = round(cost / 1e6, 6)
        return told

    def close(self) -> None:
        """Ends the background thread and the connections; what is in flight is given up."""
        self._closed = True
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._shut(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._traffic.close()
        await asyncio.get_running_loop().shutdown_default_executor()  # the client looks up names there

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise EngineError(f"{self.settings.model}: the engine was closed; build another")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon, so that an engine that nobody closed doesn't keep the process alive.
            self._thread = threading.Thread(target=self._loop.run_forever, name="openai engine", daemon=True)
            self._thread.start()
        return self._loop

    def _requests_of(self, first_index: int, n: int, params: SamplingParams) -> Iterator[list[int]]:
        """The sample indices of a prompt, by request. Greedy samples are alike, and some servers refuse two of them."""
        size = self.settings.samples_per_request if params.temperature > 0 else 1
        for start in range(first_index, first_index + n, size):
            yield list(range(start, min(start + size, first_index + n)))

    async def _complete(
        self,
        number: int,
        prompt: Prompt,
        indices: list[int],
        params: SamplingParams,
        results: SimpleQueue[tuple[int, Answers] | Future[None]],
    ) -> None:
        """Puts the samples of these indices into the queue. Those that an answer lacks are asked for again."""
        problem = unsendable(prompt, params, self.settings)
        while indices and not problem:
            body = request_body(prompt, len(indices), params, self.settings, indices[0])
            try:
                found = await self._traffic.ask(
                    "chat/completions" if is_chat(prompt) else "completions",
                    body,
                    partial(read_answer, n=len(indices), params=params, settings=self.settings),
                    tokens=_tokens_of(prompt) + params.max_tokens * len(indices),
                )
            except RefusedError as refused:
                problem = str(refused)
                break
            results.put((number, list(zip(indices, found, strict=False))))
            indices = indices[len(found) :]
            if indices:
                self._traffic.usage.again["too few samples"] += 1
        if problem:
            results.put((number, [(index, Completion("", (), "error", error=problem)) for index in indices]))


def _key(settings: OpenAISettings) -> str:
    """The key from the environment; none where the default variable isn't set, as with a server of one's own."""
    key = os.environ.get(settings.api_key_env, "")
    if not key and "api_key_env" in settings.model_fields_set:
        raise EngineError(
            f"{settings.model}: api_key_env: the environment variable {settings.api_key_env} isn't set; set it to the "
            "key, or leave api_key_env out where the server wants none"
        )
    return key


def _tokens_of(prompt: Prompt) -> int:
    """A guess at how many tokens a prompt has: four characters each."""
    if isinstance(prompt, str):
        return len(prompt) // 4 + 1
    if is_chat(prompt):
        return sum(len(str(message)) // 4 for message in prompt)
    return len(prompt)
