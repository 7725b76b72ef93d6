"""Tensors as small pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_BLUE, _RED = np.array((0.13, 0.35, 0.75)), np.array((0.80, 0.18, 0.15))
_GAP_PX = 4


def heat_map(values: Tensor, scale: int = 4) -> Image.Image:
    """A matrix (rows, columns): blue below zero, white at zero, red above; clipped at three root mean squares."""
    matrix = values.float().numpy()
    strength = np.clip(matrix / max(3 * float(np.sqrt((matrix**2).mean())), 1e-9), -1, 1)[..., None]
    colour = 1 - np.abs(strength) * (1 - np.where(strength < 0, _BLUE, _RED))
    return _enlarge(colour, scale)


def token_map(features: Tensor, size_px: int = 256) -> Image.Image:
    """Image tokens (N, d), the first of which is no place, as colours: their three principal components.

    The others lie on a square; where they do not, they are drawn as one row.
    """
    tokens = features[1:].float()
    tokens = tokens - tokens.mean(0)
    _, _, directions = torch.linalg.svd(tokens, full_matrices=False)
    directions = (
        directions[:3] * directions[:3].sum(1, keepdim=True).sign()
    )  # the sign is arbitrary
    colours = _spread((tokens @ directions.T).numpy())
    side = math.isqrt(len(tokens))
    rows = side if side * side == len(tokens) else 1
    columns = len(tokens) // rows
    return _enlarge(colours.reshape(rows, columns, 3), max(1, size_px // columns))


def latent_map(latents: Tensor, size_px: int = 128) -> Image.Image:
    """Latents (k, h, w) as colours: the first three channels, from -3 (dark) to 3 (light)."""
    colours = (latents[:3].float().permute(1, 2, 0).numpy() / 6 + 0.5).clip(0, 1)
    return _enlarge(colours, max(1, size_px // colours.shape[1]))


def enlarge(image: Image.Image, size_px: int = 256) -> Image.Image:
    """A small image at a whole multiple of its size, with square pixels."""
    scale = max(1, size_px // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images on white."""
    width = max(image.width for images in rows for image in images) + _GAP_PX
    height = max(image.height for images in rows for image in images) + _GAP_PX
    columns = max(len(images) for images in rows)
    page = Image.new("RGB", (columns * width - _GAP_PX, len(rows) * height - _GAP_PX), "white")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            page.paste(image, (x * width, y * height))
    return page


def _spread(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each column from 0 to 1."""
    low, high = values.min(0), values.max(0)
    return np.asarray((values - low) / np.maximum(high - low, 1e-9), np.float32)


def _enlarge(colours: NDArray[np.floating], scale: int) -> Image.Image:
    image = Image.fromarray(np.rint(colours * 255).astype(np.uint8))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
