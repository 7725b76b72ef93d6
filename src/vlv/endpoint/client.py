"""The client: an answer comes from the store, or from the endpoint, with retries until it comes or fails for good."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Self

from vlv.endpoint.budget import Budget, Ledger, Prices, Spent
from vlv.endpoint.messages import Answer, ChatRequest, parse_answer
from vlv.endpoint.pace import Pace, Pause, backoff
from vlv.endpoint.transport import PassingError, Transport
from vlv.errors import EndpointError, RequestError

if TYPE_CHECKING:
    from vlv.endpoint.settings import Endpoint
    from vlv.endpoint.store import KeyedStore

UNKNOWN_LENGTH = 1000
"""Tokens that an answer without a limit is taken to have, until it is there."""


class Client:
    """Asks an endpoint; an asynchronous context manager that may be entered again after it was left.

    Args:
        endpoint: Where, and how hard.
        store: Keeps every answer, so that none is paid for twice, not even over several runs; without one
            the same request is sent as often as it is asked.
        budget: What may be spent, over all runs that share the store.
        prices: Of the model.
        seed: Of the jitter in the waits.

    Attributes:
        ledger: What was spent.

    Raises:
        ConfigError: aiohttp or the key is missing, or the budget makes no sense.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        store: KeyedStore | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        seed: int = 0,
    ) -> None:
        self.endpoint = endpoint
        self.ledger = Ledger(budget, prices, None if store is None else _spent_before(store))
        self._store = store
        self._transport = Transport(endpoint)
        self._random = Random(seed)
        self._requests = Pace(endpoint.requests_per_minute)
        self._tokens = Pace(endpoint.tokens_per_minute)
        self._pause = Pause()
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._in_flight: dict[bytes, asyncio.Event] = {}
        self._failures_in_a_row = 0

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(self.endpoint.concurrency)  # belongs to this event loop
        self.ledger.reopen()
        await self._transport.open()
        return self

    async def __aexit__(self, *rest: object) -> None:
        await self._transport.close()

    async def ask(self, request: ChatRequest) -> Answer:
        """The answer to a request.

        Raises:
            RequestError: This request failed for good.
            BudgetError: It would go beyond the budget.
            EndpointError: The endpoint cannot be reached, or refuses us; nothing more is worth sending.
            OutputError: The answer cannot be stored.
        """
        payload = request.payload(self.endpoint)
        if self._store is None:
            return await self._paid_for(request, payload)
        key = hashlib.sha256(payload).digest()
        while True:
            if (known := self._store.get(key)) is not None:
                self.ledger.spent.cached += 1
                return Answer.from_json(known)
            if key not in self._in_flight:
                break
            await self._in_flight[key].wait()
        ended = self._in_flight[key] = asyncio.Event()
        try:
            answer = await self._paid_for(request, payload)
            self._store.put(key, answer.to_json())
            return answer
        finally:
            del self._in_flight[key]
            ended.set()

    async def _paid_for(self, request: ChatRequest, payload: bytes) -> Answer:
        """Try until there is an answer, or no hope for one."""
        began = time.monotonic()
        attempt = waits = 0
        while True:
            try:
                answer = await self._once(request, payload)
            except PassingError as trouble:
                attempt += not trouble.rate_limited
                if attempt > self.endpoint.retries:
                    raise self._failure(trouble, attempt) from trouble
                patience = self.endpoint.patience - (time.monotonic() - began)
                if trouble.rate_limited and patience < 0:
                    raise self._failure(trouble, attempt) from trouble
                if (trouble.wait or 0.0) > patience:
                    raise self._failed(
                        f"{trouble.reason}; the server wants a wait of {trouble.wait:.4g} s, which is more than the "
                        f"patience of {self.endpoint.patience:g} s"
                    ) from trouble
                await self._wait(trouble, waits)
                waits += 1
            except RequestError as error:
                raise self._failed(str(error)) from error
            else:
                self._failures_in_a_row = 0
                return answer

    async def _once(self, request: ChatRequest, payload: bytes) -> Answer:
        guess = request.guess_prompt_tokens()
        longest = request.max_tokens or UNKNOWN_LENGTH
        async with self._slots:
            expected = self.ledger.expected_prompt_tokens(guess) + longest
            await self._tokens.take(expected)
            await self._requests.take()
            await self._pause.over()
            ticket = await self.ledger.enter(guess, longest)
            answer = None
            try:
                answer = self._priced(
                    await self._transport.post(
                        self.endpoint.url,
                        payload,
                        partial(parse_answer, guessed_prompt_tokens=guess),
                    )
                )
            finally:
                self.ledger.leave(ticket, answer)
                used = 0 if answer is None else answer.prompt_tokens + answer.completion_tokens
                self._tokens.correct(used - expected)
        return answer

    def _priced(self, answer: Answer) -> Answer:
        usd = self.ledger.prices.cost(answer.prompt_tokens, answer.completion_tokens)
        return replace(answer, usd=usd)

    async def _wait(self, trouble: PassingError, waits: int) -> None:
        """Wait as the server asks, or longer each time; a rate-limiting server gets a pause from all."""
        given = self.endpoint
        jitter = backoff(waits, given.backoff, given.max_backoff, self._random)
        if trouble.wait is not None:
            self._pause.extend(trouble.wait)
            await asyncio.sleep(trouble.wait)
        await asyncio.sleep(jitter)

    def _failure(self, trouble: PassingError, attempts: int) -> EndpointError:
        if trouble.unreachable:
            return EndpointError(f"{trouble.reason}; is the server running, and the address right?")
        if trouble.rate_limited:
            return self._failed(f"rate limited for {self.endpoint.patience:g} s: {trouble.reason}")
        return self._failed(f"{trouble.reason} ({attempts} tries)")

    def _failed(self, reason: str) -> EndpointError:
        """The failure of one request, or of the endpoint when nothing else happens any more."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.endpoint.failures_in_a_row:
            return EndpointError(
                f"{self._failures_in_a_row} requests in a row have failed, so {self.endpoint.url} is given up; "
                f"the latest: {reason}"
            )
        return RequestError(reason)


def _spent_before(store: KeyedStore) -> Spent:
    answers = len(store)
    return Spent(
        requests=answers,
        answers=answers,
        prompt_tokens=int(store.total("prompt_tokens")),
        completion_tokens=int(store.total("completion_tokens")),
        usd=store.total("usd"),
    )
