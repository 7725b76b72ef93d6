"""Connections that are limited in number, and in the time that headers and answers may take, which uvicorn leaves open."""

from __future__ import annotations

import asyncio
import json
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from vlv.serve.errors import ApiError
from vlv.serve.settings import Limits


def limited(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol of connections with these limits."""
    return type("Connection", (_Connection,), {"limits": limits})


class _Connection(H11Protocol):
    limits: ClassVar[Limits]
    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the headers, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections", code="too_many_connections"))
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Take in data; the first of a request start the clock, its last header stops it."""
        if self._headers_due is None and not self._is_at_work():
            self._await_headers()
        super().data_received(data)
        if self._is_at_work():
            self._forget_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget_headers()
        self._forget_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give who doesn't read an answer a while to do so."""
        super().pause_writing()
        self._reading_due = self.loop.call_later(self.limits.patience_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with the answer."""
        self._forget_reading()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiError(400, "this is no HTTP request", code="invalid_request"))

    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(self.limits.header_seconds, self._cut_off)

    def _forget_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _forget_reading(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _cut_off(self) -> None:
        if not self._is_at_work():
            self._refuse(ApiError(408, "the headers came too slowly", code="slow_headers"))

    def _refuse(self, error: ApiError) -> None:
        self._forget_headers()
        if not self.transport.is_closing():
            self.transport.write(_plain(error))
            self.transport.close()


def _plain(error: ApiError) -> bytes:
    """A whole answer, for who does not get as far as the routes."""
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
