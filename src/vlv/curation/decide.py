"""Who stays of those that look alike, and what trains, validates and tests: the work that sees all images at once.

It holds 44 bytes for every image that no rule has dropped before (hash, perceptual hash, size, place), about
1.8 GB for 40 million.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.curation import rules
from vlv.curation.near import clusters, keep_first, near_pairs
from vlv.curation.settings import FilterConfig
from vlv.curation.tables import read_groups
from vlv.errors import ConfigError

_COLUMNS = ["id", "reason", "sha256", "phash", "width", "height", "num_bytes"]
_FIELDS = np.dtype(
    [
        ("part", np.uint32),
        ("row", np.uint32),
        ("sha", np.uint64, (2,)),  # half of the 256 bits: a chance hit among 10^9 files is 10^-21
        ("phash", np.uint64),
        ("pixels", np.uint64),
        ("bytes", np.uint32),
    ]
)


@dataclass
class Survivors:
    """The images that no rule about one image has dropped, in the order of the inputs.

    Attributes:
        table: Part, row within its measurements, hashes and sizes, (n).
        duplicates: Place in `table` to why it is dropped and the place of the one that stays.
        similarity: Of a duplicate: differing bits, or the cosine.
    """

    table: NDArray[np.void]
    duplicates: dict[int, tuple[str, int]] = field(default_factory=dict)
    similarity: dict[int, float] = field(default_factory=dict)

    @property
    def kept(self) -> NDArray[np.int64]:
        """Places in `table` of those that stay, in order."""
        mask = np.ones(len(self.table), bool)
        mask[list(self.duplicates)] = False
        return np.flatnonzero(mask)


def read_survivors(tables: Sequence[Path]) -> Survivors:
    """Collect what the duplicates rules need from the tables of measurements."""
    parts = [np.empty(0, _FIELDS)]
    for part_number, path in enumerate(tables):
        rows = [row for rows in read_groups(path, _COLUMNS) for row in rows]
        kept = [(number, row) for number, row in enumerate(rows) if not row["reason"]]
        part = np.empty(len(kept), _FIELDS)
        for place, (number, row) in enumerate(kept):
            sha = row["sha256"]
            part[place] = (
                part_number,
                number,
                (int(sha[:16], 16), int(sha[16:32], 16)),
                row["phash"] or 0,
                row["width"] * row["height"],
                row["num_bytes"],
            )
        parts.append(part)
    return Survivors(np.concatenate(parts))


def drop_duplicates(
    survivors: Survivors, config: FilterConfig, vectors: NDArray[np.float32] | None = None
) -> None:
    """Note the duplicates: exact ones, then near ones, then those of the same meaning.

    Of equal files the first in the order of the inputs stays. Of near duplicates the one with
    most pixels stays, of equally large ones the first; every image that is dropped is like one that stays, within the
    radius: no chain of small steps leads from one to the other.

    Args:
        survivors: Where it is noted.
        config: The rules.
        vectors: Unit vectors (n,D) in the order of the survivors; a row of zeros is like nothing.
    """
    if config.exact_duplicates:
        _drop_exact(survivors)
    if config.near_duplicates is not None:
        _drop_near(survivors, config.near_duplicates)
    if config.embedding_duplicates is not None and vectors is not None:
        _drop_alike(survivors, vectors, config.embedding_duplicates.cosine)


def _drop_exact(survivors: Survivors) -> None:
    _, first, group = np.unique(
        survivors.table["sha"], axis=0, return_index=True, return_inverse=True
    )
    winner = first[group.ravel()]
    for place in np.flatnonzero(winner != np.arange(len(winner))).tolist():
        survivors.duplicates[place] = (rules.EXACT, int(winner[place]))


def _rank(table: NDArray[np.void], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The turn of each place: many pixels first, then the order of the inputs."""
    order = np.lexsort((places, -table["pixels"][places].astype(np.int64)))
    rank = np.empty(len(places), np.int64)
    rank[order] = np.arange(len(places))
    return rank


def _drop_near(survivors: Survivors, radius: int) -> None:
    places = survivors.kept
    phashes = survivors.table["phash"][places]
    rank = _rank(survivors.table, places)
    order = np.argsort(rank)  # of each hash the best image comes first
    hashes, first, group = np.unique(phashes[order], return_index=True, return_inverse=True)
    best = order[first]  # (hashes) place in `places`
    pairs = near_pairs(hashes, radius)
    replaced = keep_first(pairs, rank[best])
    for number, hash_number in zip(order.tolist(), group.ravel().tolist(), strict=True):
        winner = int(best[replaced[hash_number]])
        if winner != number:
            place = int(places[number])
            survivors.duplicates[place] = (rules.NEAR, int(places[winner]))
            bits = int(phashes[number]) ^ int(phashes[winner])
            survivors.similarity[place] = bits.bit_count()


def _drop_alike(survivors: Survivors, vectors: NDArray[np.float32], cosine: float) -> None:
    from vlv.curation.embeddings import similar_pairs

    places = survivors.kept
    pairs, cosines = similar_pairs(vectors[places], cosine)
    replaced = keep_first(pairs, _rank(survivors.table, places))
    known = {(int(a), int(b)): value for (a, b), value in zip(pairs, cosines, strict=True)}
    for number in np.flatnonzero(replaced != np.arange(len(places))).tolist():
        winner = int(replaced[number])
        place = int(places[number])
        survivors.duplicates[place] = (rules.ALIKE, int(places[winner]))
        low, high = sorted((number, winner))
        survivors.similarity[place] = float(known[low, high])


def cluster_hashes(survivors: Survivors, radius: int) -> NDArray[np.uint64]:
    """For each survivor 64 bits that all its near duplicates share: the least content hash of their cluster.

    Args:
        survivors: (n)
        radius: Bits in which the perceptual hashes of neighbours differ at most; clusters are chains of neighbours.
    """
    hashes, group = np.unique(survivors.table["phash"], return_inverse=True)
    cluster = clusters(near_pairs(hashes, radius), len(hashes))[group.ravel()]
    least = np.full(len(hashes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, cluster, survivors.table["sha"][:, 0])
    return least[cluster]


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
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
