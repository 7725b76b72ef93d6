"""Images of any kind become pixels: RGB (B, 3, H, W), uint8 or float in [0, 1], as at every seam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlv.data.framing import DEFAULT_FRAMING, Framing, frame
from vlv.data.images import load_image, to_pil, to_rgb, to_tensor
from vlv.errors import ImageError

OneImage: TypeAlias = Image.Image | str | Path | bytes
ImageArray: TypeAlias = NDArray[np.uint8] | Tensor
"""One image or a batch of them."""
ImageLike: TypeAlias = OneImage | ImageArray
"""A PIL image, a path, the bytes of a file, an array (H, W, 3) uint8, or a tensor (3, H, W).

Tensors are float in [0, 1] or uint8.
"""


def as_float(pixels: Tensor) -> Tensor:
    """Bring pixels (B, 3, H, W) to float in [0, 1]; uint8 is divided by 255, floats pass.

    Raises:
        ValueError: The shape is another.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have the shape (B, 3, H, W), got {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"pixels are uint8 or float, got {pixels.dtype}")
    return pixels


def is_single(images: object) -> TypeGuard[ImageLike]:
    """Whether `images` is one image rather than several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim <= 3
    return isinstance(images, Image.Image | str | Path | bytes)


def as_list(images: object) -> list[ImageLike]:
    """One image, a sequence of images, or a batch (B, 3, H, W) / (B, H, W, 3), as a list of images.

    Raises:
        ImageError: There is no image.
    """
    if is_single(images):
        return [images]
    if not isinstance(images, Iterable):
        raise ImageError(
            f"an image is a PIL image, a path, bytes, an array or a tensor, got {type(images).__name__}"
        )
    items = list(images)
    if not items:
        raise ImageError("no image was given; pass one image or a list of images")
    return items


def as_batch(images: Sequence[object], size: int, framing: Framing = DEFAULT_FRAMING) -> Tensor:
    """Bring images to squares, see `frame`.

    Args:
        images: Images of any kind, see `ImageLike`.
        size: Side of the result in pixels.
        framing: What comes first, "cut" or "resize".

    Returns:
        (B, 3, size, size) on the CPU: uint8, or float in [0, 1] where an image is a float tensor of that size.

    Raises:
        ImageError: An item is no image, has an unusable shape, or cannot be read.
    """
    squares = [_square(image, size, framing) for image in images]
    if any(square.is_floating_point() for square in squares):
        return torch.cat([as_float(square[None]) for square in squares])
    return torch.stack(squares)


def _square(item: object, size: int, framing: Framing) -> Tensor:
    """One image as (3, size, size), uint8 or float."""
    if isinstance(item, Tensor) and item.shape == (3, size, size):
        return item.cpu() if item.dtype == torch.uint8 else _checked(item).float()
    return to_tensor(frame(_to_pil(item), size, framing))


def _to_pil(item: object) -> Image.Image:
    match item:
        case Image.Image():
            return to_rgb(item)
        case str() | Path() | bytes():
            return load_image(item)
        case np.ndarray():
            return _from_array(item)
        case Tensor():
            return _from_tensor(item)
    raise ImageError(
        f"an image is a PIL image, a path, bytes, an array or a tensor, got {type(item).__name__}"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(
            f"an image array is uint8 of shape (H, W, 3), got {array.dtype} of shape {array.shape}"
        )
    return to_rgb(Image.fromarray(array))


def _from_tensor(tensor: Tensor) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"an image tensor has the shape (3, H, W), got {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return to_rgb(to_pil(tensor))
    return to_rgb(to_pil(_checked(tensor)))


def _checked(tensor: Tensor) -> Tensor:
    """A float image tensor on the CPU whose values lie in [0, 1]."""
    if not tensor.is_floating_point():
        raise ImageError(f"an image tensor is uint8 or float, got {tensor.dtype}")
    if tensor.numel() == 0:
        raise ImageError(f"an image has pixels, got the shape {tuple(tensor.shape)}")
    tensor = tensor.detach().cpu()
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ImageError(f"a float image lies in [0, 1], got values from {low:g} to {high:g}")
    return tensor
