"""What a server is told when it starts: what it accepts, how it batches, and who may ask."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Self

from vlv.data.images import DEFAULT_LIMITS, ImageLimits
from vlv.errors import ConfigError
from vlv.models.arguments import MAX_SEED, finite, whole_number

KEYS_VARIABLE = "VLV_API_KEYS"
SHORTEST_KEY = 16


@dataclass(frozen=True)
class Limits:
    """What is refused, and how long a client may take.

    Raises:
        ConfigError: A number is out of its range.
    """

    body_bytes: int = 40_000_000
    """Of one request."""
    held_bytes: int = 512_000_000
    """Of all requests that are in work."""
    images: int = 8
    """In one request."""
    texts: int = 16
    """Captions to verify, or choices to write, in one request."""
    characters: int = 20_000
    """Of one text."""
    tokens: int = 1024
    """Of one caption."""
    steps: int = 100
    """Of the sampler."""
    connections: int = 512
    header_seconds: float = 10.0
    """To send the headers of a request."""
    patience_seconds: float = 10.0
    """To send a body or take in a part of an answer; a body has longer, by its size."""
    bytes_per_second: int = 100_000
    """Slower bodies are cut off."""
    image: ImageLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        for name in (x.name for x in fields(self) if x.type == "int"):
            whole_number(name, getattr(self, name), 1)
        for name in ("header_seconds", "patience_seconds"):
            _positive(name, getattr(self, name))


@dataclass(frozen=True)
class ServeSettings:
    """How a server works.

    Raises:
        ConfigError: A number is out of its range.
    """

    model: str
    """Name under which the model is served."""
    batch_size: int = 32
    """Items computed together."""
    queue_size: int = 64
    """Items that may wait."""
    linger: float = 0.005
    """Seconds that an item waits for others to join its batch."""
    timeout: float = 60.0
    """Seconds from a whole request to its answer."""
    seed: int = 0
    """Of requests that name none."""
    fetch_from: tuple[str, ...] = ()
    """Hosts that images are fetched from, see `Fetcher`; without any, nothing is fetched."""
    rate: float | None = None
    """Requests a minute that each key may make; None limits nobody."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, 1)
        whole_number("queue_size", self.queue_size, 1)
        whole_number("seed", self.seed, 0, MAX_SEED)
        _positive("timeout", self.timeout)
        if not 0 <= finite("linger", self.linger) <= self.timeout:
            raise ConfigError(
                f"linger is {self.linger}; choose 0 or more, and no more than the timeout"
            )
        if self.rate is not None:
            _positive("rate", self.rate)


def _positive(name: str, value: object) -> None:
    if finite(name, value) <= 0:
        raise ConfigError(f"{name} is {value}; choose more than 0")


class Keys:
    """The keys that open the server; without any, everybody may ask.

    Args:
        keys: As their owners send them.

    Raises:
        ConfigError: A key is too short, or could not be sent.
    """

    def __init__(self, *keys: str) -> None:
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"key {number} of {KEYS_VARIABLE} is not {SHORTEST_KEY} or more printable ASCII characters without "
                    "spaces; make one with: openssl rand -hex 32"
                )
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the keys, separated by commas."""
        given = environment.get(KEYS_VARIABLE, "")
        return cls(*(key.strip() for key in given.split(",") if key.strip()))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: bytes) -> bytes | None:
        """What stands for the key in a header ``Bearer KEY``, if it is one of these; the time it takes tells nothing of them."""
        scheme, _, key = authorization.partition(b" ")
        digest, found = _digest(key.strip()), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return digest if found and scheme.lower() == b"bearer" else None


class Rates:
    """How many requests each key may still make: a bucket that fills steadily, up to a minute's worth.

    Args:
        per_minute: None limits nobody.
        clock: In seconds.
    """

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left: dict[bytes, tuple[float, float]] = {}

    def wait(self, key: bytes) -> int:
        """Take one request off what stands for a key; 0, or the seconds after which it may be made."""
        if self._per_minute is None:
            return 0
        now, most = self._clock(), max(1.0, self._per_minute)
        left, since = self._left.get(key, (most, now))
        left = min(most, left + (now - since) * self._per_minute / 60)
        may = left >= 1
        self._left[key] = left - may, now
        return 0 if may else math.ceil((1 - left) * 60 / self._per_minute)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(host: str, keys: Keys, *, no_auth: bool) -> None:
    """Refuse to open a server to the network without a key.

    Raises:
        ConfigError: Anybody could ask, or nobody said that it may be so.
    """
    if no_auth and keys:
        raise ConfigError(
            f"--no-auth has no effect while {KEYS_VARIABLE} holds keys; unset one of both"
        )
    if not (keys or no_auth or is_loopback(host)):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and there is no key; set {KEYS_VARIABLE}, or say --no-auth"
        )
