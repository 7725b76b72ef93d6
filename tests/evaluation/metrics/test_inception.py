from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vlv.errors import CheckpointError
from vlv.evaluation.metrics.inception import BlockA, BlockC, BlockD, BlockE, FIDInception

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model() -> FIDInception:
    """Random weights and random statistics, so that a wrong norm shows."""
    torch.manual_seed(0)
    model = FIDInception().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model


# --- a reference by another route: weights as a table, convolution as a matrix product --------------


def conv_norm(
    w: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    kernel = w[f"{name}.conv.weight"]
    out, _, high, wide = kernel.shape
    patches = F.unfold(x, (high, wide), padding=pad, stride=stride)  # (B, C k k, P)
    y = kernel.reshape(out, -1) @ patches
    scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + 0.001).sqrt()
    shift = w[f"{name}.bn.bias"] - w[f"{name}.bn.running_mean"] * scale
    y = (y * scale[:, None] + shift[:, None]).clamp_min(0)
    side = (x.shape[2] + 2 * pad[0] - high) // stride + 1
    return y.reshape(len(x), out, side, -1)


def average_without_padding(x: Tensor) -> Tensor:
    total = F.conv2d(x.flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3), padding=1)
    there = F.conv2d(torch.ones_like(x[:1, :1]), torch.ones(1, 1, 3, 3), padding=1)
    return (total / there).reshape(x.shape)


def run(w: dict[str, Tensor], x: Tensor, *steps: tuple[str, int, tuple[int, int]]) -> Tensor:
    for name, stride, pad in steps:
        x = conv_norm(w, name, x, stride, pad)
    return x


def one(
    name: str, stride: int = 1, pad: tuple[int, int] = (0, 0)
) -> tuple[str, int, tuple[int, int]]:
    return name, stride, pad  # fmt: skip


def weights(block: torch.nn.Module) -> dict[str, Tensor]:
    return dict(block.state_dict())


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_block_a(model: FIDInception) -> None:
    block, x = model.Mixed_5c, torch.rand(2, 256, 7, 7)
    assert isinstance(block, BlockA)
    w = weights(block)
    expected = [
        run(w, x, one("branch1x1")),
        run(w, x, one("branch5x5_1"), one("branch5x5_2", pad=(2, 2))),
        run(
            w, x, one("branch3x3dbl_1"), one("branch3x3dbl_2", pad=(1, 1)),
            one("branch3x3dbl_3", pad=(1, 1)),
        ),
        run(w, average_without_padding(x), one("branch_pool")),
    ]  # fmt: skip
    assert_close(block(x), torch.cat(expected, 1))


def test_block_b(model: FIDInception) -> None:
    x = torch.rand(1, 288, 9, 9)
    w = weights(model.Mixed_6a)
    expected = [
        run(w, x, one("branch3x3", 2)),
        run(w, x, one("branch3x3dbl_1"), one("branch3x3dbl_2", pad=(1, 1)), one("branch3x3dbl_3", 2)),
        x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2)),
    ]  # fmt: skip
    assert_close(model.Mixed_6a(x), torch.cat(expected, 1))


def test_block_c(model: FIDInception) -> None:
    block, x = model.Mixed_6c, torch.rand(1, 768, 8, 8)
    assert isinstance(block, BlockC)
    w, lying, standing = weights(block), (0, 3), (3, 0)
    expected = [
        run(w, x, one("branch1x1")),
        run(w, x, one("branch7x7_1"), one("branch7x7_2", pad=lying), one("branch7x7_3", pad=standing)),
        run(
            w, x, one("branch7x7dbl_1"), one("branch7x7dbl_2", pad=standing),
            one("branch7x7dbl_3", pad=lying), one("branch7x7dbl_4", pad=standing),
            one("branch7x7dbl_5", pad=lying),
        ),
        run(w, average_without_padding(x), one("branch_pool")),
    ]  # fmt: skip
    assert_close(block(x), torch.cat(expected, 1))


def test_block_d(model: FIDInception) -> None:
    block, x = model.Mixed_7a, torch.rand(1, 768, 7, 7)
    assert isinstance(block, BlockD)
    w = weights(block)
    expected = [
        run(w, x, one("branch3x3_1"), one("branch3x3_2", 2)),
        run(
            w, x, one("branch7x7x3_1"), one("branch7x7x3_2", pad=(0, 3)),
            one("branch7x7x3_3", pad=(3, 0)), one("branch7x7x3_4", 2),
        ),
        x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2)),
    ]  # fmt: skip
    assert_close(block(x), torch.cat(expected, 1))


@pytest.mark.parametrize(("name", "channels"), [("Mixed_7b", 1280), ("Mixed_7c", 2048)])
def test_block_e(model: FIDInception, name: str, channels: int) -> None:
    """The first averages, the last takes the maximum."""
    block, x = getattr(model, name), torch.rand(1, channels, 5, 5) - 0.5
    assert isinstance(block, BlockE)
    w = weights(block)
    single, double = run(w, x, one("branch3x3_1")), run(w, x, one("branch3x3dbl_1"))
    double = run(w, double, one("branch3x3dbl_2", pad=(1, 1)))
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    largest = padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))
    pooled = average_without_padding(x) if name == "Mixed_7b" else largest
    expected = [
        run(w, x, one("branch1x1")),
        run(w, single, one("branch3x3_2a", pad=(0, 1))),
        run(w, single, one("branch3x3_2b", pad=(1, 0))),
        run(w, double, one("branch3x3dbl_3a", pad=(0, 1))),
        run(w, double, one("branch3x3dbl_3b", pad=(1, 0))),
        run(w, pooled, one("branch_pool")),
    ]
    assert_close(block(x), torch.cat(expected, 1))


def test_sizes_on_the_way(model: FIDInception) -> None:
    """Channels and sides of Szegedy et al. (2016), table 1, and the number of parameters of the published network."""
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, tuple(out.shape[1:]))
        )
    with torch.no_grad():
        features = model(torch.rand(1, 3, 64, 48))
    assert features.shape == (1, 2048)
    assert seen["Conv2d_2b_3x3"] == (64, 147, 147)
    assert seen["Conv2d_4a_3x3"] == (192, 71, 71)
    assert [seen[f"Mixed_5{x}"] for x in "bcd"] == [(256, 35, 35), (288, 35, 35), (288, 35, 35)]
    assert all(seen[f"Mixed_6{x}"] == (768, 17, 17) for x in "abcde")
    assert seen["Mixed_7a"] == (1280, 8, 8)
    assert seen["Mixed_7b"] == seen["Mixed_7c"] == (2048, 8, 8)
    assert sum(p.numel() for p in model.parameters()) == 21_785_568 + 2048 * 1008 + 1008
    assert len([key for key in model.state_dict() if not key.endswith("tracked")]) == 94 * 5 + 2


def test_the_whole_is_its_blocks_in_order(model: FIDInception) -> None:
    x = torch.rand(1, 3, 299, 299)
    with torch.no_grad():
        found = model(x)
        y = model.Conv2d_2b_3x3(model.Conv2d_2a_3x3(model.Conv2d_1a_3x3(x * 2 - 1)))
        y = model.Conv2d_4a_3x3(model.Conv2d_3b_1x1(F.max_pool2d(y, 3, 2)))
        y = F.max_pool2d(y, 3, 2)
        for name in ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]:
            y = getattr(model, f"Mixed_{name}")(y)
    assert_close(found, F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_weights_are_read(model: FIDInception, tmp_path: Path, suffix: str) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("tracked")}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = FIDInception.from_file(path)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in state.items())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the Inception of FID"):
        FIDInception.from_file(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        FIDInception.from_file(tmp_path / "missing.pth")
