"""Many requests at once, and signals in their midst."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.endpoint.server import ScriptedServer, always
from tests.endpoint.test_client import endpoint
from vlv.endpoint import Client
from vlv.endpoint.run import stream

if TYPE_CHECKING:
    from collections.abc import Iterator


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.fixture
def sigterm() -> Iterator[None]:
    """As in the command line."""
    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(60)
def test_sigterm_in_the_midst_of_the_event_loop_ends_it(
    sigterm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes where the loop is about to wake a task up: a wake-up that is lost would be waited for for ever."""
    awaited: list[asyncio.Future[None]] = []
    woken = asyncio.events.Handle._run
    rung = []

    def ring(handle: asyncio.Handle) -> None:
        if awaited and awaited[0].done() and not rung:
            rung.append(handle)
            signal.raise_signal(signal.SIGTERM)
        woken(handle)

    async def work(item: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        awaited.append(future)
        asyncio.get_running_loop().call_soon(future.set_result, None)
        await future
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.events.Handle, "_run", ring)
    with ScriptedServer(always("ok")) as server, pytest.raises(KeyboardInterrupt):
        stream(Client(endpoint(server, concurrency=1)), range(3), work)
    assert len(rung) == len(awaited) == 1
    assert signal.getsignal(signal.SIGTERM) is interrupt
