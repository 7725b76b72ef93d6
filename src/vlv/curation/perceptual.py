"""What an image looks like in 64 bits, and whether there is anything in it to see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_BITS = 64
_SIDE = 32  # pixels of the grey thumbnail
_LOW = 8  # frequencies kept in each direction


def _cosines() -> NDArray[np.float64]:
    """The lowest frequencies of the cosine transform without the constant one, (8,32)."""
    frequency = np.arange(1, _LOW + 1)[:, None]
    place = np.arange(_SIDE)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


_COSINES = _cosines()
_POWERS = np.uint64(1) << np.arange(HASH_BITS, dtype=np.uint64)


def grey_thumbnail(image: Image.Image) -> NDArray[np.float64]:
    """An RGB image as grey values 0 to 255, (32,32)."""
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return np.asarray(grey, np.float64)


def perceptual_hash(thumbnail: NDArray[np.float64]) -> int:
    """64 bits that barely change when an image is resized, recompressed or brightened.

    Each bit says whether one of the 64 lowest frequencies of the cosine transform lies above their
    median, so that half of the bits are set.

    Args:
        thumbnail: Grey values, (32,32).
    """
    waves = _COSINES @ thumbnail @ _COSINES.T  # (8,8)
    waves = np.round(waves, 6)  # of a flat image nothing is left but rounding errors
    bits = (waves > np.median(waves)).ravel()
    return int(_POWERS[bits].sum(dtype=np.uint64))


def contrast(image: Image.Image) -> float:
    """Standard deviation of the grey values, 0 (flat) to 127.5 (black and white)."""
    counts = np.asarray(image.convert("L").histogram(), np.float64)
    values = np.arange(256)
    mean = (counts * values).sum() / counts.sum()
    return float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum()))
