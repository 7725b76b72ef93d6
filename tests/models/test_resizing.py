from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlv.models import resizing
from vlv.models.resizing import Kernel, resize

PIL_KERNELS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def as_batch(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def picture(kind: str, height: int, width: int, seed: int) -> Image.Image:
    """Noise, or hard black-and-white edges, where a cubic filter overshoots most."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels if kind == "noise" else (levels // 128 * 255).astype(np.uint8))


@pytest.mark.parametrize("kernel", PIL_KERNELS)
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_it_equals_pillow_to_the_bit(kernel: Kernel, kind: str) -> None:
    sizes = np.random.default_rng(1).integers(1, 150, (60, 2)).tolist()
    for number, (old, new) in enumerate([*sizes, [64, 96], [384, 768], [500, 64], [768, 20]]):
        image = picture(kind, old, old, number)
        expected = image.resize((new, new), PIL_KERNELS[kernel])
        assert torch.equal(resize(as_batch(image), new, new, kernel), as_batch(expected)), (
            old,
            new,
        )


@pytest.mark.parametrize("kernel", PIL_KERNELS)
def test_each_pass_equals_pillow_to_the_bit(kernel: Kernel) -> None:
    for number, (height, old, new) in enumerate(
        np.random.default_rng(2).integers(1, 200, (40, 3)).tolist()
    ):
        image = picture("edges", height, old, number)
        wide = image.resize((new, height), PIL_KERNELS[kernel])
        assert torch.equal(resize(as_batch(image), height, new, kernel), as_batch(wide))
        high = image.resize((old, new), PIL_KERNELS[kernel])
        assert torch.equal(resize(as_batch(image), new, old, kernel), as_batch(high))


@settings(max_examples=40, deadline=None)
@given(
    old=st.integers(1, 300),
    new=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["noise", "edges"]),
    kernel=st.sampled_from(sorted(PIL_KERNELS)),
    block=st.sampled_from([64, 512]),
)
def test_any_two_sizes_equal_pillow_to_the_bit(
    old: int, new: int, seed: int, kind: str, kernel: Kernel, block: int
) -> None:
    image = picture(kind, old, old, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "_BLOCK", block)
        ours = resize(as_batch(image), new, new, kernel)
    assert torch.equal(ours, as_batch(image.resize((new, new), PIL_KERNELS[kernel])))


@pytest.mark.parametrize(("old", "new"), [(384, 768), (512, 384), (512, 224), (224, 768)])
def test_the_sizes_of_real_models(old: int, new: int) -> None:
    images = [picture(kind, old, old, new) for kind in ("noise", "edges")]
    expected = as_batch(*(image.resize((new, new), PIL_KERNELS["bicubic"]) for image in images))
    assert torch.equal(resize(as_batch(*images), new, new), expected)


def test_a_batch_equals_its_images_and_an_equal_size_is_left_alone() -> None:
    batch = as_batch(*(picture("noise", 33, 47, seed) for seed in range(3)))
    together = resize(batch, 64, 20)
    assert torch.equal(together, torch.cat([resize(image[None], 64, 20) for image in batch]))
    assert torch.equal(resize(batch, 33, 47), batch)


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads uint8, got torch\.float32"):
        resize(torch.zeros(1, 3, 4, 4), 8, 8)
