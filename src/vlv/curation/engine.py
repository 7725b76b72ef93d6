"""Where tasks run: in processes of this machine, or on Ray Data. Results come back in the order of the tasks.

A task is a plain object with everything that its function needs; a function writes its result to a
file of its own and returns little. Both engines therefore give the same bytes with any number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, Self, TypeVar

from vlv.errors import ConfigError, DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2  # tasks in hand for each worker, so that none waits
_MAX_DEATHS = 3  # of worker processes in a row, before a task counts as deadly


class Engine(Protocol):
    """Runs tasks; used as a context, at whose end nothing is left running."""

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results in the order of the tasks; an error of a task is raised here."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...


class LocalEngine:
    """Worker processes on this machine, each with one thread.

    Args:
        workers: Processes; None takes one for each processor. One alone, or a single task, needs no other process.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}; at least one is needed")
        self.workers = workers or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `Engine`; a task whose worker dies is tried again.

        Raises:
            DataError: Worker processes die again and again.
        """
        if self.workers == 1 or len(tasks) == 1:
            yield from map(function, tasks)
            return
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        remaining = iter(tasks)
        deaths = 0
        while True:
            while len(waiting) < _AHEAD * self.workers:
                try:
                    task = next(remaining)
                except StopIteration:
                    break
                waiting.append((task, self._submit(function, task)))
            if not waiting:
                return
            try:
                result = waiting[0][1].result()
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == _MAX_DEATHS:
                    raise DataError(
                        f"a worker process died {deaths} times, the last time at or soon after "
                        f"{waiting[0][0]}; give it more memory or fewer --workers, or take the file out"
                    ) from error
                self._stop()
                waiting = deque((task, self._submit(function, task)) for task, _ in waiting)
                continue
            deaths = 0
            waiting.popleft()
            yield result

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["vlv.curation.measure"])
            self._pool = ProcessPoolExecutor(self.workers, context, _start_worker)
        try:
            return self._pool.submit(function, task)
        except BrokenProcessPool as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def _stop(self, *, at_once: bool = False) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        workers = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=not at_once, cancel_futures=True)
        if at_once:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop(at_once=kind is not None)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent acts
    one_thread()


def one_thread() -> None:
    """Keep torch to one thread: a worker has one processor."""
    import torch

    torch.set_num_threads(1)


def make_engine(name: str, workers: int | None = None, ray_address: str | None = None) -> Engine:
    """The engine of a command line.

    Raises:
        ConfigError: An unknown name, an option without effect, or Ray is not installed.
    """
    if name == "local":
        if ray_address is not None:
            raise ConfigError("--ray-address has no effect with --engine local; add --engine ray")
        return LocalEngine(workers)
    if name != "ray":
        raise ConfigError(f"the engine is {name!r}; choose local or ray")
    from vlv.curation.ray_engine import RayEngine

    return RayEngine(workers, ray_address)
