"""Threads that work ahead, and a limit on how long one of them may take."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vlv.errors import DataError

T = TypeVar("T")


class HungError(DataError):
    """A task took longer than it may."""


class Task(Generic[T]):
    """A call that a thread of a `Pool` makes."""

    def __init__(self, call: Callable[[], T], pool: Pool) -> None:
        self._call: Callable[[], T] | None = call
        self._pool = pool
        self._done = threading.Event()
        self._started: float | None = None
        self._thread: threading.Thread | None = None
        self._value: T
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call; the outcome is kept."""
        self._thread, self._started = threading.current_thread(), time.monotonic()
        call, self._call = self._call, None  # a finished task keeps nothing alive
        assert call is not None, "a task is run once"
        try:
            self._value = call()
        except BaseException as error:  # noqa: BLE001 -- raised where the result is asked for
            self._error = error
        self._done.set()

    def result(self) -> T:
        """What the call returned or raised.

        Raises:
            HungError: It takes longer than the time limit of the pool; its thread is given up and replaced.
        """
        self._pool.wait(self)
        if self._error is not None:
            raise self._error
        return self._value

    def wait(self, seconds: float | None) -> bool:
        """Whether the call has ended, after waiting for it."""
        return self._done.wait(seconds)

    def seconds_left(self, limit: float) -> float:
        """Of its time limit; all of it as long as no thread has begun."""
        return limit if self._started is None else self._started + limit - time.monotonic()


class Pool:
    """Daemon threads that make calls in the order in which they were submitted.

    Args:
        num_workers: Threads; with 0 a call is made when its result is asked for.
        timeout_seconds: How long one call may take; None is for ever. A call that takes longer cannot be stopped: its
            thread is left behind (a daemon does not keep the process alive) and another takes its place.
    """

    def __init__(self, num_workers: int, timeout_seconds: float | None = None) -> None:
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._given_up: set[threading.Thread] = set()
        self._threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._tasks, self._threads)

    def submit(self, call: Callable[[], T]) -> Task[T]:
        """Queue a call."""
        task = Task(call, self)
        if self.num_workers:
            self._put(task)
        return task

    def wait(self, task: Task[Any]) -> None:
        """Until a task has ended, or its time is up."""
        if not self.num_workers:
            if self.timeout_seconds is None:
                task.run()
                return
            self._put(task)
        if self.timeout_seconds is None:
            task.wait(None)
            return
        while not task.wait(max(0.0, task.seconds_left(self.timeout_seconds))):
            if task.seconds_left(self.timeout_seconds) <= 0:
                self._give_up(task)
                raise HungError(f"reading took longer than {self.timeout_seconds:g} seconds")

    def close(self) -> None:
        """Stop the threads, and wait for what they are at; those given up are left behind."""
        while not self._tasks.empty():
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                break
        threads = list(self._threads)
        _stop(self._tasks, self._threads)
        for thread in threads:
            thread.join()

    def _put(self, task: Task[Any]) -> None:
        while len(self._threads) < max(1, self.num_workers):
            self._start_thread()
        self._tasks.put(task)

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=_work, args=(self._tasks, self._given_up), name="vlv-decode", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _give_up(self, task: Task[Any]) -> None:
        thread = task._thread
        if thread in self._threads:
            self._given_up.add(thread)
            self._threads.remove(thread)
            self._start_thread()


def _work(tasks: queue.SimpleQueue[Task[Any] | None], given_up: set[threading.Thread]) -> None:
    while threading.current_thread() not in given_up and (task := tasks.get()) is not None:
        task.run()
        del task  # or the pool would live as long as its last result


def _stop(tasks: queue.SimpleQueue[Task[Any] | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    threads.clear()
