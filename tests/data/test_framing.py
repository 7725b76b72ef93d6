from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlv.data.framing import frame
from vlv.data.images import center_crop_resize, to_tensor
from vlv.errors import ConfigError

RECORDED = load_file(Path(__file__).parents[1] / "official" / "preprocess_reference.safetensors")
NAMES = [name.removeprefix("in.") for name in RECORDED if name.startswith("in.")]


@pytest.mark.parametrize("name", NAMES)
def test_resizing_first_equals_torchvision_to_the_bit(name: str) -> None:
    image = Image.fromarray(RECORDED[f"in.{name}"].numpy())
    framed = to_tensor(frame(image, 64, "resize"))
    assert torch.equal(framed, RECORDED[f"out.{name}"])


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (9, 100), (32, 32)])
def test_both_framings_give_squares(shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    assert frame(image, 32, "resize").size == (32, 32)
    assert frame(image, 32) == center_crop_resize(image, 32)


def test_another_framing_is_refused() -> None:
    with pytest.raises(ConfigError, match='the framing is "stretch"; choose one of cut, resize'):
        frame(Image.new("RGB", (4, 4)), 2, "stretch")  # type: ignore[arg-type]
