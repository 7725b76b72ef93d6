"""Many requests at once, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from vlv.errors import BudgetError, RequestError

if TYPE_CHECKING:
    from vlv.endpoint.budget import Spent
    from vlv.endpoint.client import Client
    from vlv.endpoint.messages import Answer, ChatRequest

T = TypeVar("T")
_END: Any = object()


def run(
    client: Client,
    requests: Iterable[tuple[T, ChatRequest]],
    on_answer: Callable[[T, Answer | RequestError], None],
) -> Spent:
    """Ask all requests, as many at a time as the endpoint allows.

    The requests are taken from the iterator when their turn comes, in a thread of their own, so that it
    may be endless and may read files. Answers arrive in any order, in the caller's thread.

    Args:
        client: A client that is not open yet.
        requests: Pairs of whatever tells them apart, and the request.
        on_answer: Receives the first and the answer, or why there is none.

    Returns:
        What this run has spent.

    Raises:
        BudgetError: The budget is used up; what was in flight has been waited for.
        EndpointError: The endpoint cannot be reached, or refuses us.
    """

    async def work(pair: tuple[T, ChatRequest]) -> None:
        tag, request = pair
        try:
            answer: Answer | RequestError = await client.ask(request)
        except RequestError as error:
            answer = error
        on_answer(tag, answer)

    stream(client, requests, work)
    return client.ledger.spent


def stream(
    client: Client, items: Iterable[T], work: Callable[[T], Awaitable[None]], ahead: int = 0
) -> None:
    """Do asynchronous work on each item, ``concurrency + ahead`` items at a time.

    Args:
        client: A client that is not open yet; it is open while the work is done.
        items: Taken when their turn comes, in a thread of their own.
        work: What to do with one; it may ask the client several times.
        ahead: Items that are prepared while the others wait for their answers.

    Raises:
        BudgetError: The budget is used up; items whose requests are in flight have been waited for.
        VLVError: What else an item raises; the others are cancelled.
    """
    asyncio.run(_stream(client, items, work, client.endpoint.concurrency + ahead))


async def run_together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first that raises, or a cancellation, ends the others, and they are waited for."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM cancel the current task, as `asyncio.run` lets SIGINT do.

    A handler that raises would do so in the midst of the event loop, which would lose what it was about to run: a task that
    is then waited for, for ever.

    Raises:
        KeyboardInterrupt: The signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task, came = asyncio.get_running_loop(), asyncio.current_task(), False

    def end() -> None:
        nonlocal came
        came = True
        if task is not None:
            task.cancel()

    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


async def _stream(
    client: Client, items: Iterable[T], work: Callable[[T], Awaitable[None]], workers: int
) -> None:
    iterator = iter(items)
    turn = asyncio.Lock()
    stopped: list[BudgetError] = []
    ended = False

    async def worker() -> None:
        nonlocal ended
        while True:
            async with turn:
                item = _END if ended or stopped else await asyncio.to_thread(next, iterator, _END)
                ended = ended or item is _END
            if item is _END:
                return
            try:
                await work(item)
            except BudgetError as error:
                stopped.append(error)

    with _ended_by_sigterm():
        async with client:
            await run_together(worker() for _ in range(workers))
    if stopped:
        raise stopped[0]
