"""One thread owns the model; what requests ask of it waits in a bounded queue and is computed in batches."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vlv.errors import EndpointError, RequestError, VLVError
from vlv.serve.errors import draining, overloaded

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline
    from vlv.serve.work import Work

logger = logging.getLogger(__name__)

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")
_UNHEALTHY = 3
"""Failures in a row after which the model is no longer trusted."""
_LONGEST_WAIT = 60


def _nothing() -> None:
    """Does it."""


@dataclass(frozen=True)
class _Job:
    """One item, and who waits for its result."""

    work: Work[Any, Any]
    item: object
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Computes items of many requests together.

    Args:
        pipe: The model; nobody else may use it meanwhile.
        batch_size: Items computed together.
        queue_size: Items that may wait.
        linger: Seconds that an item waits for others.
        report: Receives kind, items and seconds of every batch.

    Attributes:
        is_lost: Whether the device failed, after which this process cannot use it again.
        when_lost: Called then, by the thread that owns the model.
    """

    def __init__(
        self,
        pipe: VLVPipeline,
        *,
        batch_size: int = 32,
        queue_size: int = 64,
        linger: float = 0.005,
        report: Callable[[str, int, float], None] = lambda kind, count, seconds: None,
    ) -> None:
        self._pipe, self._report = pipe, report
        self._batch_size, self._queue_size, self._linger = batch_size, queue_size, linger
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._closing = False
        self.is_lost, self.when_lost = False, _nothing
        self._failures = 0
        self._seconds = 1.0  # of a batch, lately
        self._thread = threading.Thread(target=self._work, name="vlv-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Take on nothing more, finish what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def is_healthy(self) -> bool:
        """Whether the model works."""
        return self._thread.is_alive() and not self.is_lost and self._failures < _UNHEALTHY

    def check_room(self) -> None:
        """Refuse a request for which there will be no room, before anything is done for it.

        Raises:
            ApiError: There is none now, or the server ends.
        """
        with self._changed:
            self._make_room(1)

    def submit(self, work: Work[I, R], items: Sequence[I]) -> list[Future[R]]:
        """Queue all the items of a request, or none; who cancels a future that waits takes it out again.

        Raises:
            ApiError: There is no room, or the server ends.
        """
        jobs = [_Job(work, item) for item in items]
        with self._changed:
            self._make_room(len(jobs))
            self._waiting += jobs
            self._changed.notify_all()
        return [job.future for job in jobs]

    def _make_room(self, count: int) -> None:
        if self._closing:
            raise draining()
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
        if len(self._waiting) + count > self._queue_size:
            raise overloaded(self._seconds_to_wait())

    def _seconds_to_wait(self) -> int:
        batches = len(self._waiting) / self._batch_size
        return max(1, min(_LONGEST_WAIT, math.ceil(batches * self._seconds)))

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                began = time.monotonic()
                self._run(jobs)
                seconds = time.monotonic() - began
                self._seconds += 0.2 * (seconds - self._seconds)
                self._report(jobs[0].work.kind, len(jobs), seconds)

    def _take(self) -> list[_Job] | None:
        """The oldest job and others like it, as many as come within a moment; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            while not self._closing and self._count(first.work) < self._batch_size:
                left = first.since + self._linger - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Job] = []
            rest: deque[_Job] = deque()
            for job in self._waiting:
                fits = job.work == first.work and len(batch) < self._batch_size
                (batch if fits else rest).append(job)
            self._waiting = rest
            return batch

    def _count(self, work: Work[Any, Any]) -> int:
        return sum(job.work == work for job in self._waiting)

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Compute a batch; one that fails is computed in halves, so that no request suffers for another."""
        try:
            results = jobs[0].work.run(self._pipe, [job.item for job in jobs])
        except Exception as error:  # noqa: BLE001 -- whatever it is, the requests get an answer
            self._failed(jobs, error)
            return
        self._failures = 0
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)

    def _failed(self, jobs: Sequence[_Job], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError) and not self.is_lost:
            self.is_lost = True
            self.when_lost()
        # a request that an engine refuses is no fault of the engine
        is_engine = isinstance(error, EndpointError) and not isinstance(error, RequestError)
        if len(jobs) > 1 and not is_engine:
            half = len(jobs) // 2
            self._run(jobs[:half])
            self._run(jobs[half:])
            return
        if is_engine or not isinstance(error, VLVError):
            self._failures += 1
            logger.error("the model failed on %s", jobs[0].work.kind, exc_info=error)
        for job in jobs:
            job.future.set_exception(error)
