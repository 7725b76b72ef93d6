"""The clock: elapsed time, what is left, and the cost, across interruptions and crashes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.training.support import train
from vlv.training.interrupt import Interrupted
from vlv.training.journal import Clock, read_metrics

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr("vlv.training.journal.time.monotonic", lambda: time[0])
    return time


def test_pace_and_cost(now: list[float]) -> None:
    clock = Clock(steps=100, num_devices=8, usd_per_hour=2.5)
    assert clock.figures(0) == {"elapsed_seconds": 0, "device_hours": 0, "cost_usd": 0}
    now[0] += 90
    assert clock.tick() == 90
    assert clock.figures(10) == {
        "elapsed_seconds": 90,
        "eta_seconds": 810,
        "device_hours": 0.2,
        "cost_usd": 0.5,
    }


def test_goes_on_on_other_devices(now: list[float]) -> None:
    before = Clock(steps=100, num_devices=8, usd_per_hour=None)
    now[0] += 90
    before.tick()
    after = Clock(steps=100, num_devices=1, usd_per_hour=10)
    after.load_state_dict(before.state_dict(), step=10)
    assert after.eta_seconds(10) is None
    now[0] += 36
    after.tick()
    assert after.figures(12) == {
        "elapsed_seconds": 126,
        "eta_seconds": 18 * 88,  # at the pace of these two steps, not of the first ten
        "device_hours": 0.21,
        "cost_usd": 2.1,
    }


def test_work_that_was_lost_was_paid(now: list[float]) -> None:
    clock = Clock(steps=100, num_devices=2, usd_per_hour=1)
    clock.load_state_dict({"elapsed_seconds": 3600, "device_seconds": 3600}, step=1)
    clock.was_paid(0.5)
    assert clock.figures(1)["device_hours"] == 1
    clock.was_paid(3)
    assert clock.figures(1)["device_hours"] == 3
    assert clock.elapsed_seconds == 3600


def test_cost_in_the_log_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, max_seconds=0, log_every=1, usd_per_gpu_hour=3)
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as stream:  # a step that a crash undid, after two hours
        stream.write(json.dumps({"step": 2, "kind": "train", "device_hours": 2}) + "\n")
    train(tmp_path, log_every=1, usd_per_gpu_hour=3)
    lines = [line for line in read_metrics(file) if line["kind"] == "train"]
    assert lines[0]["cost_usd"] < 1
    assert all(6 <= line["cost_usd"] < 7 for line in lines[1:])
    assert lines[-1]["eta_seconds"] == 0
    assert lines[-1]["elapsed_seconds"] < 100
