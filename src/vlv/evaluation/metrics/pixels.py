"""Distances between images, pixel by pixel."""

from __future__ import annotations

from torch import Tensor


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image: -10 log10 of the mean squared error, for pixels in [0, 1].

    Args:
        a: (B, C, H, W), float in [0, 1].
        b: Likewise.
        mask: bool (B, H, W), the pixels that count; None is all of them.

    Returns:
        Decibels, float64 (B,); infinite where the pixels are equal.

    Raises:
        ValueError: The shapes differ, or a mask is empty.

    >>> import torch
    >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).round(decimals=4)
    tensor([20.], dtype=torch.float64)
    """
    return -10 * squared_error(a, b, mask).log10()


def squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each image, float64 (B,); arguments as in `psnr`."""
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"images of one shape (B, C, H, W) are compared, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    error = (a.double() - b.double()).square().mean(1)  # (B, H, W)
    if mask is None:
        return error.mean((1, 2))
    if mask.shape != error.shape:
        raise ValueError(f"the mask has the shape {tuple(mask.shape)}, not {tuple(error.shape)}")
    count = mask.sum((1, 2))
    if bool((count == 0).any()):
        raise ValueError("a mask leaves no pixel to compare")
    return (error * mask).sum((1, 2)) / count
