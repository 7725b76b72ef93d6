from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlv.errors import ModelFolderError
from vlv.models.efficientnet_lite import (
    EfficientNetLite,
    EfficientNetLiteConfig,
    _SameConvolution,
    from_released,
)


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EfficientNetLite(EfficientNetLiteConfig()).eval()


def released(model: EfficientNetLite) -> dict[str, torch.Tensor]:
    """Its weights under the names of the PyTorch port, which begin with underscores, and a classifier."""
    names = {re.sub(r"(^|\.)(?=[a-z])", r"\1_", name): name for name in model.state_dict()}
    # what torch itself names has none
    plain = {re.sub(r"_(weight|bias|running_\w+|num_batches_tracked)$", r"\1", k): v for k, v in names.items()}  # fmt: skip
    state = {name: model.state_dict()[own] for name, own in plain.items()}
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_lite0_has_the_published_size_and_gives_a_map_and_a_vector(lite0: EfficientNetLite) -> None:
    # 4.7 million parameters with the classifier's 1281 thousand
    assert sum(p.numel() for p in lite0.parameters()) == 4652008 - 1281000
    with torch.no_grad():
        output = lite0(torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)))
    assert output.last_hidden_state.shape == (2, 320, 3, 2)
    assert output.pooler_output.shape == (2, 1280)
    assert (output.pooler_output >= 0).all()
    assert (output.pooler_output <= 6).all()


def test_released_weights_give_the_same_model(lite0: EfficientNetLite) -> None:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    state = released(lite0)
    assert "_blocks.0._depthwise_conv.weight" in state
    loaded = from_released(state)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).pooler_output, lite0(pixels).pooler_output)


def test_weights_of_another_network_are_refused_in_a_sentence(lite0: EfficientNetLite) -> None:
    state = released(lite0)
    del state["_conv_head.weight"]
    with pytest.raises(
        ModelFolderError, match=r"1 tensors are missing.* such as conv_head\.weight"
    ):
        from_released(state)
    narrow = released(lite0) | {"_bn1.bias": torch.zeros(3)}
    with pytest.raises(ModelFolderError, match=r"such as bn1\.bias"):
        from_released(narrow)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"),
    [(6, 3, 2, 0, 1), (5, 3, 2, 1, 1), (8, 5, 2, 1, 2), (7, 5, 1, 2, 2), (4, 1, 1, 0, 0)],
)
def test_convolutions_pad_as_tensorflow_does(
    side: int, kernel: int, stride: int, before: int, after: int
) -> None:
    own = _SameConvolution(2, 3, kernel, stride, bias=False)
    plain = nn.Conv2d(2, 3, kernel, stride, bias=False)
    plain.weight = own.weight
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(2))
    expected = plain(F.pad(x, (before, after, before, after)))
    assert torch.equal(own(x), expected)
    assert own(x).shape[-1] == -(-side // stride)
