"""Asks an engine for many captions at a time, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from vlv.endpoint.pace import backoff
from vlv.endpoint.run import run_together
from vlv.endpoint.transport import PassingError, Transport
from vlv.engine.requests import CaptionRequest, Served, read_models
from vlv.errors import EndpointError

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.endpoint import Endpoint

T = TypeVar("T")


class LostError(Exception):
    """The engine is not there any more; another one may go on."""


class Connection:
    """Connections to one engine, in an event loop of their own, so that it may be used from any thread.

    Args:
        endpoint: Where it is, and how hard it is asked.
        key: That it wants; None reads it from the environment.
        is_lost: Whether the engine has ended, as far as is known here.

    Raises:
        ConfigError: aiohttp or the key is missing.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        key: str | None = None,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        self._endpoint, self._is_lost = endpoint, is_lost
        self._transport = Transport(endpoint, key)
        self._base = endpoint.base_url.rstrip("/")
        self._random = Random(0)  # of the waits
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vlv-engine", daemon=True
        )
        self._thread.start()
        self._run(self._transport.open())

    def close(self) -> None:
        """Close all connections."""
        self._run(self._transport.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def served(self) -> Served:
        """What the engine has, without a second try.

        Raises:
            PassingError: It is not ready, or not there.
            EndpointError: It refuses us.
        """
        return self._run(self._transport.get(f"{self._base}/models", read_models))

    def ask(
        self, requests: Mapping[int, CaptionRequest], keep: Callable[[int, list[int]], None]
    ) -> None:
        """Ask for captions, as many at a time as the endpoint allows; an interruption takes the rest back.

        Args:
            requests: By number.
            keep: Receives the number and the tokens of each caption as it comes, in another thread.

        Raises:
            LostError: The engine has ended meanwhile.
            EndpointError: A caption could not be had, for good.
        """
        self._run(self._ask_all(requests, keep))

    def reload(self, folder: Path) -> None:
        """Let the engine read other weights of the same language model, and forget what it has computed with the old ones.

        Raises:
            LostError: The engine has ended meanwhile.
            EndpointError: It does not.
        """
        root = self._base.removesuffix("/v1")
        how = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            for name, body in (("collective_rpc", how), ("reset_prefix_cache", {})):
                payload = json.dumps(body).encode()
                self._run(self._transport.post(f"{root}/{name}", payload, lambda raw: None))
        except PassingError as trouble:
            if self._is_lost():
                raise LostError(trouble.reason) from trouble
            raise EndpointError(
                f"the engine does not take the weights: {trouble.reason}"
            ) from trouble

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _ask_all(
        self, requests: Mapping[int, CaptionRequest], keep: Callable[[int, list[int]], None]
    ) -> None:
        async def one(number: int, request: CaptionRequest) -> None:
            keep(number, await self._ask_one(request))

        await run_together(one(*item) for item in requests.items())

    async def _ask_one(self, request: CaptionRequest) -> list[int]:
        """Try until the caption is there, or no hope for it."""
        given, began = self._endpoint, time.monotonic()
        url, payload = f"{self._base}/completions", request.payload(self._endpoint.model)
        attempt = waits = 0
        while True:
            try:
                async with self._slots:
                    return await self._transport.post(url, payload, request.read)
            except PassingError as trouble:
                if self._is_lost():
                    raise LostError(trouble.reason) from trouble
                attempt += not trouble.rate_limited
                waited = time.monotonic() - began + (trouble.wait or 0)
                if attempt > given.retries or (
                    trouble.wait is not None and waited > given.patience
                ):
                    raise EndpointError(
                        f"the engine at {given.base_url} gives no caption: {trouble.reason} ({waits + 1} tries)"
                    ) from trouble
                jitter = backoff(waits, given.backoff, given.max_backoff, self._random)
                await asyncio.sleep((trouble.wait or 0.0) + jitter)
                waits += 1
