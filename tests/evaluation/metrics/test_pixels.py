from __future__ import annotations

import math

import pytest
import torch

from vlv.evaluation.metrics.pixels import psnr, squared_error


def test_known_errors() -> None:
    black = torch.zeros(2, 3, 4, 4)
    other = torch.stack((torch.full((3, 4, 4), 0.1), torch.ones(3, 4, 4)))
    torch.testing.assert_close(psnr(black, other), torch.tensor([20.0, 0.0], dtype=torch.float64))
    assert math.isinf(psnr(black, black)[0])


def test_only_the_mask_counts() -> None:
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    b[:, :, 0, 0] = 0.5
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 0, :2] = True
    assert float(squared_error(a, b, mask)) == pytest.approx(0.125)
    assert float(squared_error(a, b)) == pytest.approx(0.25 / 16)
    assert float(psnr(a, b, mask)) == pytest.approx(-10 * math.log10(0.125))


def test_unusable_arguments_are_refused() -> None:
    a = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="mask has the shape"):
        psnr(a, a, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no pixel"):
        psnr(a, a, torch.zeros(1, 4, 4, dtype=torch.bool))
