"""The bytes of one image in any of the forms that tables of images use.

The VLV authors' set holds pixels, not files: uint8 (3,S,S) as bare bytes, or as `numpy.save` writes them.
"""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
from PIL import Image

from vlv.data.images import DEFAULT_LIMITS, ImageLimits, load_image
from vlv.errors import ImageError

_NUMPY = b"\x93NUMPY"
_SMALLEST_SIDE = 16  # of bare pixels: a few bytes of rubbish are no image
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")


def load_bytes(
    data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image"
) -> Image.Image:
    """An image from the bytes of a file, of an array that `numpy.save` wrote, or of bare pixels.

    Bare pixels are uint8 (3,S,S): they are told by their number, 3 S S, where nothing else begins like that.

    Args:
        data: The bytes.
        limits: What is refused.
        name: What to call the image in an error.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: The bytes are damaged, of another format or over a limit.
    """
    if data.startswith(_NUMPY):
        return _from_array(data, limits, name)
    side = math.isqrt(len(data) // 3)
    if side >= _SMALLEST_SIDE and 3 * side * side == len(data) and not _is_file(data):
        return _from_pixels(np.frombuffer(data, np.uint8).reshape(3, side, side), limits, name)
    return load_image(data, limits=limits, name=name)


def check_hash(data: bytes, sha256: str | None, name: object) -> None:
    """Raise ImageError unless bytes have the SHA-256 that an index states; None states nothing."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
        raise ImageError(f"{name}: the SHA-256 of the image is not the one that the index states")


def _is_file(data: bytes) -> bool:
    """Whether bytes begin like an image file of a format that `load_image` reads."""
    return (
        data.startswith(_SIGNATURES)
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[4:8] == b"ftyp"
        or (data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data))
    )


def _from_array(data: bytes, limits: ImageLimits, name: str) -> Image.Image:
    try:
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ImageError(f"{name}: the array cannot be read ({error})") from error
    if pixels.ndim == 3 and pixels.shape[0] != 3 and pixels.shape[2] == 3:
        pixels = pixels.transpose(2, 0, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ImageError(
            f"{name}: the array is {pixels.dtype} {pixels.shape}, but pixels are uint8 (3, H, W) or (H, W, 3)"
        )
    return _from_pixels(pixels, limits, name)


def _from_pixels(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], limits: ImageLimits, name: str
) -> Image.Image:
    height, width = pixels.shape[1:]
    if not width or not height:
        raise ImageError(f"{name}: the array holds no pixels")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageError(f"{name}: {width} x {height} exceeds the limits of an image")
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
