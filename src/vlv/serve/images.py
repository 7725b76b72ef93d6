"""Images out of requests, with the limits that every other input has."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.framing import Framing, frame
from vlv.data.images import load_image
from vlv.errors import ImageError
from vlv.serve.errors import ApiError

if TYPE_CHECKING:
    from PIL import Image

    from vlv.data.images import ImageLimits

_LONGEST_HEADER = 200


def open_image(
    source: str | bytes | Path, name: str, *, limits: ImageLimits, size: int, framing: Framing
) -> Image.Image:
    """An image as a square of the model's size.

    Args:
        source: ``data:image/png;base64,...``, whose type is not believed, as the bytes are looked at; or those bytes; or
            the file of them.
        name: The field of the request.
        limits: What is refused.
        size: Side of the square.
        framing: How it is made.

    Raises:
        ApiError: It is no such URL, or no image that is read.
    """
    data = _decode(source, name, limits.max_bytes) if isinstance(source, str) else source
    try:
        return frame(load_image(data, limits=limits, name="the image"), size, framing)
    except ImageError as error:
        raise ApiError(400, str(error), param=name, code="invalid_image") from error


def is_address(url: str) -> bool:
    """Whether an image would have to be fetched."""
    return url[:8].partition(":")[0].lower() in ("http", "https")


def _decode(url: str, name: str, max_bytes: int) -> bytes:
    header, comma, _ = url[:_LONGEST_HEADER].partition(",")
    kind = header.lower()
    if not kind.startswith("data:") or not comma or not kind.endswith(";base64"):
        raise ApiError(
            400,
            "an image is a data URL such as data:image/png;base64,iVBOR...",
            param=name,
            code="invalid_image_url",
        )
    start = len(header) + 1
    if (len(url) - start) // 4 * 3 > max_bytes + 3:
        raise ApiError(
            413,
            f"the image is larger than the limit of {max_bytes} bytes",
            param=name,
            code="image_too_large",
        )
    try:
        return base64.b64decode(url[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "the data URL is not valid base64", param=name, code="invalid_image_url"
        ) from error
