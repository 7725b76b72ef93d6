"""Images on disk: PNG files that carry their settings, and names for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from vlv.storage import Json, replacing

SETTINGS_KEY = "vlv"
"""Name of the PNG text chunk that holds the settings as JSON."""


def write_png(path: Path, image: Image.Image, settings: Mapping[str, object]) -> None:
    """Write a PNG with its settings in the metadata, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunk)


def read_settings(path: Path) -> Json | None:
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
