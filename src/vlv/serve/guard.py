"""What stands before every route: keys, hosts, sizes, slow bodies, headers, and one line of log for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlv.serve.errors import ApiError, ClientLeftError, draining, internal, overloaded, too_often
from vlv.serve.logs import requests
from vlv.serve.settings import Rates

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vlv.serve.service import Service
    from vlv.serve.settings import Keys

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Everything else needs a key, where there are keys."""
_DISCARD_SECONDS = 5.0
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass
class _Exchange:
    """What the log says of a request."""

    method: str
    path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    num_bytes: int = 0
    is_read: bool = False


class Guard:
    """An ASGI application around another.

    Args:
        app: The routes.
        paths: Of the routes; all others have one name in logs and metrics.
        service: Behind the routes.
        keys: Who may ask.
        local_only: Refuse what a page of another site may have sent through a browser on this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: AbstractSet[str],
        service: Service,
        keys: Keys,
        *,
        local_only: bool,
    ) -> None:
        self._app, self._paths, self._service, self._keys = app, paths, service, keys
        self._limits, self._local_only = service.settings.limits, local_only
        self._rates, self._held = Rates(service.settings.rate), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        exchange = _Exchange(scope["method"][:20], path)
        self._service.metrics.begin()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                more = [*_HEADERS, (b"x-request-id", exchange.id.encode())]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await self._pass_on(scope, receive, answer, exchange)
        except Exception:
            logger.exception("request %s failed", exchange.id)
            if not exchange.status:
                await _refuse(internal(), answer)
        finally:
            self._held -= exchange.num_bytes
            self._note(exchange)

    async def _pass_on(
        self, scope: Scope, receive: Receive, answer: Send, exchange: _Exchange
    ) -> None:
        try:
            self._admit(scope)
            body = await self._read(receive, exchange)
        except ApiError as error:
            if not exchange.is_read and scope["method"] not in ("GET", "HEAD"):
                await self._discard(receive)
            error.headers["Connection"] = "close"
            await _refuse(error, answer)
            return
        await self._app(scope, _replay(body, receive), answer)

    def _admit(self, scope: Scope) -> None:
        """Refuse what needs no look at the body."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS:
            key = self._keys.find(headers.get(b"authorization", b"")) if self._keys else b""
            if key is None:
                raise ApiError(
                    401,
                    "the key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if self._local_only and not self._keys:
                _check_browser(headers)
            if self._service.draining:
                raise draining()
            if seconds := self._rates.wait(key):
                raise too_often(seconds)
        if int(headers.get(b"content-length", b"0")[:18]) > self._limits.body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive, exchange: _Exchange) -> bytes:
        """The body, as long as it is neither too large nor too slow."""
        limits, parts = self._limits, list[bytes]()
        start = asyncio.get_running_loop().time() + limits.patience_seconds
        try:
            async with asyncio.timeout_at(start) as limit:
                while not exchange.is_read:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError()
                    part: bytes = message.get("body", b"")
                    parts.append(part)
                    exchange.num_bytes += len(part)
                    self._held += len(part)
                    exchange.is_read = not message.get("more_body", False)
                    if exchange.num_bytes > limits.body_bytes:
                        raise self._too_large()
                    if self._held > limits.held_bytes:
                        raise overloaded(1)
                    limit.reschedule(start + exchange.num_bytes / limits.bytes_per_second)
        except TimeoutError:
            exchange.is_read = True  # nothing is left to wait for
            raise ApiError(408, "the body came too slowly", code="slow_body") from None
        return b"".join(parts)

    async def _discard(self, receive: Receive) -> None:
        """Take in the rest of a refused body, or the client would not look at the answer before it has sent all."""
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while taken <= 2 * self._limits.body_bytes:
                    message = await receive()
                    taken += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than this server's limit of {self._limits.body_bytes} bytes",
            code="request_too_large",
        )

    def _note(self, exchange: _Exchange) -> None:
        seconds = time.monotonic() - exchange.began
        status = exchange.status or 499
        self._service.metrics.end(exchange.path, status, seconds)
        fields = {
            "id": exchange.id,
            "method": exchange.method,
            "path": exchange.path,
            "status": status,
            "seconds": round(seconds, 4),
            "body_bytes": exchange.num_bytes,
        }
        requests.info("request", extra={"fields": fields})


def _check_browser(headers: dict[bytes, bytes]) -> None:
    """Without a key, a page of another site must not ask through the browser of who sits here."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name not in _LOCAL_HOSTS or origin not in ("", f"http://{host}"):
        raise ApiError(
            403,
            "without a key this server answers only to this machine, under the name localhost or 127.0.0.1",
            code="foreign_origin",
        )


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """What an application receives whose body was read before it."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again
