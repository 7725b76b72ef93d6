"""Inception v3 as the Frechet inception distance wants it, in plain torch.

The architecture is that of Szegedy et al. (2016) with the weights that TensorFlow shipped in December 2015, in the form in
which pytorch-fid published them. It departs from other Inceptions in its pooling: averages leave the padding out, and the
last block takes the maximum instead (an error in the original graph that every published FID contains). Modules bear the
names of the published weights. Shapes: B batch, H W pixels; blocks are written as channels x side of their output.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.errors import CheckpointError
from vlv.models.official_files import read_tensors

SIDE = 299
WIDTH = 2048
NUM_CLASSES = 1008
MAX_WEIGHTS_BYTES = 200_000_000
"""The published file has about half as many."""

_Kernel = int | tuple[int, int]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with epsilon 0.001, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, padding: _Kernel = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class BlockA(nn.Module):
    """1x1, 5x5, two 3x3, average."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 224 + pooled, H, W)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        wide = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat((self.branch1x1(x), wide, double, self.branch_pool(_average(x))), 1)


class BlockB(nn.Module):
    """Halves the sides: 3x3, two 3x3, maximum."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 480 + inputs, H', W')."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), 1)


class BlockC(nn.Module):
    """1x1, 7x7 as 1x7 and 7x1, twice that, average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        lying, standing = (0, 3), (3, 0)
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, (1, 7), padding=lying)
        self.branch7x7_3 = ConvNorm(width, 192, (7, 1), padding=standing)
        self.branch7x7dbl_1 = ConvNorm(768, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, (7, 1), padding=standing)
        self.branch7x7dbl_3 = ConvNorm(width, width, (1, 7), padding=lying)
        self.branch7x7dbl_4 = ConvNorm(width, width, (7, 1), padding=standing)
        self.branch7x7dbl_5 = ConvNorm(width, 192, (1, 7), padding=lying)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) to (B, 768, H, W)."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), single, double, self.branch_pool(_average(x))), 1)


class BlockD(nn.Module):
    """Halves the sides: 3x3, 7x7 and 3x3, maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) to (B, 1280, H', W')."""
        wide = self.branch7x7x3_2(self.branch7x7x3_1(x))
        wide = self.branch7x7x3_4(self.branch7x7x3_3(wide))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), wide, F.max_pool2d(x, 3, 2)), 1)


class BlockE(nn.Module):
    """1x1; 1x3 beside 3x1; the same after a 3x3; average, or in the last block maximum."""

    def __init__(self, inputs: int, *, maximum: bool) -> None:
        super().__init__()
        lying, standing = (0, 1), (1, 0)
        self.maximum = maximum
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=lying)
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=standing)
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=lying)
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=standing)
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 2048, H, W)."""
        single = self.branch3x3_1(x)
        single = torch.cat((self.branch3x3_2a(single), self.branch3x3_2b(single)), 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = torch.cat((self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)), 1)
        pooled = F.max_pool2d(x, 3, 1, padding=1) if self.maximum else _average(x)
        return torch.cat((self.branch1x1(x), single, double, self.branch_pool(pooled)), 1)


def _average(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels, of those that are there at the border."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class FIDInception(nn.Module):
    """Images to the 2,048 features after the last average.

    ``fc`` is there so that the published weights fit exactly; features do not pass through it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)
        self.fc = nn.Linear(WIDTH, NUM_CLASSES)

    @classmethod
    def from_file(cls, path: Path) -> FIDInception:
        """Read the published weights (``pt_inception-2015-12-05-6726825d.pth``), or the same as safetensors.

        Raises:
            CheckpointError: The file is missing, damaged, too large, or holds other tensors.
        """
        tensors = read_tensors(path, max_bytes=MAX_WEIGHTS_BYTES)
        with torch.device("meta"):
            model = cls()
        wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("batches_tracked")}
        given = {k: v for k, v in tensors.items() if not k.endswith("batches_tracked")}
        wrong = sorted(wanted.keys() ^ given.keys()) or sorted(
            key for key, tensor in wanted.items() if tensor.shape != given[key].shape
        )
        if wrong:
            raise CheckpointError(
                f"{path} does not hold the Inception of FID: {len(wrong)} tensors are missing, additional or of another "
                f"shape, such as {wrong[0]}; take pt_inception-2015-12-05-6726825d.pth"
            )
        model = cls()
        model.load_state_dict({k: v.float() for k, v in given.items()}, strict=False)
        return model.eval().requires_grad_(requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to features (B, 2048).

        Images of other sizes are brought to 299 x 299 as pytorch-fid does: bilinear, half-pixel centres, no antialiasing.
        """
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * pixels - 1)))  # 64x147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # 192x71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # 288x35
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # 768x17
        x = self.Mixed_6e(self.Mixed_6d(x))  # 768x17
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 2048x8
        return torch.as_tensor(x.mean((2, 3)))
