"""What decoding an image file will cost in time and memory, known before a pixel is decoded.

A file of a few kilobytes may repeat a scan a thousand times, lie in a million pieces, or need gigabytes for its pixels. With
these limits, and those on bytes and pixels, no decoder takes longer than some seconds, so that none has to be ended from outside.
"""

from __future__ import annotations

import logging
import struct
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

MAX_SCANS = 100
"""Of a JPEG file; ordinary progressive ones have about ten."""
MAX_SCANNED_PIXELS = 1_000_000_000
"""Pixels of a JPEG file times its scans: about three seconds."""
MAX_PIECES = 100_000
"""Reads of Pillow, which takes chunks, segments and stray bytes one by one."""
MAX_STRIPS = 65_536
"""Strips or tiles of a TIFF file; one of single rows in four planes has as many."""

MAX_SHRINKING = 4
"""By how much the sides of a JPEG file may be divided while it is decoded, where its pixels would need too much memory."""

_SCAN = b"\xff\xda"  # in coded data 0xFF is followed by 0x00 or a restart marker
_STRIPS = (273, 324)  # tags: StripOffsets, TileOffsets
_SMALL_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_PIXEL_BYTES = 4  # of all other modes
# A pixel, in the decoder: two canvases and what is handed over; planes of 16 bits and what is handed over.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12}
_MOST_BYTES = 32  # a pixel, with all copies, but for the strips of a TIFF file
BAND_PIXELS = 2**20
"""Of larger images some rows at a time are made RGB, which keeps memory low."""
_BAND_BYTES = 24  # a pixel: arrays of floats, or RGBA, its alpha, and two of RGB
_ORIENTATION = 0x0112
_NOTES = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})  # that hold it
_NOTED_FIRST = ("JPEG", "WEBP", "GIF", "BMP")  # formats that have all notes before the pixels


class Pieces(BytesIO):
    """The bytes of a file, which end with an error for who reads them in too many pieces."""

    _left = MAX_PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes.

        Raises:
            OSError: This was one piece too many.
        """
        self._left -= 1
        if self._left < 0:
            raise OSError(f"it is in more than {MAX_PIECES} pieces")
        return super().read(size)


def limit_cost(image: Image.Image, data: bytes, max_memory: int) -> str | None:
    """Why an image that was opened had better not be decoded, in words; None where it may be.

    A JPEG file whose pixels would need too much memory will be decoded at a half or a quarter of its sides.

    Args:
        image: Of it only the header was read.
        data: The file.
        max_memory: Bytes that its pixels may take while they are decoded.
    """
    pixels = image.width * image.height
    is_small = pixels * _MOST_BYTES <= max_memory and pixels * len(data) <= MAX_SCANNED_PIXELS
    if is_small and image.format != "TIFF":  # a scan takes ten bytes of the file
        return None
    is_jpeg = image.format in ("JPEG", "MPO")
    in_one_scan = is_jpeg and _has_one_scan(image, data)
    if is_jpeg and not in_one_scan:
        scans = data.count(_SCAN)
        most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
        if scans > most:
            return f"it has {scans} scans, above the limit of {most} for its size"
    kept = _coefficient_bytes(image) if is_jpeg and not in_one_scan else 0
    needed = kept + predicted_memory(image, is_turned(image))
    if needed > max_memory and not (is_jpeg and _shrink(image, needed - kept, max_memory - kept)):
        return f"its pixels need {needed} bytes, above the limit of {max_memory}"
    return None


def _shrink(image: Image.Image, needed: int, max_memory: int) -> bool:
    """Have a JPEG file decoded smaller, so that it needs less memory; whether that is enough."""
    shrinking = 2
    while needed > max_memory * shrinking**2 and shrinking < MAX_SHRINKING:
        shrinking *= 2
    image.draft(None, (image.width // shrinking, image.height // shrinking))
    return needed <= max_memory * shrinking**2


def _coefficient_bytes(image: Image.Image) -> int:
    """What a JPEG decoder keeps that has to see several scans, however small it makes the image."""
    factors = [(across, down) for _, across, down, _ in getattr(image, "layer", [])]
    whole = max((a for a, _ in factors), default=1) * max((d for _, d in factors), default=1)
    share = sum(across * down for across, down in factors) / max(1, whole)
    return int(2 * share * image.width * image.height)


def _has_one_scan(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG file is sequential and its first scan holds all colours, so that others would be ignored."""
    layers, fp = getattr(image, "layers", 0), getattr(image, "fp", None)
    if image.format != "JPEG" or fp is None or "progressive" in image.info:
        return False
    header = _SCAN + (6 + 2 * layers).to_bytes(2, "big") + bytes([layers])
    return data.startswith(header, max(0, fp.tell() - 8 - 2 * layers))  # Pillow stops behind it


def predicted_memory(image: Image.Image, is_turned: bool = False) -> int:
    """Bytes of the decoded pixels, of their copies as RGB and upright, and of what the decoder keeps at most."""
    pixels = image.width * image.height
    copies = (image.mode != "RGB") + is_turned
    width = _SMALL_MODES.get(image.mode, _PIXEL_BYTES) + copies * _PIXEL_BYTES
    width += _DECODER_BYTES.get(str(image.format), 0)
    by_bands = image.mode != "RGB" or "icc_profile" in image.info or "transparency" in image.info
    bands = min(pixels, BAND_PIXELS) * _BAND_BYTES if by_bands else 0
    return pixels * width + bands + _strip_bytes(image)


def _strip_bytes(image: Image.Image) -> int:
    """Of a compressed TIFF file: bytes of a strip or tile, which may be larger than the image."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.info.get("compression") == "raw":
        return 0

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        return max(0, int(max(value) if isinstance(value, tuple) else value))

    width = number(322, image.width)
    rows = number(323, min(number(278, image.height), image.height))
    return width * rows * number(277, 1) * number(258, 8) // 8


def is_turned(image: Image.Image) -> bool:
    """Whether an image is stored otherwise than upright; of a PNG file that is known before the pixels, or else not said."""
    if image.format == "PNG" and "exif" not in image.info:
        return False
    return orientation(image) > 1


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the EXIF block is absent or damaged. A PNG file may be decoded for it."""
    if _NOTES.isdisjoint(image.info) and image.format in _NOTED_FIRST:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001 -- Pillow raises a dozen types on damaged files
        logger.debug("EXIF block ignored: %s", error)
        return 1


def count_strips(data: bytes) -> int:
    """Strips and tiles of the first image of a TIFF file, by its directory; 0 where it is none, or damaged.

    Pillow makes a list of them when it opens the file.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 0
    try:
        (version,) = struct.unpack_from(f"{order}H", data, 2)
        big = version == 43
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        (entries,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
        entry = struct.Struct(f"{order}{'HHQ8x' if big else 'HHI4x'}")
        first = start + (8 if big else 2)
        end = min(len(data), first + entries * entry.size)
        tags = entry.iter_unpack(data[first : end - (end - first) % entry.size])
        return max((count for tag, _, count in tags if tag in _STRIPS), default=0)
    except struct.error:
        return 0
