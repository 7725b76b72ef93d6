"""Positions of loaders: joined over all ranks, checked, and taken over."""

from __future__ import annotations

from collections.abc import Sequence

from vlv.data.quarantine import Quarantine
from vlv.errors import DataError
from vlv.storage import Json, check_settings

_OF_ONE_RANK = ("rows", "positions", "num_checked", "num_bad")


def merge_states(states: Sequence[Json]) -> Json:
    """The states of all ranks as one, which any rank of any split of the same global batch can load.

    Args:
        states: What `state_dict` of every rank's loader returned after the same batch.

    Raises:
        DataError: They were taken at different batches or of different data.
    """
    first = states[0]
    for state in states:
        check_identity(state, {k: v for k, v in first.items() if k not in _OF_ONE_RANK})
    return {
        **first,
        "rows": _joined(sorted(rows for state in states for rows in state["rows"])),
        "positions": {k: v for state in states for k, v in state["positions"].items()},
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


def check_identity(state: Json, wanted: Json) -> None:
    """Raise DataError unless a saved position means the same records here."""
    check_settings(
        "cannot resume: the saved data position",
        {name: state.get(name) for name in wanted},
        wanted,
        mend="name the same data and settings, or start a new run",
        error=DataError,
    )


def check_rows(state: Json, rows: range) -> None:
    """Raise DataError unless a saved position covers some rows of the global batch."""
    for row in rows:
        if not any(first <= row < last for first, last in state["rows"]):
            raise DataError(
                f"cannot resume: the saved data position is that of the rows {state['rows']} of a global batch, "
                f"and row {row} is needed; merge the states of all ranks"
            )


def load_counts(quarantine: Quarantine, state: Json, rows: range) -> None:
    """Take over the part of what was counted that falls to some rows of the global batch."""
    covered = sum(last - first for first, last in state["rows"])
    begin = min(first for first, _ in state["rows"])
    for name in ("num_checked", "num_bad"):
        count = int(state[name])
        share = count * (rows.stop - begin) // covered - count * (rows.start - begin) // covered
        setattr(quarantine, name, share)
