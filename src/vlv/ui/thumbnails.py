"""Small pictures of images for the browser, within the limits that every image has."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from vlv.data.images import load_image

if TYPE_CHECKING:
    from pathlib import Path

SIDES = (192, 768)
"""Longest sides that are made: in the list, and of the image that is looked at."""
_KEPT = 400  # of a few kB each, and some hundred kB of the large ones


def thumbnail(path: Path, side: int) -> bytes:
    """A JPEG of an image that is no larger than asked for; small images keep their pixels.

    Raises:
        ImageError: The image cannot be read, or is refused.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        stamp = 0
    return _made(path, stamp, min(SIDES, key=lambda known: abs(known - side)))


@lru_cache(maxsize=_KEPT)
def _made(path: Path, stamp: int, side: int) -> bytes:
    image = load_image(path)
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
