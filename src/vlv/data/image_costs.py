"""What decoding an image file will cost in time and memory, known before a pixel is decoded.

A file of a few kilobytes may repeat a scan a thousand times, lie in a million pieces, or need gigabytes for its pixels. With
these limits, and those on bytes and pixels, no decoder takes longer than some seconds, so that none has to be ended from outside.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_SCANS = 100
"""Of a JPEG file; ordinary progressive ones have about ten."""
MAX_SCANNED_PIXELS = 1_000_000_000
"""Pixels of a JPEG file times its scans: about three seconds."""
MAX_PIECES = 100_000
"""Reads of Pillow, which takes chunks, segments and stray bytes one by one."""
MAX_STRIPS = 65_536
"""Strips or tiles of a TIFF file; one of single rows in four planes has as many."""

_SCAN = b"\xff\xda"  # in coded data 0xFF is followed by 0x00 or a restart marker
_STRIPS = (273, 324)  # tags: StripOffsets, TileOffsets
_SMALL_MODES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_PIXEL_BYTES = 4  # of all other modes
_OWN_COPIES = {"WEBP": 2, "AVIF": 1}  # in the decoder: RGBA


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


def too_costly(image: Image.Image, data: bytes, max_memory: int) -> str | None:
    """Why an image that was opened had better not be decoded, in words; None where it may be.

    Args:
        image: Of it only the header was read.
        data: The file.
        max_memory: Bytes that its pixels may take while they are decoded.
    """
    needed = predicted_memory(image)
    if needed > max_memory:
        return f"its pixels need {needed} bytes, above the limit of {max_memory}"
    if image.format in ("JPEG", "MPO") and not _has_one_scan(image, data):
        scans = data.count(_SCAN)
        most = min(MAX_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
        if scans > most:
            return f"it has {scans} scans, above the limit of {most} for its size"
    return None


def _has_one_scan(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG file is sequential and its first scan holds all colours, so that others would be ignored."""
    layers, fp = getattr(image, "layers", 0), getattr(image, "fp", None)
    if image.format != "JPEG" or fp is None or "progressive" in image.info:
        return False
    header = _SCAN + (6 + 2 * layers).to_bytes(2, "big") + bytes([layers])
    return data.startswith(header, max(0, fp.tell() - 8 - 2 * layers))  # Pillow stops behind it


def predicted_memory(image: Image.Image) -> int:
    """Bytes of the decoded pixels, of their copy as RGB, and of what the decoder keeps."""
    width = _SMALL_MODES.get(image.mode, _PIXEL_BYTES)
    copies = (image.mode != "RGB") + _OWN_COPIES.get(str(image.format), 0)
    return image.width * image.height * (width + copies * _PIXEL_BYTES)


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
