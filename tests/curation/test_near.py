"""Near duplicates: the fast search finds what comparing all with all finds, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.curation.files import scene
from vlv.curation.near import clusters, keep_first, near_pairs
from vlv.curation.perceptual import contrast, grey_thumbnail, perceptual_hash


def all_pairs(hashes: np.ndarray, radius: int) -> set[tuple[int, int]]:
    count = len(hashes)
    return {
        (a, b)
        for a in range(count)
        for b in range(a + 1, count)
        if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= radius
    }


def some_hashes(count: int, seed: int) -> np.ndarray:
    """Random hashes, and for many of them others a few bits away; some share half of their bits with all."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, count, dtype=np.uint64)
    base[: count // 3] &= np.uint64(0xFFFF)
    flips = np.zeros(count, np.uint64)
    for _ in range(6):
        flips ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    return np.unique(np.concatenate([base, base[::2] ^ flips[::2]]))


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0, 1, 4, 7, 16])
def test_pairs_are_those_of_comparing_all(radius: int) -> None:
    hashes = some_hashes(150, radius)
    pairs = near_pairs(hashes, radius)
    assert {tuple(pair) for pair in pairs.tolist()} == all_pairs(hashes, radius)
    assert radius < 4 or len(pairs) > 50


def test_more_blocks_for_more_hashes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = some_hashes(150, 5)
    few = near_pairs(hashes, 5)
    monkeypatch.setattr("vlv.curation.near.np.log2", lambda count: 25.0)  # as of 40 million
    np.testing.assert_array_equal(near_pairs(hashes, 5), few)


def test_a_dropped_one_is_like_one_that_stays() -> None:
    """In the chain 0 - 1 - 2 the middle one is like both: 0 and 2 stay, for they are unlike."""
    pairs = np.array([[0, 1], [1, 2]])
    assert keep_first(pairs, np.array([0, 1, 2])).tolist() == [0, 0, 2]
    assert keep_first(pairs, np.array([1, 0, 2])).tolist() == [1, 1, 1]
    assert keep_first(pairs, np.array([2, 1, 0])).tolist() == [0, 2, 2]


def test_clusters_are_chains() -> None:
    assert clusters(np.array([[3, 4], [1, 2], [2, 3]]), 6).tolist() == [0, 1, 1, 1, 1, 5]


def test_hash_keeps_to_what_is_seen() -> None:
    image = scene(1, (300, 200))
    known = perceptual_hash(grey_thumbnail(image))
    assert known.bit_count() == 32
    for changed in (
        image.resize((150, 100)),
        ImageEnhance.Brightness(image).enhance(0.8),
        scene(1, (360, 240)),
    ):
        assert (known ^ perceptual_hash(grey_thumbnail(changed))).bit_count() <= 2
    others = [perceptual_hash(grey_thumbnail(scene(seed))) for seed in range(2, 40)]
    assert min((known ^ other).bit_count() for other in others) >= 10


def test_flat_images_have_one_hash_and_no_contrast() -> None:
    flats = [Image.new("RGB", (50, 40), colour) for colour in ("red", "white", (3, 4, 5))]
    assert len({perceptual_hash(grey_thumbnail(flat)) for flat in flats}) == 1
    assert [contrast(flat) for flat in flats] == [0, 0, 0]
    half = Image.new("RGB", (50, 40))
    half.paste("white", (0, 0, 25, 40))
    assert contrast(half) == 127.5
