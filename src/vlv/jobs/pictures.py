"""Images on disk: PNG files that carry their settings, names for them, and side-by-side sheets."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from vlv.storage import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SETTINGS_KEY = "vlv"
"""Name of the PNG text chunk that holds the settings as JSON."""


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings in the metadata, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunk)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Settings that `write_png` put into a file; None when it holds none."""
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS_KEY)
        settings = json.loads(text) if text else None
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def slug(text: str, length: int = 40) -> str:
    """A file name made of the words of a text.

    >>> slug("A red cube, and a blue sphere!")
    'a-red-cube-and-a-blue-sphere'
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:length].rstrip("-") or "image"


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image]], *, columns: int = 4) -> Image.Image:
    """Lay pairs side by side, left the original and right the reconstruction, ``columns`` pairs in a row."""
    width = max(right.width for _, right in pairs)
    height = max(right.height for _, right in pairs)
    gap = max(2, width // 16)
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    cell = (2 * width + 3 * gap, height + 2 * gap)
    page = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    for index, (left, right) in enumerate(pairs):
        x, y = index % columns * cell[0] + gap, index // columns * cell[1] + gap
        page.paste(left.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        page.paste(right, (x + width + gap, y))
    return page
