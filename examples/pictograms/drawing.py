"""From an SVG or WebP file to a square picture on a plain background, and the words for its colours.

Shapes: S side in pixels, G side of the grid of colours.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from vlv.errors import DataError

SIDE = 64
GRID = 4
_DRAWN = 160
"""Side at which files are drawn; pictures are made smaller from there."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "cream": (250, 243, 224),
    "pale blue": (208, 228, 250),
    "pale green": (214, 240, 214),
    "pale pink": (250, 216, 228),
    "pale yellow": (252, 244, 180),
    "grey": (176, 176, 176),
    "purple": (128, 96, 176),
    "green": (88, 152, 96),
    "blue": (72, 112, 184),
    "dark blue": (28, 36, 72),
    "black": (12, 12, 12),
}
"""What stands behind a drawing, by what texts call it."""
_WHITE = 0.4
"""Share of white backgrounds."""

_HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 50,
    "lime": 82,
    "green": 125,
    "teal": 172,
    "sky": 200,
    "blue": 225,
    "violet": 270,
    "pink": 325,
}
_TONES = {"dark": (0.85, 0.42), "": (0.85, 0.88), "pale": (0.35, 0.97), "dull": (0.42, 0.62)}
"""Saturation and value of the words before a hue."""
_GREYS = {"black": 12, "charcoal": 72, "grey": 140, "silver": 200, "white": 252}


def _colours() -> dict[str, NDArray[np.float64]]:
    named = {name: np.array([level] * 3, float) for name, level in _GREYS.items()}
    for hue, degrees in _HUES.items():
        for tone, (saturation, value) in _TONES.items():
            offset = np.array([5.0, 3.0, 1.0])
            k = (offset + degrees / 60) % 6
            rgb = value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
            named[f"{tone}{hue}"] = 255 * rgb
    return named


COLOURS = _colours()
"""The colours of the grid, by their words."""
_NAMES = list(COLOURS)


def _perceived(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB of 0 to 255, (..., 3), on axes where distances are closer to what eyes see: CIE Lab."""
    linear = np.where(rgb <= 10.3, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4339, 0.3762, 0.1899], [0.2127, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]
    )
    xyz = linear @ matrix.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = (f[..., i] for i in range(3))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


_TABLE = _perceived(np.stack(list(COLOURS.values())))


def colour_grids(pixels: NDArray[np.uint8]) -> list[str]:
    """The colour words of the G x G cells of pictures, row by row from the top left.

    Args:
        pixels: (N, 3, S, S), S divisible by G.

    Returns:
        Of each picture its words, joined by spaces.
    """
    count, _, side, _ = pixels.shape
    cell = side // GRID
    cells = pixels.reshape(count, 3, GRID, cell, GRID, cell).mean((3, 5))  # (N, 3, G, G)
    points = _perceived(cells.transpose(0, 2, 3, 1).reshape(count, -1, 1, 3))
    nearest = ((points - _TABLE) ** 2).sum(-1).argmin(-1)  # (N, G G)
    return [" ".join(_NAMES[i] for i in row) for row in nearest]


def draw(data: bytes) -> Image.Image:
    """A file as a square RGBA image.

    Raises:
        DataError: It cannot be drawn.
    """
    try:
        if data[:4] == b"RIFF":
            image = Image.open(io.BytesIO(data)).convert("RGBA")
        else:
            import resvg_py

            png = resvg_py.svg_to_bytes(data.decode(), width=_DRAWN, skip_system_fonts=True)
            image = Image.open(io.BytesIO(png)).convert("RGBA")
    except ModuleNotFoundError as error:
        raise DataError("SVG files are drawn by resvg-py; pip install resvg-py==0.5.0") from error
    except (OSError, ValueError) as error:
        raise DataError(f"a picture cannot be drawn ({error})") from error
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((_DRAWN, _DRAWN), Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class Placement:
    """How a drawing lies on its background."""

    background: str
    scale: float
    """Of the drawing's square to the picture's."""
    turn: float = 0.0
    """Degrees."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Of the centre, in shares of the picture's side."""
    colour: float = 1.0
    """Saturation, brightness likewise, in shares of the drawing's."""
    brightness: float = 1.0


def place(rng: np.random.Generator, *, varied: bool) -> Placement:
    """Draw a placement: upright and central, or varied as the copies for training are."""
    names = list(BACKGROUNDS)
    background = "white" if rng.random() < _WHITE else names[1 + int(rng.integers(len(names) - 1))]
    if not varied:
        return Placement(background, 0.9)
    scale = float(rng.uniform(0.68, 1.0))
    room = 0.5 * (1.05 - scale)
    return Placement(
        background,
        scale,
        turn=float(rng.normal(0, 8)),
        shift=(float(rng.uniform(-room, room)), float(rng.uniform(-room, room))),
        colour=float(rng.uniform(0.7, 1.25)),
        brightness=float(rng.uniform(0.85, 1.12)),
    )


def compose(drawing: Image.Image, how: Placement) -> Image.Image:
    """A drawing (square, RGBA) as a picture of S x S pixels, RGB."""
    side = max(1, math.floor(how.scale * _DRAWN))
    scaled = drawing.resize((side, side), Image.Resampling.BILINEAR) if side != _DRAWN else drawing
    if how.turn:
        scaled = scaled.rotate(how.turn, Image.Resampling.BILINEAR)
    if (how.colour, how.brightness) != (1.0, 1.0):
        alpha = scaled.getchannel("A")
        plain = ImageEnhance.Color(scaled.convert("RGB")).enhance(how.colour)
        scaled = ImageEnhance.Brightness(plain).enhance(how.brightness)
        scaled.putalpha(alpha)
    picture = Image.new("RGBA", (_DRAWN, _DRAWN), (*BACKGROUNDS[how.background], 255))
    corner = [round((_DRAWN - side) / 2 + share * _DRAWN) for share in how.shift]
    layer = Image.new("RGBA", picture.size)
    layer.paste(scaled, (corner[0], corner[1]))
    picture.alpha_composite(layer)
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
