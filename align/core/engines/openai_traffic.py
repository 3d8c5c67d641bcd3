"""Requests to one or several servers: where each goes, how many at once, what is asked again and when.

- Asked again: no connection, a lost one, no answer in time, the statuses 408, 409, 425, 429 and 500 upwards, an answer
  that is no JSON or has no samples in it. The wait doubles each time, with jitter, up to a minute. A server that sends
  Retry-After is left alone for so long, five minutes at most.
- Refused for this request alone: every other status of 400 upwards (a prompt that is too long).
- The end for all: 401, 403, 404, no credit left; no server that answers, after all retries.

A server that failed three times in a row is set aside, and tried again with one request at a time until that succeeds.
Everything here runs in one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import openai

from align.core.engines.openai_requests import MalformedAnswerError, RefusedError
from align.core.engines.openai_settings import OpenAISettings
from align.core.errors import EngineError

LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 300.0
SET_ASIDE_AFTER = 3
"""Failures in a row after which a server is set aside."""

GIVE_UP_AFTER = 20
"""So many requests lost one after the other mean that something is wrong with all."""

_AGAIN = frozenset({408, 409, 425, 429})
_WRONG_FOR_ALL = {
    401: "the key is not accepted; {key}",
    403: "the key may not use this model; {key}",
    404: "there is no such model, or no such endpoint; look at model, base_url (mostly ending with /v1) and api",
}

Read = TypeVar("Read")

_jitter = random.Random()  # of the waits alone; nobody else's draws are touched


class _FailedError(Exception):
    """One attempt failed, and the next may not.

    Attributes:
        reason: a short name, for counting.
        wait_s: how long the server asks to be left alone.
        busy: it is only busy (429).
    """

    def __init__(self, reason: str, told: str = "", wait_s: float | None = None, busy: bool = False) -> None:
        super().__init__(told or reason)
        self.reason, self.wait_s, self.busy = reason, wait_s, busy


@dataclass
class Usage:
    """What was asked for and what it came to, in this process.

    Attributes:
        requests: sent, the repeated ones too.
        again: requests that had to be sent again, by reason.
        lost: requests that were never answered with samples.
        prompt_tokens: as the servers count them.
        completion_tokens: as the servers count them.
        untold: answers that came without such counts.
    """

    requests: int = 0
    again: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0


class Pace:
    """At most so many units a minute, spread evenly; a second's worth may go at once. None is no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._each_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._turn = asyncio.Lock()

    async def take(self, units: float, pause: Callable[[float], Any]) -> None:
        """Waits until so many units may be used. Whoever came first goes first."""
        if not self._each_s:
            return
        async with self._turn:
            while (wait := self._next - 1.0 - time.monotonic()) > 0:
                await pause(wait)
            self._next = max(self._next, time.monotonic()) + units * self._each_s

    def give_back(self, units: float) -> None:
        """Units that were taken and not needed; a negative number is what was used beyond."""
        self._next -= units * self._each_s


class Endpoint:
    """One server: its client, how busy it is, and whether it is set aside."""

    def __init__(self, address: str, client: openai.AsyncOpenAI, concurrency: int) -> None:
        self.address = address
        self.client = client
        self.in_flight = 0
        self.failures = 0
        self.rests = 0
        self.rests_until = 0.0
        self.concurrency = concurrency

    @property
    def is_down(self) -> bool:
        """Whether it failed too often in a row."""
        return self.failures >= SET_ASIDE_AFTER

    def room(self) -> int:
        """How many more requests it may be sent now."""
        if time.monotonic() < self.rests_until:
            return 0
        return (1 if self.is_down else self.concurrency) - self.in_flight

    def failed(self, first_wait_s: float) -> None:
        """Counts a failure; those that come in while it rests are of the same trouble and count once."""
        self.failures += 1
        if self.is_down and time.monotonic() >= self.rests_until:
            self.rests_until = time.monotonic() + backoff(self.rests, first_wait_s)
            self.rests += 1

    def leave_alone(self, seconds: float) -> None:
        """Sends it nothing for a while."""
        self.rests_until = max(self.rests_until, time.monotonic() + seconds)

    def answered(self) -> None:
        """It is well again."""
        self.failures = self.rests = 0


class Traffic:
    """Sends requests to whichever server has room, again where that may help, and keeps count.

    Args:
        settings: see `OpenAISettings`.
        key: the key to send, never shown; empty where there is none.
        first_wait_s: the first wait before a request is sent again; each further one is twice as long.

    Attributes:
        usage: what was sent and what it came to.
        ended: the error after which nothing more is sent.
    """

    def __init__(self, settings: OpenAISettings, key: str, first_wait_s: float) -> None:
        self.usage = Usage()
        self.ended: EngineError | None = None
        self._settings = settings
        self._key = key
        self._first_wait_s = first_wait_s
        self._endpoints = [
            Endpoint(
                address,
                openai.AsyncOpenAI(base_url=address, api_key=key or "none", max_retries=0, timeout=settings.timeout_s),
                settings.concurrency,
            )
            for address in settings.addresses
        ]
        self._requests = Pace(settings.requests_per_minute)
        self._tokens = Pace(settings.tokens_per_minute)
        self._waiting: deque[asyncio.Future[None]] = deque()  # for room, in the order in which they came
        self._end = asyncio.Event()
        self._answers = 0  # so far
        self._lost_in_a_row = 0

    async def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], Read], tokens: int) -> Read:
        """What `read` makes of the answer to a request.

        Args:
            path: chat/completions or completions.
            body: the request.
            read: raises `MalformedAnswerError` where the answer is worth nothing.
            tokens: a guess at what it will use, for the limit of tokens.

        Raises:
            RefusedError: no server will answer it, or all retries failed.
            EngineError: nothing can be asked any more.
        """
        attempts = busy = 0
        answers_before = -1
        last: Endpoint | None = None
        while True:
            await self._requests.take(1, self._pause)
            await self._tokens.take(tokens, self._pause)
            last = await self._take_room(last)
            used = 0
            try:
                self.usage.requests += 1
                answer = await self._send(last, path, body)
                used = self._count(answer)
                found = read(answer)
            except RefusedError as refused:
                last.answered()
                await self._lose(str(refused), path, body)
                raise
            except MalformedAnswerError as malformed:
                failure = _FailedError("malformed answer", str(malformed))
            except _FailedError as failed:
                failure = failed
            except EngineError as problem:
                raise self._stop(problem) from None
            else:
                last.answered()
                self._answers += 1
                self._lost_in_a_row = 0
                return found
            finally:
                last.in_flight -= 1
                self._tokens.give_back(tokens - used)
                self._wake(last.room())
            # A server that is only busy, and answers others meanwhile, will come to this request too.
            if failure.busy and self._answers > answers_before:
                busy += 1
            else:
                attempts += 1
            answers_before = self._answers
            if failure.wait_s:
                last.leave_alone(failure.wait_s)
            if not failure.busy:
                last.failed(self._first_wait_s)
            self._wake(len(self._waiting))  # how long to wait may be another time now
            spent = attempts > self._settings.max_retries
            if self._all_are_down(spent) and not await self._any_server(path, body, "answered", "refused"):
                places = ", ".join(endpoint.address for endpoint in self._endpoints)
                raise self._stop(
                    EngineError(
                        f"{self._settings.model}: no server answers ({places}); the last problem: {failure}; see that "
                        "it runs, and run the same command again: what was sampled is kept"
                    )
                )
            if spent:
                told = f"{failure}; asked {attempts + busy} times, the last time at {last.address}"
                await self._lose(told, path, body)
                raise RefusedError(told)
            self.usage.again[failure.reason] += 1
            await self._pause(backoff(attempts + busy - 1, self._first_wait_s))

    async def close(self) -> None:
        """Closes the connections."""
        for endpoint in self._endpoints:
            with suppress(Exception):
                await endpoint.client.close()

    async def _take_room(self, last: Endpoint | None) -> Endpoint:
        """Waits for room at a server: one that is well before one that isn't, another before the one that failed."""
        while True:
            if self.ended:
                raise self.ended
            if free := [endpoint for endpoint in self._endpoints if endpoint.room() > 0]:
                best = max(free, key=lambda endpoint: (not endpoint.is_down, endpoint is not last, endpoint.room()))
                best.in_flight += 1
                return best
            waits = [endpoint.rests_until - time.monotonic() for endpoint in self._endpoints]
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout(min((wait for wait in waits if wait > 0), default=LONGEST_WAIT_S)):
                    await turn
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake(1)  # it was this one's turn: the next one's now
                raise

    def _wake(self, count: int) -> None:
        """Lets so many of those that wait for room look again."""
        while count and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    async def _send(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
        """One attempt; gives the answer's JSON."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):  # the client's own is only that between two bytes
                text = await endpoint.client.post(f"/{path}", cast_to=str, body=body)
        except (TimeoutError, openai.APITimeoutError):
            raise _FailedError("timeout", f"no answer within {self._settings.timeout_s:g} s") from None
        except openai.APIStatusError as problem:
            raise self._status_problem(endpoint, path, problem) from None
        except openai.APIConnectionError as problem:
            raise _FailedError("connection", f"connection: {problem.__cause__ or problem}") from None
        try:
            return json.loads(text)
        except ValueError:
            raise _FailedError("malformed answer", f"an answer that is no JSON: {text[:80]!r}") from None

    def _status_problem(self, endpoint: Endpoint, path: str, problem: openai.APIStatusError) -> Exception:
        status = problem.status_code
        told = f"status {status}: {self._message(problem)}"
        if problem.code == "insufficient_quota" or problem.type == "insufficient_quota":
            return EngineError(f"{self._at(endpoint)}: {told}; there is no credit left")
        if status in _AGAIN or status >= 500:
            return _FailedError(f"status {status}", told, retry_after(problem.response.headers), busy=status == 429)
        if status in _WRONG_FOR_ALL:
            name = self._settings.api_key_env
            key = f"look at the environment variable {name}" if self._key else f"set the environment variable {name}"
            return EngineError(f"{self._at(endpoint)}/{path}: {told}; {_WRONG_FOR_ALL[status].format(key=key)}")
        return RefusedError(told)

    def _message(self, problem: openai.APIStatusError) -> str:
        """What the server says, shortened, without the key."""
        body = problem.body
        told = body.get("message") or body.get("detail") if isinstance(body, dict) else None
        text = str(told or problem.message)
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 300 else text[:297] + "..."

    def _at(self, endpoint: Endpoint) -> str:
        return f"{self._settings.model} at {endpoint.address}"

    def _count(self, answer: Any) -> int:
        """Adds the tokens that an answer tells of, whatever else is wrong with it; gives their sum."""
        told = answer.get("usage") if isinstance(answer, dict) else None
        told = told if isinstance(told, dict) else {}
        prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(completion, int):
            self.usage.untold += 1
            return 0
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        return prompt + completion

    async def _lose(self, why: str, path: str, body: dict[str, Any]) -> None:
        """Counts a request that is lost. Many in a row end all, unless a plain prompt is answered."""
        self.usage.lost += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row < GIVE_UP_AFTER:
            return
        if await self._any_server(path, body, "answered"):
            self._lost_in_a_row = 0  # these prompts are to blame, each for itself
            return
        raise self._stop(
            EngineError(
                f"{self._settings.model}: {GIVE_UP_AFTER} requests in a row came to nothing, and a plain prompt too; "
                f"the last: {why}"
            )
        )

    def _all_are_down(self, spent: bool) -> bool:
        """Whether every server failed as often in a row as may be, or at least while one request had all its retries.

        Such servers end the run unless a plain prompt is answered: a single prompt that a server stumbles over must not
        end it (a resumed run may have no other left), and a dead server must not use up one prompt's retries after the
        other.
        """
        limit = self._settings.max_retries
        return all(endpoint.is_down and (spent or endpoint.rests > limit) for endpoint in self._endpoints)

    async def _any_server(self, path: str, body: dict[str, Any], *outcomes: str) -> bool:
        """Whether a plain prompt with the parameters of this request comes to one of these outcomes anywhere."""
        plain: dict[str, Any] = (
            {"messages": [{"role": "user", "content": "Hi"}]} if "messages" in body else {"prompt": "Hi"}
        )
        plain |= {key: 1 for key in ("n", "max_tokens", "max_completion_tokens") if key in body}
        tried = (self._try(endpoint, path, body | plain) for endpoint in self._endpoints)
        return not set(outcomes).isdisjoint(await asyncio.gather(*tried))

    async def _try(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> str:
        """What comes of one more attempt at a server: answered, refused or failed."""
        self.usage.requests += 1
        try:
            self._count(await self._send(endpoint, path, body))
        except _FailedError as failed:
            return "refused" if failed.busy else "failed"
        except (RefusedError, EngineError):
            return "refused"
        endpoint.answered()
        return "answered"

    def _stop(self, problem: EngineError) -> EngineError:
        """Nothing more is sent; what waits is told so, what is in flight may end. Gives the error to raise."""
        self.ended = self.ended or problem
        self._end.set()
        self._wake(len(self._waiting))
        return self.ended

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._end.wait()
        if self.ended:
            raise self.ended


def backoff(times: int, first_wait_s: float) -> float:
    """Seconds to wait after having waited so many times before: doubling, between half and all of it."""
    return min(LONGEST_WAIT_S, first_wait_s * 2.0 ** min(times, 30)) * _jitter.uniform(0.5, 1.0)


def retry_after(headers: Any) -> float | None:
    """The seconds that a server asks for: retry-after-ms, or Retry-After in seconds or as a date; at most 5 minutes."""
    try:
        if told := headers.get("retry-after-ms"):
            seconds = float(told) / 1000
        elif not (told := headers.get("retry-after")):
            return None
        elif told.strip().replace(".", "", 1).isdigit():
            seconds = float(told)
        else:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
