"""Lanes: the sequences of records that feed one row each of every global batch, and their saved positions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlv.data.quarantine import Quarantine
from vlv.data.reader import Pending, Reader, Row
from vlv.data.records import Record
from vlv.errors import DataError


class Order:
    """The order of the records in each epoch.

    Args:
        count: Number of records.
        num_lanes: G.
        seed: With the epoch, it decides the permutation; None keeps the order of the list.
    """

    def __init__(self, count: int, num_lanes: int, seed: int | None) -> None:
        self.count, self.num_lanes, self.seed = count, num_lanes, seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def place(self, lane: int, number: int) -> int:
        """Which record is the one with this number in a lane, over all epochs."""
        epoch, row = divmod(number, self.count // self.num_lanes)
        return int(self._of(epoch)[row * self.num_lanes + lane])

    def _of(self, epoch: int) -> NDArray[np.int64]:
        """The places of the records in an epoch, (count); lanes may be in three of them at a time."""
        if epoch not in self._epochs:
            places = np.arange(self.count)
            if self.seed is not None:
                places = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            while len(self._epochs) > 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = places
        return self._epochs[epoch]


class Lane:
    """One row of every batch, read ahead.

    Args:
        number: Place in the global batch.
        records: All records.
        order: Which comes when.
        reader: Decodes.
        ahead: Records to read ahead.

    Attributes:
        skipped: Records passed over so far because they were bad.
    """

    def __init__(
        self, number: int, records: Sequence[Record], order: Order, reader: Reader, ahead: int
    ) -> None:
        self.number = number
        self.ahead = ahead
        self.skipped = 0
        self._records, self._order, self._reader = records, order, reader
        self._begun = 0
        self._pending: deque[Pending] = deque()

    def look_ahead(self, depth: int) -> None:
        """Have so many records on their way."""
        while len(self._pending) < depth:
            index = self._order.place(self.number, self._begun)
            self._pending.append(self._reader.begin(index, self._records[index]))
            self._begun += 1

    def next(self) -> Row:
        """The next record, sound or not."""
        self.look_ahead(1)
        return self._pending.popleft().row()

    def go_to(self, num_batches: int, skipped: int) -> None:
        """Go on after so many sound and bad records."""
        self._pending.clear()
        self._begun, self.skipped = num_batches + skipped, skipped


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, which any rank of any split of the same global batch can load.

    Args:
        states: What `state_dict` of every rank's loader returned after the same batch.

    Raises:
        DataError: They were taken at different batches or of different data.
    """
    first = states[0]
    own = ("lanes", "skipped", "places", "num_checked", "num_bad")
    for state in states:
        check_identity(state, {name: value for name, value in first.items() if name not in own})
    by_lane = [name for name in ("skipped", "places") if name in first]
    return {
        **first,
        "lanes": _joined(sorted(lanes for state in states for lanes in state["lanes"])),
        **{name: {k: v for state in states for k, v in state[name].items()} for name in by_lane},
        "num_checked": sum(int(state["num_checked"]) for state in states),
        "num_bad": sum(int(state["num_bad"]) for state in states),
    }


def _joined(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranges that touch as one."""
    joined: list[list[int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined


def check_identity(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise DataError unless a saved position has these values."""
    for name, value in wanted.items():
        if state.get(name) != value:
            raise DataError(
                f"cannot resume: the saved data position has {name} {state.get(name)}, this "
                f"run has {value}; name the same data and settings, or start a new run"
            )


def load_counts(quarantine: Quarantine, state: Mapping[str, Any], start: int, stop: int) -> None:
    """Take over the part of what was counted that falls to the lanes from start to stop."""
    covered = sum(last - first for first, last in state["lanes"])
    begin = min(first for first, _ in state["lanes"])
    for name in ("num_checked", "num_bad"):
        count = int(state[name])
        share = count * (stop - begin) // covered - count * (start - begin) // covered
        setattr(quarantine, name, share)


def check_lanes(state: Mapping[str, Any], start: int, stop: int) -> None:
    """Raise DataError unless a saved position tells where the lanes from start to stop stand."""
    for lane in range(start, stop):
        if not any(first <= lane < last for first, last in state["lanes"]):
            raise DataError(
                f"cannot resume: the saved data position is that of the rows {state['lanes']} of a global batch, "
                f"and row {lane} is needed; merge the states of all ranks"
            )
