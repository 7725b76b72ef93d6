"""Near duplicates among many 64-bit hashes, found exactly and without comparing all with all.

Two hashes that differ in at most r of 64 bits agree entirely in at least m - r of m blocks of bits, wherever the
differing bits lie. For every choice of m - r blocks the hashes are sorted by the bits of these blocks, and
only those that agree there are compared. m is chosen so that few agree by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from vlv.curation.perceptual import HASH_BITS

_MAX_BLOCKS_MORE = 4  # the number of tables grows fast with the number of blocks


def near_pairs(hashes: NDArray[np.uint64], radius: int) -> NDArray[np.int64]:
    """All pairs of different hashes that differ in at most `radius` bits.

    Args:
        hashes: Without repetition, (n).
        radius: Bits.

    Returns:
        Places in `hashes`, the smaller first, sorted and each pair once, (pairs, 2).
    """
    found = [np.empty((0, 2), np.int64)]
    if radius > 0 and len(hashes) > 1:
        for mask in _masks(len(hashes), radius):
            found += list(_pairs_that_agree(hashes, mask, radius))
    return np.unique(np.concatenate(found), axis=0)


def _masks(count: int, radius: int) -> Iterator[np.uint64]:
    """The bits of every choice of blocks."""
    wanted = np.log2(max(count, 2))
    num_blocks = radius + 1
    while (
        num_blocks < radius + _MAX_BLOCKS_MORE
        and (num_blocks - radius) * HASH_BITS / num_blocks < wanted
    ):
        num_blocks += 1
    edges = [HASH_BITS * number // num_blocks for number in range(num_blocks + 1)]
    blocks = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    for chosen in combinations(blocks, num_blocks - radius):
        yield np.uint64(sum(chosen))


def _pairs_that_agree(
    hashes: NDArray[np.uint64], mask: np.uint64, radius: int
) -> Iterator[NDArray[np.int64]]:
    """Pairs within the radius among the hashes that are equal under a mask."""
    keys = hashes & mask
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.arange(len(keys) - 1)
    step = 1
    while True:
        first = first[first + step < len(keys)]
        first = first[keys[first] == keys[first + step]]
        if not len(first):
            return
        left, right = order[first], order[first + step]
        close = np.bitwise_count(hashes[left] ^ hashes[right]) <= radius
        pairs = np.stack([left[close], right[close]], axis=1)
        yield np.sort(pairs, axis=1)
        step += 1


def keep_first(pairs: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which element each one falls to when all are taken in turn, and one like an earlier kept one is dropped.

    Args:
        pairs: Of elements that are alike, (pairs, 2).
        rank: The turn of each element, all different, (n).

    Returns:
        For each element the one that replaces it, or itself when it is kept, (n).
    """
    replaced = np.arange(len(rank))
    neighbours = _neighbours(pairs)
    for element in sorted(neighbours, key=lambda place: int(rank[place])):
        kept = [
            other
            for other in neighbours[element]
            if rank[other] < rank[element] and replaced[other] == other
        ]
        if kept:
            replaced[element] = min(kept, key=lambda place: int(rank[place]))
    return replaced


def _neighbours(pairs: NDArray[np.int64]) -> dict[int, list[int]]:
    neighbours: dict[int, list[int]] = {}
    for left, right in pairs.tolist():
        neighbours.setdefault(left, []).append(right)
        neighbours.setdefault(right, []).append(left)
    return neighbours


def clusters(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The connected groups of alike elements: union-find.

    Returns:
        For each element the smallest place in its group, (count).
    """
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for left, right in pairs.tolist():
        a, b = sorted((root(left), root(right)))
        parent[b] = a
    return np.array([root(place) for place in range(count)], np.int64)
