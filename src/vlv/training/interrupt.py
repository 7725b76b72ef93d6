"""Stopping a run in a clean state, and keeping two processes out of one run folder."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from vlv.training.objective import FitResult

_ECHO_SECONDS = 2.0
"""A signal that comes again so soon is the same one: a terminal sends it to every process, and so does the launcher."""


Result = TypeVar("Result")


class _CutShort(BaseException):
    """Leaves work that a signal need not wait for."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal or its time limit; its state is saved and the same command goes on."""

    def __init__(self, message: str, result: FitResult, *, preempted: bool = False) -> None:
        super().__init__(message)
        self.result = result
        self.preempted = preempted
        """Whether it was SIGTERM or SIGUSR1: somebody wants the machine, and may start the command again."""


class StopRequests:
    """Turns the first SIGINT, SIGTERM or SIGUSR1, and the time limit, into `reason`.

    A second signal acts at once: SIGINT as it would have without us, the others by ending the process, even while it
    waits for another one.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._received = ""
        self._echo = _ECHO_SECONDS
        self._handled = math.inf  # when the first one was
        self._may_cut = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._previous_wakeup = -1

    @property
    def reason(self) -> str:
        """Why to stop, or nothing."""
        if self._received:
            return self._received
        return "the time limit was reached" if time.monotonic() >= self._deadline else ""

    def cut_short(self, work: Callable[[], Result]) -> Result | None:
        """What some work gives that can be done again; None where a signal came, which ends it at once."""
        if self._received:
            return None
        self._may_cut = True
        try:
            try:
                return work()
            finally:
                self._may_cut = False
        except _CutShort:
            self._may_cut = False
            return None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in self._SIGNALS
            }
            listener, self._speaker = socket.socketpair()
            self._speaker.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._speaker.fileno())
            threading.Thread(target=self._watch, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler, which runs when the main thread is between two instructions."""
        if number == signal.SIGINT and time.monotonic() - self._handled > self._echo:
            self._restore()
            signal.raise_signal(number)
        self._handled = min(self._handled, time.monotonic())
        is_first = not self._received
        self._received = self._received or f"{signal.Signals(number).name} was received"
        if is_first and self._may_cut:
            raise _CutShort

    def _watch(self, listener: socket.socket) -> None:
        """Hear of signals while the main thread is held up: a handler would have to wait for it."""
        heard = math.inf
        with listener:
            while numbers := listener.recv(1):
                again = time.monotonic() - heard > self._echo
                if again and numbers[0] in (signal.SIGTERM, signal.SIGUSR1):
                    os._exit(128 + numbers[0])
                if numbers[0] in self._SIGNALS:
                    heard = min(heard, time.monotonic())

    def _restore(self) -> None:
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._speaker.close()  # ends the watching thread
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
