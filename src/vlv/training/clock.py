"""How long a run has taken, how long it still takes, and what it costs: across interruptions and crashes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Clock:
    """Wall time of a run, training and looking together, and the hours of its devices.

    Work that a crash undid is no part of `elapsed_seconds`, but its devices were paid for: `device_seconds` keeps it.

    Args:
        steps: Optimiser steps of the whole run.
        num_devices: Processes that train together, one device each.
        usd_per_hour: Price of one device; None where it is not known.
    """

    def __init__(self, steps: int, num_devices: int, usd_per_hour: float | None) -> None:
        self.steps, self.num_devices, self.usd_per_hour = steps, num_devices, usd_per_hour
        self.elapsed_seconds = self.device_seconds = 0.0
        self._first_step = 0
        self._first_seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Book the time since the last call, and return it in seconds."""
        now = time.monotonic()
        seconds = now - self._last
        self._last = now
        self.elapsed_seconds += seconds
        self.device_seconds += seconds * self.num_devices
        return seconds

    def eta_seconds(self, step: int) -> float | None:
        """Seconds to the end at the pace since the run was last started; None before its first step is done."""
        done = step - self._first_step
        if done < 1:
            return None
        return (self.elapsed_seconds - self._first_seconds) / done * (self.steps - step)

    def figures(self, step: int) -> dict[str, float]:
        """For the log: elapsed_seconds, device_hours, and where they are known eta_seconds and cost_usd."""
        hours = self.device_seconds / 3600
        figures = {"elapsed_seconds": round(self.elapsed_seconds, 2), "device_hours": hours}
        if (eta := self.eta_seconds(step)) is not None:
            figures["eta_seconds"] = round(eta, 1)
        if self.usd_per_hour is not None:
            figures["cost_usd"] = hours * self.usd_per_hour
        return {name: float(f"{value:.6g}") for name, value in figures.items()}

    def was_paid(self, device_hours: float) -> None:
        """The log of the run tells of so many hours, some of which may have been lost in a crash."""
        self.device_seconds = max(self.device_seconds, 3600 * device_hours)

    def state_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"elapsed_seconds": self.elapsed_seconds, "device_seconds": self.device_seconds}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from what `state_dict` returned at a step; the time since this clock was made counts."""
        begun = state["elapsed_seconds"]
        self.elapsed_seconds += begun
        self.device_seconds += state.get("device_seconds", begun)
        self._first_step, self._first_seconds = step, begun
