"""How far a piece of work is, for whoever waits for it: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm


def say(message: str) -> None:
    """Write one line to stderr, above a progress bar where there is one."""
    tqdm.write(message, file=sys.stderr)


class Progress:
    """Progress on stderr.

    Args:
        total: Number of things to do; None where it is not known.
        done: How many are done already.
        what: What is being done, in front of the numbers.
        unit: What is counted.
    """

    EVERY = 30.0  # seconds

    def __init__(
        self, total: int | None = None, *, done: int = 0, what: str = "", unit: str = "image"
    ) -> None:
        self._unit, self._postfix = unit, ""
        self._start(what, total, done)

    def _start(self, what: str, total: int | None, done: int) -> None:
        self._what, self._total, self._first, self._done = what, total, done, done
        self._began: float | None = None  # when the first were done: models had to be loaded before
        self._told = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what or None,
            unit=self._unit,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, self._done
        if self._bar.disable and now - self._told >= self.EVERY and self._done != self._total:
            self._told = now
            say(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        of = "" if self._total is None else f"/{self._total}"
        text = f"{self._what or 'progress'}: {self._done}{of} {self._unit}s"
        if seconds > 0 and self._done > self._first:
            speed = (self._done - self._first) / seconds
            text += f", {speed:.2g}/s"
            if self._total is not None:
                left = max(0, self._total - self._done) / speed
                text += f", about {tqdm.format_interval(left)} left"
        return f"{text}, {self._postfix}" if self._postfix else text

    def stage(self, what: str, done: int, total: int) -> None:
        """So many of a stage are done; a new name begins a new stage."""
        if what != self._what:
            self._bar.close()
            self._start(what, total, done)
        else:
            self.advance(done - self._done)

    def skip(self) -> None:
        """Pass one whose result is there; it does not count for the speed."""
        self._first += 1
        self._done += 1
        if not self._bar.disable:
            self._bar.initial += 1
            self._bar.n += 1
            self._bar.last_print_n += 1

    def postfix(self, text: str) -> None:
        """Show something behind the numbers."""
        self._postfix = text
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()
