from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlv.data.framing import frame
from vlv.data.images import load_image
from vlv.errors import ImageError
from vlv.models.pixels import as_batch, as_list, is_single


@pytest.fixture
def picture() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_every_kind_of_image_gives_the_same_pixels(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [picture, path, str(path), path.read_bytes(), array, tensor, tensor.float() / 255]
    batch = as_batch(kinds, 32)
    assert batch.shape == (7, 3, 32, 32)
    assert batch.dtype == torch.uint8
    assert (batch == batch[0]).all()
    middle = picture.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(batch[0], torch.from_numpy(np.array(middle)).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_image_is_turned_once(orientation: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 60, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif)
    opened = load_image(path)
    kinds = [path, opened, frame(opened, 32), Image.open(path), path.read_bytes()]
    batch = as_batch(kinds, 32)
    assert (batch == batch[0]).all()


def test_tensors_of_the_right_size_pass_unrounded() -> None:
    tensor = torch.rand(3, 32, 32)
    assert torch.equal(as_batch([tensor], 32)[0], tensor)
    levels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(as_batch([levels], 32)[0], levels)
    both = as_batch([levels, tensor], 32)
    assert torch.equal(both, torch.stack([levels.float() / 255, tensor]))


def test_pil_images_are_brought_to_upright_rgb() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (as_batch([clear], 8) == 255).all()
    rotated = Image.new("RGB", (8, 4))
    rotated.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    rotated.save(buffer, "PNG", exif=exif)
    top = as_batch([Image.open(io.BytesIO(buffer.getvalue()))], 4)[0]
    assert torch.equal(top, as_batch([buffer.getvalue()], 4)[0])
    assert top[:, 0].float().mean() > top[:, -1].float().mean()


def test_one_and_several_are_told_apart(picture: Image.Image) -> None:
    assert is_single(picture)
    assert is_single(torch.zeros(3, 4, 4))
    assert not is_single(torch.zeros(2, 3, 4, 4))
    assert not is_single(np.zeros((2, 4, 4, 3), np.uint8))
    assert not is_single([picture])
    assert len(as_list(torch.zeros(2, 3, 4, 4))) == 2
    assert len(as_list(np.zeros((2, 4, 4, 3), np.uint8))) == 2
    assert as_list("a.png") == ["a.png"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"\(H, W, 3\), got uint8 of shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "got float32"),
        (torch.zeros(4, 4), r"\(3, H, W\), got \(4, 4\)"),
        (torch.full((3, 4, 4), 255.0), r"\[0, 1\], got values from 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 or float, got torch.int64"),
        (torch.zeros(3, 2, 200, dtype=torch.uint8), "more elongated than 20:1"),
        (42, "got int"),
        ("missing.png", "no such file"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        as_batch([image], 4)


def test_no_image_is_refused() -> None:
    with pytest.raises(ImageError, match="no image was given"):
        as_list([])
