"""Signals: the first asks, an echo of it is ignored, a second one acts at once even where Python cannot."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from vlv.training import interrupt
from vlv.training.interrupt import StopRequests

HELD_UP = """
import ctypes
from vlv.training import interrupt
interrupt._ECHO_SECONDS = 0.1
with interrupt.StopRequests(None):
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):  # the second waits for ever, and no handler of Python runs meanwhile
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_an_echo_is_no_second_signal() -> None:
    with StopRequests(None) as stop:
        assert stop.reason == ""
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGTERM was received"


def test_a_second_interrupt_is_a_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_ECHO_SECONDS", 0.0)
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    with StopRequests(None) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason == "SIGUSR1 was received"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, outer) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_a_process_that_is_held_up(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", HELD_UP], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
