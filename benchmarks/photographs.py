"""Pictures that cost as much to decode as photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photograph(draws: np.random.Generator, side: int) -> tuple[Image.Image, bytes]:
    """A square of smooth colours, and its JPEG file.

    Args:
        draws: Of the colours.
        side: In pixels.
    """
    rough = draws.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return image, buffer.getvalue()
