"""Many items in batches, one after the other or side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

import torch
from tqdm import tqdm

from vlv.models.arguments import whole_number

T = TypeVar("T")
R = TypeVar("R")


class Sliceable(Protocol):
    """A tensor, a list or a range."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, rows: slice, /) -> Self:
        """Some of them, of the same kind."""


S = TypeVar("S", bound=Sliceable)


def chunks(items: S, size: int, progress: bool, what: str) -> Iterator[S]:
    """Slices of `size` items, with a bar on stderr where it is asked for.

    Raises:
        ConfigError: The size is below 1.
    """
    whole_number("batch_size", size, 1)
    starts = range(0, len(items), size)
    for start in tqdm(starts, disable=not progress, desc=what):
        yield items[start : start + size]


def side_by_side(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Map `work` over `items` on threads with one torch thread each; results come in order.

    On the CPU, several single-threaded batches are faster than one on all threads.
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
