"""Rate limits: an even pace instead of bursts, and pauses that the server asks for."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random


class Pace:
    """A rate limit: hands out units evenly spaced.

    Args:
        per_minute: Units a minute; None does not limit.
        clock: Seconds, for tests.
    """

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._free_at = clock()

    def reserve(self, amount: float = 1.0) -> float:
        """Take units; returns the seconds to wait before they may be used."""
        now = self._clock()
        start = max(self._free_at, now)
        self._free_at = start + amount * self._seconds_each
        return start - now

    def correct(self, amount: float) -> None:
        """Add units that were taken too few, or give back (negative) those taken too many."""
        self._free_at += amount * self._seconds_each

    async def take(self, amount: float = 1.0) -> None:
        """Wait until that many units are free, and take them."""
        if self._seconds_each and (seconds := self.reserve(amount)) > 0:
            await asyncio.sleep(seconds)


class Pause:
    """A pause for everybody, as a rate-limiting server asks for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock()

    def extend(self, seconds: float) -> None:
        """Nothing starts for this many seconds from now."""
        self._until = max(self._until, self._clock() + seconds)

    async def over(self) -> None:
        """Wait until the pause is over."""
        while (seconds := self._until - self._clock()) > 0:
            await asyncio.sleep(seconds)


def backoff(attempt: int, base: float, longest: float, random: Random) -> float:
    """Seconds to wait before repetition number ``attempt`` (from 0): exponential with full jitter.

    >>> from random import Random
    >>> all(0 <= backoff(3, 0.5, 60, Random(seed)) <= 4 for seed in range(100))
    True
    """
    return random.uniform(0, min(longest, base * 2 ** min(attempt, 60)))


def retry_after(header: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number, or a date.

    >>> retry_after("2"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (2.0, None, 0.0)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds < float("inf") else None
