"""Bad records: counted, named in a file, and the end of the run when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from vlv.data.foreign import printable
from vlv.data.records import BadRecord, Record
from vlv.errors import DataError
from vlv.storage import Journal, read_journal

logger = logging.getLogger(__name__)


class Quarantine:
    """Counts what was read, remembers what could not be.

    Args:
        path: JSONL file to which bad records are appended, each once; None writes none.
        max_share: The share of bad records above which `count` stops the run.
        min_checked: Records to see before the share is judged.
        on_bad: Told of each bad record once.

    Attributes:
        bad: The bad records of this process by id.
        num_checked: Records seen, over all epochs and resumes.
        num_bad: Those of them that were bad.
    """

    def __init__(
        self,
        path: Path | None,
        max_share: float,
        min_checked: int,
        on_bad: Callable[[BadRecord], None] | None = None,
    ) -> None:
        self.path = path
        self.max_share = max_share
        self.min_checked = min_checked
        self.bad: dict[str, BadRecord] = {}
        self.num_checked = 0
        self.num_bad = 0
        self._on_bad = on_bad
        self._named = _ids_in(path)

    def count(self, record: Record, reason: str | None) -> None:
        """Count one record; `reason` says why it is bad, None that it is sound.

        Raises:
            DataError: Too large a share was bad.
            OutputError: The quarantine file cannot be written.
        """
        self.num_checked += 1
        if reason is not None:
            self.num_bad += 1
            self._remember(record, reason)
        over = self.num_bad > self.max_share * self.num_checked
        if over and self.num_checked >= self.min_checked:
            raise DataError(
                f"{self.num_bad} of {self.num_checked} records cannot be read, more than the "
                f"allowed share of {self.max_share:g}{self._latest()}"
            )

    def _latest(self) -> str:
        reasons = [bad.reason for bad in self.bad.values()]
        return f"; the latest: {reasons[-1]}" if reasons else ""

    def _remember(self, record: Record, reason: str) -> None:
        if record.id in self.bad:
            return
        bad = BadRecord(record.id, printable(str(record.source)), reason)
        self.bad[record.id] = bad
        logger.warning("skipped: %s", reason)
        if self.path is not None and record.id not in self._named:
            row = {"id": bad.id, "source": bad.source, "reason": bad.reason}
            with Journal(self.path) as journal:
                journal.append([row])
        if self._on_bad is not None:
            self._on_bad(bad)


def _ids_in(path: Path | None) -> frozenset[str]:
    """The ids that an earlier run wrote down."""
    return frozenset() if path is None else frozenset(str(row["id"]) for row in read_journal(path))
