"""Batches put together and pinned by a thread while the caller works on the ones before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from vlv.data.workers import Pool, Task

Batch = dict[str, Any]


class ClosableLoader(Protocol):
    """An endless stream of batches that knows its position and holds threads."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def __next__(self) -> Batch:
        """The next one."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""

    def close(self) -> None:
        """Stop the threads."""

    def __enter__(self) -> Self:
        """Itself; it is closed at the end of the block."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""


class Ahead:
    """A loader whose batches are made by a thread before they are asked for; its position is that of its user.

    Args:
        loader: Hands out the batches; it is closed together with this.
        depth: Batches that are ready or in the making.
        pin: Put tensors into page-locked memory, from which a GPU copies them while it computes.
    """

    def __init__(self, loader: ClosableLoader, depth: int, *, pin: bool) -> None:
        self.loader, self.depth, self.pin = loader, depth, pin
        self._pool = Pool(1)
        self._begin()

    def _begin(self) -> None:
        self._state = self.loader.state_dict()
        self._coming: deque[Task[tuple[Batch, dict[str, Any]]]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        while len(self._coming) <= self.depth:
            self._coming.append(self._pool.submit(self._make))
        batch, self._state = self._coming.popleft().result()
        return batch

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self.loader)
        if self.pin:
            batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        return batch, self.loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as the loader says it."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            DataError: As the loader.
        """
        self._pool.close()  # it waits for the batch in the making
        self._pool = Pool(1)
        self.loader.load_state_dict(state)
        self._begin()

    def close(self) -> None:
        """Stop the thread, and the loader."""
        self._pool.close()
        self._coming.clear()
        self.loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
