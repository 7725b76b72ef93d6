"""How a picture of any shape becomes a square: cut first or resize first."""

from __future__ import annotations

from typing import Literal, get_args

from PIL import Image

from vlv.data.images import center_crop_resize
from vlv.errors import ConfigError

Framing = Literal["cut", "resize"]
"""What comes first: "cut" (bicubic) is ours, "resize" (bilinear) the VLV authors'."""

DEFAULT_FRAMING: Framing = "cut"


def check_framing(framing: str) -> None:
    """Raise ConfigError unless a framing is known."""
    if framing not in get_args(Framing):
        raise ConfigError(
            f'the framing is "{framing}"; choose one of {", ".join(get_args(Framing))}'
        )


def frame(image: Image.Image, size: int, framing: Framing = DEFAULT_FRAMING) -> Image.Image:
    """Bring an image to `size` by `size` pixels.

    Args:
        image: Mode RGB, any shape.
        size: Side of the result.
        framing: "cut" takes the largest centred square and resizes it (`center_crop_resize`);
            "resize" brings the short side to `size` and cuts the middle out, as torchvision's
            ``Resize`` and ``CenterCrop`` do.

    Returns:
        The square; the image itself where it has that size already.
    """
    check_framing(framing)
    return center_crop_resize(image, size) if framing == "cut" else _resize_cut(image, size)


def _resize_cut(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short, long = sorted((width, height))
    other = int(size * long / short)
    width, height = (size, other) if width <= height else (other, size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
