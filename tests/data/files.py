"""Image files for the tests, some of which no ordinary program would write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

# Stored pixels of an image that is upright after the transposition of its EXIF tag.
STORE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green, blue and grey quarters: no two orientations look the same."""
    image = Image.new("RGB", (width, height), (200, 0, 0))
    half = (width // 2, height // 2)
    image.paste((0, 200, 0), (half[0], 0, width, half[1]))
    image.paste((0, 0, 200), (0, half[1], half[0], height))
    image.paste((90, 90, 90), (half[0], half[1], width, height))
    return image


def rotated(upright: Image.Image, tag: int, format: str, **options: Any) -> bytes:
    stored = upright.transpose(STORE[tag]) if tag in STORE else upright
    exif = Image.Exif()
    if tag:
        exif[0x0112] = tag
    return encode(stored, format, exif=exif.tobytes(), **options)


def noise_png(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "PNG")


def raw_png(
    width: int,
    height: int,
    depth: int,
    color: int,
    rows: bytes,
    chunks: dict[bytes, bytes] | None = None,
) -> bytes:
    """A PNG by hand: `rows` are the unfiltered lines, each with its filter byte 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in (chunks or {}).items())
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + pixels + chunk(b"IEND", b"")


def png_16_bit(values: np.ndarray, transparent: bytes | None = None) -> bytes:
    """Grey (H,W) or RGB (H,W,3) of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    color = 0 if values.ndim == 2 else 2
    chunks = {} if transparent is None else {b"tRNS": transparent}
    return raw_png(values.shape[1], values.shape[0], 16, color, rows, chunks)


def swapping_profile() -> bytes:
    """An ICC profile whose red and blue primaries are those of blue and red in sRGB."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"swap\0" + bytes(78 + 9)
    red, green, blue = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    tags = {
        b"desc": text[: len(text) - len(text) % 4],
        b"cprt": b"text\0\0\0\0free\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(*blue),
        b"gXYZ": xyz(*green),
        b"bXYZ": xyz(*red),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + data
