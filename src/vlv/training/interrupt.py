"""Stopping a run in a clean state, and keeping two processes out of one run folder."""

from __future__ import annotations

import fcntl
import math
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from vlv.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from vlv.training.objective import FitResult


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal or its time limit; its state is saved and the same command goes on."""

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


class StopRequests:
    """Turns the first SIGINT, SIGTERM or SIGUSR1, and the time limit, into `reason`; a second signal acts at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._received = ""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop, or nothing."""
        if self._received:
            return self._received
        return "the time limit was reached" if time.monotonic() >= self._deadline else ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in self._SIGNALS
            }
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} was received"
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Make the run folder, and keep other processes out of it; the system frees the lock when a process dies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is training in {run_dir}; wait for it or name another folder"
            ) from error
        yield
