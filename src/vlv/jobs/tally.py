"""Counts of one command: done, skipped, failed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields


@dataclass
class Tally:
    """Counts of one job, for its closing line and its exit code.

    Attributes:
        done: Inputs that were worked on and came out well.
        skipped: Inputs whose result was there already.
        failed: Inputs that could not be used.
        truncated: Results cut off at their longest allowed length, or texts cut before use.
        started: Clock at the start, in seconds.
        changed: Inputs that changed since, and keep their old result all the same.
        redone: Inputs that changed since, and got a new result.
    """

    done: int = 0
    skipped: int = 0
    failed: int = 0
    truncated: int = 0
    started: float = field(default_factory=time.monotonic)
    changed: int = 0
    redone: int = 0

    def __add__(self, other: Tally) -> Tally:
        """The counts of two steps together, timed from the start of the first.

        >>> (Tally(skipped=1) + Tally(skipped=2, failed=1)).line()
        'done 0, skipped 3, failed 1, truncated 0'
        """
        return Tally(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
            | {"started": self.started}
        )

    def restart(self) -> None:
        """Start the clock anew, once the model is loaded."""
        self.started = time.monotonic()

    @property
    def images_per_second(self) -> float:
        """Inputs worked on per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    @property
    def exit_code(self) -> int:
        """0 when all is done, 2 when some inputs failed."""
        return 2 if self.failed else 0

    def line(self) -> str:
        """The closing line.

        >>> Tally(done=0, skipped=3, failed=1).line()
        'done 0, skipped 3, failed 1, truncated 0'
        """
        counts = (
            f"done {self.done}, skipped {self.skipped}, "
            f"failed {self.failed}, truncated {self.truncated}"
        )
        if self.changed:
            counts += f", changed {self.changed} (kept as they were; --on-changed redo)"
        if self.redone:
            counts += f", changed {self.redone} (done again)"
        return f"{counts} ({self.images_per_second:.1f} images/s)" if self.done else counts
