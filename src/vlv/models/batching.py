"""Batches side by side: on the CPU, several single-threaded batches are faster than one on all threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Map `work` over `items` on threads with one torch thread each; results come in order.

    `items` is read on the calling thread, at most `workers` ahead of the results. Tokenizers are not
    safe in several threads: use them there.

    Args:
        work: Computes one result; grad mode is a thread's own, so `work` sets it where it matters.
        items: What it is given.
        workers: Threads; 1 works on the calling thread with all torch threads.
    """
    if workers == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            torch.set_num_threads(threads)
