"""Which images train, which validate and which test: by their content, so that look-alikes stay together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlv.curation.decide import cluster_hashes
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from vlv.curation.decide import Survivors

_FULL = 2**64


@dataclass(frozen=True)
class Split:
    """Sorts images into folders by the hash of their cluster.

    Attributes:
        shares: Folder to share of the images; they add up to 1.
        radius: Bits in which the perceptual hashes of near duplicates differ at most.
        seed: Another seed, another split.
    """

    shares: Mapping[str, float]
    radius: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            any(share < 0 for share in self.shares.values())
            or abs(sum(self.shares.values()) - 1) > 1e-6
        ):
            given = ", ".join(f"{name} {share:g}" for name, share in self.shares.items())
            raise ConfigError(f"the shares are {given}; they must be 0 or more and add up to 1")

    def __call__(self, survivors: Survivors) -> dict[str, NDArray[np.int64]]:
        """Folder to places: an image goes where the hash of its cluster falls."""
        hashes = cluster_hashes(survivors, self.radius)
        draws = np.array([self._draw(int(value)) for value in hashes])
        edges = np.cumsum(list(self.shares.values()))[:-1]
        side = np.searchsorted(edges, draws, side="right")
        return {name: np.flatnonzero(side == place) for place, name in enumerate(self.shares)}

    def _draw(self, value: int) -> float:
        """A number in [0, 1) from the hash of a cluster and the seed."""
        text = f"{self.seed}:{value}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / _FULL
