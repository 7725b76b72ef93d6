"""Who works on which shard: claims as small files that every worker sees, renewed as long as their worker lives.

``.leases/000012.3`` is the third claim of shard 12: the first two workers died. The highest one counts. A worker may
make the next one when it has watched the highest for a whole lease, by its own clock, and seen no change; so the
clocks of machines need not agree. The time within is for people.

Claims save work, and nothing rests on them: a shard has the same content whoever makes it, and is written whole or
not at all. Two workers on one shard, after a long pause of the first or in a store that cannot create exclusively,
write the same bytes twice.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from vlv.errors import VLVError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vlv.jobs.shared.folders import SharedFolder

logger = logging.getLogger(__name__)

FOLDER = ".leases"
BEATS = 4
"""Signs of life that a worker gives within the time of a lease."""


class Lease:
    """The claim of one worker to one shard; within the block a thread renews it, at the end it is removed.

    Attributes:
        is_lost: Whether another worker has taken the shard over.
    """

    def __init__(self, folder: SharedFolder, shard: int, turn: int, seconds: float) -> None:
        self._folder, self._shard, self._turn, self._seconds = folder, shard, turn, seconds
        self._token, self._beat = secrets.token_hex(8), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, daemon=True)
        self.is_lost = False

    def take(self) -> bool:
        """Make the claim; whether it is ours."""
        content, name = self._content(), _name(self._shard, self._turn)
        return self._folder.create(name, content) and self._folder.read(name) == content

    def renew(self) -> bool:
        """Give a sign of life, unless another worker has taken over; whether the shard is still ours."""
        name = _name(self._shard, self._turn)
        found = self._folder.read(name)
        ours = found is not None and self._token.encode() in found
        if not ours or self._folder.exists(_name(self._shard, self._turn + 1)):
            self.is_lost = True
        else:
            self._beat += 1
            self._folder.write(name, self._content())
        return not self.is_lost

    def _content(self) -> bytes:
        about = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": self._beat,
            "token": self._token,
        }
        return json.dumps(about).encode()

    def _renew_on(self) -> None:
        while not self.is_lost and not self._ended.wait(self._seconds / BEATS):
            try:
                self.renew()
            except VLVError as error:
                logger.warning("note: shard %d: no sign of life (%s)", self._shard, error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._ended.set()
        self._thread.join()
        for turn in range(0 if self.is_lost else self._turn, 0, -1):
            self._folder.remove(_name(self._shard, turn))


class Leases:
    """The claims in a shared folder, watched by one worker.

    Args:
        folder: Of the output.
        seconds: How long a claim may stand unchanged.
        clock: Seconds of this process.
    """

    def __init__(
        self, folder: SharedFolder, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._seconds, self._clock = folder, seconds, clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def standing(self) -> dict[int, int]:
        """The highest claim of each shard that has one."""
        found: dict[int, int] = {}
        for name in self._folder.names(FOLDER):
            shard, _, turn = name.partition(".")
            if shard.isdecimal() and turn.isdecimal():
                found[int(shard)] = max(int(turn), found.get(int(shard), 0))
        return found

    def claim(self, shard: int, standing: Mapping[int, int]) -> Lease | None:
        """Claim a shard that is free, or that a dead worker has left; None where another one has it.

        Args:
            shard: Its number.
            standing: What `standing` has found.
        """
        turn = standing.get(shard, 0)
        if turn and not self._is_dead(_name(shard, turn)):
            return None
        lease = Lease(self._folder, shard, turn + 1, self._seconds)
        return lease if lease.take() else None

    def _is_dead(self, name: str) -> bool:
        found = self._folder.read(name)
        if found is None:  # given up in this moment
            return False
        seen, since = self._seen.get(name, (None, 0.0))
        if seen != found:
            self._seen[name] = found, self._clock()
            return False
        return self._clock() - since >= self._seconds

    def clear(self) -> None:
        """Remove all claims, once everything is done."""
        for name in self._folder.names(FOLDER):
            self._folder.remove(f"{FOLDER}/{name}")


def _name(shard: int, turn: int) -> str:
    return f"{FOLDER}/{shard:06d}.{turn}"
